"""The parts of a module, told by what they do with a few tokens: names differ by type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.errors import ModelError
from mlx_redrafter.models.config import DecoderConfig
from mlx_redrafter.models.patches import Place, patched
from mlx_redrafter.models.running import Running

Call = tuple[nn.Module, mx.array]


class Observed:
    """One run of a module over n tokens, of which nothing is computed.

    backbone: the outermost part whose output is the final hidden states. norm: what makes these,
    if it is a part of its own. embedding: the first one. head: what makes logits of them, the
    embedding where they are tied.

    Raises:
        LookupError: no part puts out states of the embedding's size.
    """

    def __init__(self, module: nn.Module, tokens: mx.array, caches: list[Any]) -> None:
        self._calls: list[Call] = []
        self._linear: list[Call] = []
        classes = {type(m) for m in module.modules()} - {type(module)}
        watched = [Place(cls, "__call__", self._noting(self._calls)) for cls in classes]
        watched += [
            Place(cls, "as_linear", self._noting(self._linear))
            for cls in classes
            if hasattr(cls, "as_linear")
        ]
        with patched(cast(Running, None), watched):
            logits = module(tokens, cache=caches)
        self.vocab_size = logits.shape[-1]
        embeddings = [call for call in self._calls if "Embedding" in type(call[0]).__name__]
        self.embedding, first = embeddings[0]
        self.size = first.shape[-1]
        states = [call for call in self._calls if call[1].shape == (*tokens.shape, self.size)]
        self.backbone, hidden = states[-1]
        self.dtype = hidden.dtype
        made = [m for m, out in states if out is hidden and "Norm" in type(m).__name__]
        self.norm = made[0] if made else None
        shape = (*tokens.shape, self.vocab_size)
        heads = [m for m, out in (*self._linear, *self._calls) if out.shape == shape]
        self.head = next((m for m in reversed(heads) if "weight" in m), self.embedding)
        self._calls.clear()
        self._linear.clear()

    def _noting(self, calls: list[Call]) -> Callable[..., Any]:
        def patch(_: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
            def call(self: nn.Module, *args: Any, **options: Any) -> Any:
                out = stock(self, *args, **options)
                if isinstance(out, mx.array):
                    calls.append((self, out))
                return out

            return call

        return patch


def dequantised(head: nn.Module, ids: mx.array) -> mx.array:
    """ids (K,) -> rows (K, D) of a head or an embedding.

    Raises ModelError where they are stored in a form of the module's own.
    """
    rows: mx.array = head["weight"][ids]
    if "scales" not in head:
        return rows
    if not hasattr(head, "mode"):
        raise ModelError(
            f"this model's output rows are stored as {type(head).__name__} has them, and cannot "
            "be shared; needed: drafts from the text"
        )
    biases = head.get("biases")
    return mx.dequantize(
        rows,
        scales=head["scales"][ids],
        biases=None if biases is None else biases[ids],
        group_size=cast(Any, head).group_size,
        bits=cast(Any, head).bits,
        mode=cast(Any, head).mode,
    )


def config_of(
    raw: Mapping[str, Any], seen: Observed, slabs: Sequence[mx.array], layers: int
) -> DecoderConfig:
    """The sizes of a model, as far as its config.json and its caches say them.

    Args:
        slabs: keys and values of its layers (1, Hkv, n, Dh).
    """
    text = raw.get("text_config")
    text = {**raw, **text} if isinstance(text, Mapping) else raw

    def first(*names: str, default: int) -> int:
        found = next((text[name] for name in names if isinstance(text.get(name), int)), default)
        return int(found)

    kv_heads, head_dim = (slabs[0].shape[1], slabs[0].shape[3]) if slabs else (1, seen.size)
    limit = first(
        "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len",
        "seq_length", "context_length", "n_ctx", "max_context_length", default=1 << 20,
    )  # fmt: skip
    heads = first("num_attention_heads", "n_heads", "n_head", "num_heads", default=kv_heads)
    if layers < 1 or limit < 1:
        raise ModelError(
            f"config.json of model_type '{raw.get('model_type')}' gives {layers} layers and "
            f"{limit} positions; download the model's config.json again"
        )
    return DecoderConfig(
        model_type=str(raw.get("model_type")),
        hidden_size=seen.size,
        intermediate_size=first("intermediate_size", "ffn_hidden_size", default=4 * seen.size),
        vocab_size=seen.vocab_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=limit,
        norm_eps=float(text.get("rms_norm_eps") or 1e-5),
        attention_scale=head_dim**-0.5,
        ropes=(),
        layer_ropes=(-1,) * layers,
        layer_windows=(0,) * layers,
        tied=seen.head is seen.embedding,
    )
