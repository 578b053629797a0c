"""What every kind of drafter costs a base model, from shapes alone: no weights are needed.

Bytes are those of the sizes themselves. Dispatches are counted on a model of the same layers, heads
and vocabulary that is thin otherwise: they do not depend on how wide a layer is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.bench.counts import parts, sizes
from mlx_redrafter.drafters.eagle import Eagle, EagleConfig
from mlx_redrafter.drafters.loading import module_of
from mlx_redrafter.drafters.lookup import Lookup
from mlx_redrafter.drafters.medusa import Medusa, MedusaConfig
from mlx_redrafter.drafters.model import DraftModel
from mlx_redrafter.drafters.recurrent import ReDrafter
from mlx_redrafter.drafters.speculator import Speculator, SpeculatorConfig
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder, decoder_config
from mlx_redrafter.models.config import DecoderConfig
from mlx_redrafter.models.weights import read_json
from mlx_redrafter.runtime.paths import user_path
from mlx_redrafter.terminal import tables
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
# huggingface.co/Qwen/Qwen3-30B-A3B, config.json.
QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
# huggingface.co/Qwen/Qwen3.5-9B, the text half of its config.json.
QWEN35_9B: dict[str, Any] = {
    "model_type": "qwen3_5",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "full_attention_interval": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "vocab_size": 248320,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
}
BASES = {"llama-8b": LLAMA_8B, "qwen3-30b-a3b": QWEN3_30B_A3B, "qwen3.5-9b": QWEN35_9B}
BITS, DRAFTER_BITS = 4, 4
PLAIN = "plain"
DRAFTED = 32000  # tokens of a draft vocabulary
CHAIN = TreeShape.chain(4)
_GROUP = 64
_MB = 1e6


def _vocabulary(base: DecoderConfig) -> int:
    return min(DRAFTED, base.vocab_size)


def usual(target: Decoder) -> ReDrafter:
    """The drafter that training would make."""
    return ReDrafter(drafter_config(TrainConfig(), target.config))


def _medusa(head: str) -> Callable[[Decoder], Medusa]:
    """Heads of one block: Medusa-1's, or those that read the model's own rows."""

    def make(target: Decoder) -> Medusa:
        base = target.config
        rows = 0 if head == "target" else _vocabulary(base)
        drafted = None if head == "target" else rows
        size, vocab = base.hidden_size, base.vocab_size
        return Medusa(MedusaConfig(size, vocab, 4, 1, True, head, rows, drafted))

    return make


def _mlp(target: Decoder) -> Speculator:
    """IBM's for Llama-3-8B: three quarters of the model's width, every level of its own."""
    base, rows = target.config, _vocabulary(target.config)
    size = base.hidden_size
    return Speculator(
        SpeculatorConfig(
            size, base.vocab_size, 3 * size // 4, 4, "mlp", False, False, 1, rows, rows
        )
    )


def _lstm(target: Decoder) -> Speculator:
    """Arctic's."""
    base, rows = target.config, _vocabulary(target.config)
    size = base.hidden_size
    return Speculator(
        SpeculatorConfig(size, base.vocab_size, size, 3, "lstm", True, True, 1, rows, rows)
    )


