"""Bytes of weights and of the KV cache that a step reads, from shapes; nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.drafters.recurrent import ReDrafter
from mlx_redrafter.models import Decoder, decoder_config
from mlx_redrafter.models.weights import parameters
from mlx_redrafter.training.config import TrainConfig
from mlx_redrafter.training.kinds.redrafter import drafter_config
from mlx_redrafter.tree.shape import TreeShape

# huggingface.co/meta-llama/Llama-3.1-8B-Instruct, config.json: sizes only.
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Read:
    """Bytes that one step reads: weights of the target and of the drafter, keys and values."""

    target: int
    drafter: int
    kv: int


def read(target: Decoder, drafter: ReDrafter | None, shape: TreeShape, context: int) -> Read:
    """What a step reads with so many tokens in the cache.

    A pass reads its weights once, whatever its number of rows (kernels for few rows may read them
    again for every five); of an embedding only the rows of the tokens count.
    """
    config = target.config
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * context
    drafted = _of_drafter(drafter, target, shape) if drafter is not None and shape.depth else 0
    return Read(_of_target(target, shape.nodes), drafted, kv * target.dtype.size)


def _of_target(target: Decoder, nodes: int) -> int:
    total = sum(value.nbytes for value in parameters(target).values())
    table = sum(value.nbytes for value in parameters(target.model.embed_tokens).values())
    # A tied table is read as the output head.
    return total + nodes * _row(target) - (0 if target.config.tied else table)


def _row(target: Decoder) -> int:
    """Of the input embedding."""
    table = parameters(target.model.embed_tokens).values()
    return sum(value.nbytes for value in table) // target.config.vocab_size


def _of_drafter(drafter: ReDrafter, target: Decoder, shape: TreeShape) -> int:
    """Context once, cell and head at every level, and what is read of every beam's token."""
    sizes = {name: value.nbytes for name, value in parameters(drafter).items()}
    sizes.pop("draft_vocab", 0)
    once = sum(size for name, size in sizes.items() if name.startswith("context_"))
    # The context's half of the projection, with the bias, is computed once per step.
    projection = sum(size for name, size in sizes.items() if name.startswith("input_proj."))
    once += projection - projection // 2
    level = sum(sizes.values()) - once
    row = _row(target)
    if drafter.has_gates:  # of all tokens but the root the cell's input is kept
        gates = sum(size for name, size in sizes.items() if name.startswith("rnn_w."))
        once, level = once + gates, level - gates
        row = drafter.rnn_w.weight.shape[0] * target.dtype.size
    if drafter.config.head == "target":
        level += drafter.config.output_size * drafter.config.hidden_size * target.dtype.size
    beams = shape.width * (shape.depth - 1)
    return once + level * shape.depth + _row(target) + beams * row


def large_model(bits: int = 4, drafter_bits: int = 6) -> tuple[Decoder, ReDrafter]:
    """An 8B model with a 128k vocabulary, quantised in groups of 64, and the drafter that training
    would make for it: shapes only, never evaluated."""
    target = Decoder(decoder_config(LLAMA_8B))
    target.set_dtype(mx.bfloat16)
    nn.quantize(target, 64, bits)
    drafter = ReDrafter(drafter_config(TrainConfig(), target.config))
    drafter.set_dtype(mx.bfloat16)
    nn.quantize(drafter, 64, drafter_bits)
    return target, drafter
