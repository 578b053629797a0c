"""The metadata of one architecture in a GGUF file: what is read, and whether that is all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from mlx_redrafter.errors import ConvertError
from mlx_redrafter.hub.gguf.file import GgufFile

# What changes nothing, or is another key's too; positions are read elsewhere, all of them.
_IDLE = (
    "context_length", "vocab_size", "tensor_data_layout", "n_deepstack_layers",
    "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon",
    "attention.head_count_kv", "feed_forward_length",
)  # fmt: skip
# What has no place in config.json may say only what holds without it.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_group_count": (1,),
    "expert_group_used_count": (1,),
    "expert_weights_scale": (1,),
}


class Keys:
    """`{architecture}.*` of a file; remembers what was asked for."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture
        self._start, self._read = f"{architecture}.", set(_IDLE)

    def get(self, key: str, default: Any = None) -> Any:
        """A value, or ``default``. Files have float32: 0.2 is what was meant by 0.20000000298."""
        self._read.add(key)
        value = self.file.get(self._start + key, default)
        short = np.float32(value) if isinstance(value, float) else None
        return float(str(short)) if short is not None and short == value else value

    def need(self, key: str) -> Any:
        """A value. ConvertError if there is none."""
        if (value := self.get(key)) is None:
            raise ConvertError(f"{self.file.path} lacks {self._start}{key}; download it again")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A size of the model, which cannot exceed what the file holds. Raises ConvertError."""
        given = self.need(key) if default is None else self.get(key, default)
        if isinstance(given, list):
            self.refuse(f"{key} is a list of {len(given)} values")
        value = int(given)
        tensors = self.file.tensors.values()
        most = max((max(*t.shape, len(tensors)) for t in tensors), default=0)
        if value > most:
            raise ConvertError(
                f"{self.file.path} gives {self._start}{key} as {value}, more than its "
                "tensors have; download it again"
            )
        return value

    def has(self, tensor: str) -> bool:
        """Is there a tensor of this name?"""
        return tensor in self.file.tensors

    @property
    def layers(self) -> int:
        """Without those behind the last that only draft."""
        return self.size("block_count") - int(self.get("nextn_predict_layers", 0))

    @property
    def heads(self) -> int:
        return self.size("attention.head_count")

    @property
    def kv_heads(self) -> int:
        return self.size("attention.head_count_kv", self.heads)

    @property
    def head_dim(self) -> int:
        size = self.size("attention.key_length", self.size("embedding_length") // self.heads)
        if size < 1:
            self.refuse(f"{self.heads} heads of {self.size('embedding_length')} entries")
        return size

    @property
    def rotated(self) -> int:
        """Entries of a head that positions turn."""
        return int(self.get("rope.dimension_count", self.head_dim))

    def windowed(self, period: int) -> list[bool]:
        """Of every layer; in a file that does not say, all but each ``period``-th."""
        given = self.get("attention.sliding_window_pattern", period)
        if not isinstance(given, list):
            return [given > 0 and (i + 1) % given != 0 for i in range(self.layers)]
        if len(given) < self.layers:
            self.refuse(f"attention.sliding_window_pattern names {len(given)} layers")
        return [bool(one) for one in given[: self.layers]]

    def all_read(self) -> None:
        """ConvertError if the file says something of the model that was not asked for."""
        for name, value in self.file.metadata.items():
            key = name.removeprefix(self._start)
            if key == name or key.startswith("rope.") or key in self._read:
                continue
            if value and value not in _NEUTRAL.get(key, ()):
                self.refuse(f"{key} is {str(value)[:40]!r}, which is not read here")

    def refuse(self, what: str) -> NoReturn:
        raise ConvertError(
            f"{self.file.path} holds a {self.architecture} model of a kind that is not "
            f"understood: {what}; convert the model's Hugging Face version"
        )