def _eagle(three: bool) -> Callable[[Decoder], Eagle]:
    """EAGLE-3 with a block like the model's; or EAGLE-1, which has the model's head."""

    def make(target: Decoder) -> Eagle:
        base, count = target.config, target.config.num_layers
        return Eagle(
            EagleConfig(
                base.hidden_size, base.hidden_size, base.vocab_size,
                tuple(sorted({min(2, count - 1), count // 2, count - 1})) if three else (),
                base.num_heads, base.num_kv_heads, base.head_dim, base.intermediate_size,
                base.norm_eps, base.ropes[0], rows=_vocabulary(base) if three else 0,
                draft_vocab_size=_vocabulary(base) if three else None, fc_bias=not three,
                last_norm=three,
            )
        )  # fmt: skip

    return make


def _small(target: Decoder) -> DraftModel:
    """What Llama-3.2-1B is to Llama-3.1-8B: half as wide, 16 layers, one table of tokens."""
    base = target.config
    size = base.hidden_size // 2
    sizes = {
        "hidden_size": size, "intermediate_size": 4 * size, "num_hidden_layers": 16,
        "num_attention_heads": base.num_heads, "num_key_value_heads": base.num_kv_heads,
        "head_dim": max(8, size // base.num_heads), "vocab_size": base.vocab_size,
        "tie_word_embeddings": True,
    }  # fmt: skip
    model = _decoder({**LLAMA_8B, **sizes})
    model.set_dtype(mx.bfloat16)
    return DraftModel(model, base.vocab_size)


KINDS: dict[str, Callable[[Decoder], Any]] = {
    "ReDrafter, as trained": usual,
    "Medusa, own rows": _medusa("own"),
    "Medusa, the model's": _medusa("target"),
    "MLP speculator": _mlp,
    "LSTM speculator": _lstm,
    "EAGLE-3": _eagle(True),
    "EAGLE-1": _eagle(False),
    "a small model": _small,
}
"""By name, the drafter of a target. A new kind is a row here, and one of ``sizes.levels``."""


def quantised(module: nn.Module, bits: int, group: int = _GROUP) -> None:
    """Packed as on Metal where that is possible; not evaluated."""
    module.set_dtype(mx.bfloat16)
    nn.quantize(
        module, group, bits,
        class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % group == 0,
    )  # fmt: skip


def _decoder(config: Mapping[str, Any]) -> Decoder:
    """A model of these sizes as on Metal, its projections joined as they are when it is loaded."""
    model = Decoder(replace(decoder_config(dict(config)), closed=True))
    for block in model.model.layers:
        block.fuse()
    return model


def base_of(config: Mapping[str, Any], bits: int = BITS) -> Decoder:
    """A model of these sizes: shapes only, never evaluated."""
    target = _decoder(config)
    quantised(target, bits)
    return target


def thin(config: Mapping[str, Any]) -> Decoder:
    """A model of the same graph that fits everywhere, evaluated."""
    size = 2 * _GROUP
    small = {"hidden_size": size, "intermediate_size": size, "head_dim": _GROUP}
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        small |= {name: size} if config.get(name) else {}
    if chosen := config.get("num_experts_per_tok"):
        small |= dict.fromkeys(("num_experts", "num_local_experts"), 2 * chosen)
    if "linear_key_head_dim" in config:
        small |= {"linear_key_head_dim": _GROUP, "linear_value_head_dim": _GROUP}
    target = _decoder({**config, **small})
    quantised(target, BITS, _GROUP // 2)
    mx.eval(target.parameters())
    return target


def evaluated(drafter: Any) -> None:
    """Make the packed weights of a thin model's drafter."""
    quantised(module_of(drafter), DRAFTER_BITS, _GROUP // 2)
    mx.eval(module_of(drafter).parameters())


def dispatches(config: Mapping[str, Any], shape: TreeShape = CHAIN) -> dict[str, parts.Counts]:
    """Steps of this shape with every kind of drafter, and the plain step under ``plain``."""
    target = thin(config)
    found = {PLAIN: parts.count(target, [], TreeShape.plain())}
    for name, make in KINDS.items():
        drafter = make(target)
        evaluated(drafter)
        bound = drafter.bind(target) if hasattr(drafter, "bind") else drafter
        found[name] = parts.count(target, [Lookup(), bound], shape)
    return found


def costs(config: Mapping[str, Any], context: int, shape: TreeShape = CHAIN) -> dict[str, Any]:
    """Bytes of a step with every kind of drafter, as plain values."""
    target = base_of(config)
    plain = sizes.read(target, None, TreeShape.plain(), context)
    rows = {}
    for name, make in KINDS.items():
        drafter = make(target)
        quantised(module_of(drafter), DRAFTER_BITS)
        found, levels = sizes.read(target, drafter, shape, context), sizes.levels(drafter, target)
        drafted = found.drafter + found.kv - plain.kv
        rows[name] = {
            "once_bytes": levels.once,
            "level_bytes": levels.later,
            "drafter_bytes": drafted,
            "share_of_plain": round(drafted / (plain.target + plain.kv), 4),
        }
    return {"target_bytes": plain.target, "kv_bytes": plain.kv, "drafters": rows}


def run(base: str, context: int, as_json: bool) -> None:
    """Show what every kind costs a base: a name of ``BASES``, a config.json or its folder.

    Raises:
        OptionError: no such base. ModelError: of a type that is not run here.
    """
    config = _config(base)
    found, counted = costs(config, context), dispatches(config)
    plain = counted[PLAIN].dispatches
    for name, row in found["drafters"].items():
        counts = counted[name]
        row["draft_dispatches"] = counts.parts[parts.DRAFT][1]
        row["dispatches"] = counts.dispatches
        row["dispatches_to_plain"] = round(counts.dispatches / plain, 4)
    facts = {"base": base, "bits": BITS, "drafter bits": DRAFTER_BITS, "context": context,
             "tree": str(CHAIN), "draft vocabulary": DRAFTED}  # fmt: skip
    if as_json:
        print(json.dumps({**found, "plain_dispatches": plain, "conditions": facts}))
        return
    table = tables.table(
        "drafter", "once", "a level", "a step", "of plain", "draft", "step", "of plain"
    )
    for name, row in found["drafters"].items():
        table.add_row(
            name, *(f"{row[f'{what}_bytes'] / _MB:.0f}" for what in ("once", "level", "drafter")),
            f"{row['share_of_plain']:.1%}", str(row["draft_dispatches"]), str(row["dispatches"]),
            f"{row['dispatches_to_plain']:.0%}",
        )  # fmt: skip
    read = f"{found['target_bytes'] / _MB:.0f} of weights, {found['kv_bytes'] / _MB:.0f} of KV"
    tables.show(f"{CHAIN}: MB read and dispatches; plain: {read}, {plain}", table, facts)


def _config(base: str) -> Mapping[str, Any]:
    if base in BASES:
        return BASES[base]
    file = user_path(base)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise OptionError(
            f"there is no base {base!r}: use {', '.join(BASES)}, or the config.json of a model"
        )
    return read_json(file)
