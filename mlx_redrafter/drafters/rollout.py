"""The drafter over recorded text: contexts from features, several draft steps on true tokens."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.drafters import Ask, Drafter
from mlx_redrafter.drafters.levels import LevelDrafter
from mlx_redrafter.drafters.recurrent import ReDrafter
from mlx_redrafter.errors import ModelError
from mlx_redrafter.models import Decoder, DecoderConfig, Target
from mlx_redrafter.models.features import Chunk, Features
from mlx_redrafter.tree.shape import TreeShape

_AT_ONCE = 32  # drafts whose logits exist at a time
_PROBE, _OFF = 8, 0.05  # tokens, and how far states may be apart, as a share of the largest


def feature_layers(target: DecoderConfig, layers: Sequence[int]) -> tuple[int, ...]:
    """The layers whose outputs training needs: the drafter's and the last, in rising order."""
    return tuple(sorted({*layers, target.num_layers - 1}))


def final_hidden(target: Target, features: mx.array) -> mx.array:
    """features (..., L, D) -> the hidden states after the target's final norm (..., D)."""
    return target.norm(features[..., -1, :].astype(target.dtype))


def check_final(target: Target) -> None:
    """Is what the head reads a norm of what the last layer puts out, as `final_hidden` takes it?

    Raises:
        ModelError: it is not; nothing that was recorded could be trained on.
    """
    if isinstance(target, Decoder):
        return
    positions = mx.arange(_PROBE, dtype=mx.int32)
    caches = Pass(new_caches(target.caches, capacity_for(_PROBE), target.dtype), positions[:1])
    last = target.config.num_layers - 1
    problem = "it is no norm of what the last layer puts out"
    try:
        mask = positions[None] <= positions[:, None]
        hidden, [out] = target(positions, positions, mask, positions, caches, [last])
        off = mx.abs(target.norm(out) - hidden).max() > _OFF * mx.abs(hidden).max()
        if not off.item():
            return
    except ModelError as error:
        problem = str(error).partition(";")[0]
    raise ModelError(
        f"no drafter can be trained for model_type '{target.config.model_type}': what its head "
        f"reads cannot be made again from what was recorded ({problem}); drafts come from the text"
    )


def contexts(drafter: ReDrafter | LevelDrafter, target: Target, features: mx.array) -> mx.array:
    """features (R, L, D) -> the drafter's contexts (R, D)."""
    layers = feature_layers(target.config, drafter.features)
    inner = tuple(features[:, i].astype(target.dtype) for i in range(len(layers)))
    read = Features(final_hidden(target, features), layers, inner)
    return drafter.context(read.of(drafter.features))


def head_inputs(
    drafter: ReDrafter, context: mx.array, embeddings: mx.array, steps: int
) -> list[mx.array]:
    """What the output rows are multiplied with at every draft step, for training.

    Args:
        context: (B, T, D) of T neighbouring positions of B runs.
        embeddings: (B, T + steps - 1, D); position t consumes t, t + 1, ...

    Returns:
        (B * T, E) per step.
    """
    rows, length, size = context.shape
    state = drafter.first_state(context.reshape(-1, size))
    has_input_projection = "input_proj" in drafter
    weight = drafter.input_proj.weight if has_input_projection else None
    if weight is not None:
        fixed = context.reshape(-1, size) @ weight[:, :size].T + drafter.input_proj.bias
    else:
        fixed = context.reshape(-1, size)
    recurrent = drafter.config.cell != "sum"
    inputs = drafter.rnn_w(embeddings) if recurrent else embeddings
    result = []
    for k in range(steps):
        part = inputs[:, k : k + length].reshape(rows * length, -1)
        state = drafter.cell(part, state) if recurrent else part + state
        if weight is not None:
            x = fixed + state @ weight[:, size:].T
        else:
            x = mx.concatenate([fixed, state], axis=-1)
        result.append(drafter.blocks(x))
    return result


def first_choices(drafter: Drafter, read: Features, tokens: mx.array) -> mx.array:
    """What a drafter would draft first at every position of a text.

    What it keeps by position is made of the whole text at once: a draft sees nothing behind its
    root.

    Args:
        read: features of the positions of tokens (P,).

    Returns:
        (P-1,) int32: after position p and the true token p + 1 as the root, its token p + 2.
    """
    last, shape = tokens.shape[0] - 1, TreeShape.chain(1)
    caches = new_caches(drafter.caches, capacity_for(last + 1), read.hidden.dtype)
    if caches:
        positions = mx.arange(last, dtype=mx.int32)
        own = Pass(caches, positions[:1])
        drafter.absorb(Chunk(tokens[:-1], tokens[1:], positions, _rows(read, 0, last)), own)
        caches = own.caches
    found = []
    for p in range(last):
        at = mx.array([p + 1], mx.int32)
        ask = Ask(tokens[p + 1 : p + 2], at, None, shape, None, Pass(caches, at))
        state = drafter.begin(_rows(read, p, p + 1))
        found.append(drafter.propose(state, ask)[-1].paths[-1, 1])
        if p % _AT_ONCE == 0:
            mx.eval(found)
    return mx.stack(found)


def _rows(read: Features, start: int, stop: int) -> Features:
    outputs = tuple(x[start:stop] for x in read.outputs)
    return Features(read.hidden[start:stop], read.layers, outputs)
