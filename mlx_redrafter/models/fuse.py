"""Join projections that read the same input, so that one matrix product replaces two or three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn


def fuse(layers: Sequence[nn.Module]) -> nn.Module | None:
    """One linear layer whose output is the layers' outputs side by side.

    Returns None where that is impossible: dense beside quantised, different bits, group sizes or
    modes (mixed-bit repositories), biases in some only, different dtypes.
    """
    first = layers[0]
    if any(type(layer) is not type(first) for layer in layers):
        return None
    names = set(first.parameters())
    for layer in layers:
        if set(layer.parameters()) != names:
            return None
        if any(layer[name].dtype != first[name].dtype for name in names):
            return None
    if isinstance(first, nn.QuantizedLinear):
        kinds = {(q.bits, q.group_size, q.mode) for q in cast(Sequence[nn.QuantizedLinear], layers)}
        if len(kinds) > 1:
            return None
    joined = {name: mx.concatenate([layer[name] for layer in layers]) for name in names}
    result: nn.Module
    if isinstance(first, nn.QuantizedLinear):
        # The constructor quantises random weights; they are lazy and replaced unevaluated.
        outputs, inputs = joined["weight"].shape[0], first.group_size * first.scales.shape[-1]
        result = nn.QuantizedLinear(
            inputs, outputs, "bias" in names, first.group_size, first.bits, first.mode
        )
    elif isinstance(first, nn.Linear):
        outputs, inputs = joined["weight"].shape
        result = nn.Linear(inputs, outputs, bias="bias" in names)
    else:
        return None
    result.update(joined)
    return result
