"""Quantised layers that multiply few rows by kernels of our own, where these were found to pay."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..kernels import products, verdicts
from ..kernels.products import Shape, Weights
from ..kernels.source import Launch
from ..kernels.verdicts import Verdict
from .delta import DeltaNet

# How many blocks attention is cut into beyond its first thousand slots; MLX chooses it by the rows.
_BLOCKS = ("MLX_SDPA_BLOCKS", "128")


@dataclass(frozen=True)
class Way:
    """How a layer's products go: which rows by which kernel, all others MLX's way."""

    exactly: bool
    verdict: Verdict

    def takes(self, rows: int) -> bool:
        """Is there a kernel for so many rows? Known while a pass is traced."""
        if not self.exactly:
            return rows in self.verdict.rows()
        if self.verdict.order is None:
            return False
        return rows in products.EXACT_ROWS or (rows == 1 and not self.verdict.single)

    def launch(self, x: mx.array, weights: Weights, bits: int) -> Launch:
        if self.exactly:
            assert self.verdict.order is not None, "it takes no rows"
            return products.exact(x, weights, bits, self.verdict.order)
        return products.fast(x, weights, bits)


class SmallRowLinear(nn.QuantizedLinear):
    """A quantised layer whose products may go another way; see `switch_on`."""

    way: Way

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., K) -> (..., N)."""
        found = _product(self, x)
        if found is None:
            return super().__call__(x)
        return found + self["bias"] if "bias" in self else found


class SmallRowEmbedding(nn.QuantizedEmbedding):
    """A quantised embedding that is the output head too."""

    way: Way

    def as_linear(self, x: mx.array) -> mx.array:
        """x (..., K) -> (..., N)."""
        found = _product(self, x)
        return super().as_linear(x) if found is None else found


_OWN: dict[type, type] = {
    nn.QuantizedLinear: SmallRowLinear,
    nn.QuantizedEmbedding: SmallRowEmbedding,
}
Layer = SmallRowLinear | SmallRowEmbedding


def switch_on(
    model: nn.Module, say: Callable[[str], None], choice: str | None = None
) -> list[Layer]:
    """Let a model's quantised layers take the kernels that this machine was found to do well with.

    Before anything of the model is traced. The layers' arrays and names stay.

    Args:
        say: told what takes seconds, and what cannot be exact.
        choice: `off`, `fast` or `exact`; None: as `verdicts.choice` says.

    Returns:
        the quantised layers that may take a kernel. Raises OptionError.
    """
    choice = choice or verdicts.choice()
    if choice == "off" or not verdicts.metal():
        return []
    layers = [layer for layer in model.modules() if type(layer) in _OWN]
    found = verdicts.verdicts([shape_of(layer) for layer in layers if _affine(layer)], say)
    for recurrent in (layer for layer in model.modules() if isinstance(layer, DeltaNet)):
        recurrent.quicken(say)
    changed: list[Layer] = []
    for layer in layers:
        way = Way(choice == "exact", found.get(shape_of(layer), Verdict()))
        if any(way.takes(rows) for rows in (1, *products.EXACT_ROWS)):
            # Its arrays, names and type for others remain: only how it multiplies is another way.
            layer.__class__ = _OWN[type(layer)]
            layer.way = way
            changed.append(layer)
    if choice == "exact":
        os.environ.setdefault(*_BLOCKS)
        if left := sum(_multiplies(module) for module in model.modules()) - len(changed):
            say(f"{left} layers have no exact kernel: where two tokens are near, drafts may decide")
    return changed


def described(model: object) -> list[str]:
    """What is on, for what depends on it: a line for each kind of layer."""
    if not isinstance(model, nn.Module):
        return []
    kinds = set()
    for layer in model.modules():
        if isinstance(layer, Layer):
            kinds.add(f"{verdicts.named(shape_of(layer))} {_rows(layer.way)}")
        elif isinstance(layer, DeltaNet) and layer.rule is not None:
            kinds.add("delta")
    return sorted(kinds)


def exactly(model: object) -> bool:
    """Do its layers take the exact kernels?"""
    layers = model.modules() if isinstance(model, nn.Module) else []
    return any(layer.way.exactly for layer in layers if isinstance(layer, Layer))


def shape_of(layer: nn.Module) -> Shape:
    outputs, words = layer["weight"].shape
    inputs = words * 32 // layer.bits
    return Shape(outputs, inputs, layer.bits, layer.group_size, layer["scales"].dtype)


def _multiplies(module: nn.Module) -> bool:
    return "scales" in module or isinstance(module, nn.Linear | DeltaNet)


def _affine(layer: nn.Module) -> bool:
    return bool(layer.mode == "affine")


def _rows(way: Way) -> str:
    taken = [rows for rows in (1, *products.FAST_ROWS) if way.takes(rows)]
    return f"{'exact' if way.exactly else 'fast'} {taken}"


def _product(layer: Layer, x: mx.array) -> mx.array | None:
    """x (..., K) -> (..., N), or None where it goes MLX's way."""
    inputs = x.shape[-1]
    rows = x.size // inputs
    if x.dtype != layer["scales"].dtype or not layer.way.takes(rows):
        return None
    weights = Weights(layer["weight"], layer["scales"], layer["biases"])
    found = layer.way.launch(x.reshape(rows, inputs), weights, layer.bits).run()[0]
    return found.reshape(*x.shape[:-1], -1)
