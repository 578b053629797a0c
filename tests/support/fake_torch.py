"""A stand-in for the little of torch that reading a checkpoint needs; files are NumPy archives.

torch.save and np.savez both write a zip archive, so a file made here is recognised as torch's.
bfloat16, which NumPy lacks, is kept as int16 under a marked name.
"""

from __future__ import annotations

import sys
import types

import mlx.core as mx
import numpy as np

_MARK = "bfloat16:"


class Tensor:
    """A NumPy array with torch's methods."""

    layout, is_quantized = "strided", False

    def __init__(self, array, dtype):
        self.array, self.dtype, self.shape = array, f"torch.{dtype}", array.shape

    def detach(self):
        return self

    contiguous = detach

    def numel(self):
        return self.array.size

    def element_size(self):
        return self.array.itemsize

    def untyped_storage(self):
        return types.SimpleNamespace(nbytes=lambda: self.array.nbytes)

    def view(self, dtype):
        return self

    def numpy(self):
        return self.array


def save(path, weights):
    """mx arrays by name -> a file that `load` of the stand-in reads."""
    arrays = {}
    for name, value in weights.items():
        if value.dtype == mx.bfloat16:
            arrays[_MARK + name] = np.array(value.view(mx.int16))
        else:
            arrays[name] = np.array(value)
    with open(path, "wb") as stream:
        np.savez(stream, **arrays)


def _load(path, map_location, weights_only, mmap):
    assert weights_only, "a pickle must not be run"
    tensors = {}
    for name, array in np.load(path).items():
        marked = name.startswith(_MARK)
        tensors[name.removeprefix(_MARK)] = Tensor(array, "bfloat16" if marked else array.dtype)
    return tensors


def install(monkeypatch):
    """Let `import torch` find the stand-in until the test ends."""
    module = types.ModuleType("torch")
    module.load, module.strided = _load, "strided"
    module.bfloat16, module.int16 = "torch.bfloat16", "torch.int16"
    module.is_tensor = lambda value: isinstance(value, Tensor)
    monkeypatch.setitem(sys.modules, "torch", module)
