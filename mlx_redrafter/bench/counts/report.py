"""The budget as tables or JSON: plain step, default tree, chain of 4."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from rich.console import Console
from rich.table import Table

from mlx_redrafter.bench.counts import host, kinds, metal, parts, passes, prompt, sizes
from mlx_redrafter.bench.counts.graph import metal_shaped
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.drafters.loading import load_drafter, module_of
from mlx_redrafter.drafters.lookup import Lookup
from mlx_redrafter.errors import OptionError
from mlx_redrafter.hub import find_drafter, resolve
from mlx_redrafter.models import AdaptedModel, Decoder, load_model, registry
from mlx_redrafter.models.weights import read_json
from mlx_redrafter.runtime.checks import at_least, whole
from mlx_redrafter.runtime.device import machine
from mlx_redrafter.runtime.metal import USUAL_OPS, ops_per_buffer
from mlx_redrafter.terminal import tables
from mlx_redrafter.tree.shape import TreeShape

USUAL = TreeShape(3, 2, 8, lookup=7)  # what the policy mostly takes for the built-in model
SHAPES = (TreeShape.plain(), USUAL, TreeShape.chain(4))
DRAWN = {
    "sampled": SamplingParams(temp=0.8),
    "with filters": SamplingParams(temp=0.8, top_p=0.9, top_k=40, min_p=0.05),
}
_PROMPT = 40  # tokens of the answer that host work is counted on
_DRAFTER_BITS = 6
_GROUP = 32  # weights that share a scale, as in the GGUF file of the built-in model
_MB = 1e6


@dataclass(frozen=True)
class Budget:
    """One column of the report."""

    counts: parts.Counts
    read: sizes.Read
    host: host.Host | None
    drawn: dict[str, int]  # dispatches of the same step, by DRAWN
    layers: int


def run(
    model: str, drafter: str, shape: str | None, context: int, bits: int | None, as_json: bool
) -> None:
    """Count what a decode step does, and show it. Only host times are measured."""
    at_least(1, bits=bits)
    whole("context", context, 1, 2**30)
    shapes = (*SHAPES, *([_shape(shape)] if shape else []))
    folder = resolve(model)
    _check_counted(folder)
    found = find_drafter(model, folder) if drafter == "auto" else resolve(drafter)
    if found is None:
        raise OptionError(f"there is no drafter for {model}: give one with --drafter")
    target, draft = load_as_on_metal(folder, found, bits)
    here = load_model(folder)
    engine = Engine(here, [Lookup(), load_drafter(found, here)])
    asked = [7 * i % here.config.vocab_size for i in range(_PROMPT)]
    drafters: list[Drafter] = [Lookup(), draft]
    budgets = [
        Budget(
            parts.count(target, drafters, each, capacity=context + 128),
            sizes.read(target, draft, each, context),
            host.run(engine, asked, each),
            {
                name: parts.count(target, drafters, each, params, context + 128).dispatches
                for name, params in DRAWN.items()
            },
            target.config.num_layers,
        )
        for each in shapes
    ]
    large, others = reckoning(shapes, context), passes.passes(USUAL, context)
    reading = prompt.count(target)
    facts = machine()
    conditions = {
        "model": model,
        "counted in": _stored(target),
        "drafter": f"{found.name}, {_stored(module_of(draft))}",
        "context": context,
        "mlx": facts["mlx"],
        "host times on": facts["chip"],
    }
    if as_json:
        steps = [as_dict(b, budgets[0]) for b in budgets]
        counted = {"steps": steps, "8B": large, "passes": others, "prompt": reading}
        print(json.dumps({**counted, "conditions": conditions}))
        return
    conditions["prompt"] = (
        f"of {reading['tokens']} tokens in one pass: {reading['dispatches']} dispatches, "
        f"{reading['mask_bytes'] / _MB:.0f} MB of masks"
    )
    _show(budgets, [_large(large), passes.table(others)], conditions)


def _check_counted(folder: Path) -> None:
    """Refuse a model whose steps are not taken apart; raises OptionError."""
    raw = read_json(folder / "config.json")
    if registry.way(raw) != "native":
        raise OptionError(
            f"model_type '{raw.get('model_type')}' runs as mlx_lm's own module, whose steps are "
            "not counted; use a model that our own decoder runs, or count one of these sizes: "
            f"--base {' or '.join(kinds.BASES)}"
        )


def _shape(text: str) -> TreeShape:
    try:
        width, depth, nodes, *rest = (int(n) for n in text.split(","))
    except ValueError:
        raise OptionError(
            f"--shape {text!r} is not possible: use width,length,nodes or "
            "width,length,nodes,lookup, such as 3,4,8"
        ) from None
    return TreeShape(width, depth, nodes, lookup=sum(rest))


def load_as_on_metal(
    folder: Path, drafter: Path, bits: int | None = None
) -> tuple[Decoder, Drafter]:
    """Model and drafter, of any kind, as Metal would have them: packed weights stay packed.

    The built-in model is stored in float32 for a CPU and in 4 bits for Metal: unquantised weights
    become ``bits`` ones (None: 4) here too.
    """
    if bits not in (None, 2, 3, 4, 5, 6, 8, 16):
        raise OptionError(f"bits {bits} is not possible: use 2, 3, 4, 5, 6, 8 or 16")
    with metal_shaped():
        target = load_model(folder)
        if bits != 16 and not _packed(target):
            target.set_dtype(mx.bfloat16)
            nn.quantize(target, _GROUP, bits or 4, class_predicate=_packable)
        # The drafter's table is a packed product of thousands of rows, half a minute on a CPU.
        with patch.object(nn.QuantizedLinear, "__call__", _zeros):
            loaded = load_drafter(drafter, target)
    if isinstance(small := module_of(loaded), AdaptedModel):
        raise OptionError(
            f"the drafter in {drafter} is of model_type '{small.config.model_type}' and runs as "
            "mlx_lm's own module, whose steps are not counted; use another drafter"
        )
    mx.eval(target.parameters(), module_of(loaded).parameters())
    return cast(Decoder, target), loaded


def _zeros(layer: nn.QuantizedLinear, x: mx.array) -> mx.array:
    """Of the shape and type of the layer's output."""
    return mx.zeros((*x.shape[:-1], layer.scales.shape[0]), x.dtype)


def _packable(_: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % _GROUP == 0


def _packed(model: nn.Module) -> bool:
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    return any(isinstance(module, kinds) for module in model.modules())


def _stored(model: nn.Module) -> str:
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    packed = {m.bits for m in model.modules() if isinstance(m, kinds)}
    return f"{'/'.join(map(str, sorted(packed)))} bits" if packed else "unquantised"


def reckoning(shapes: tuple[TreeShape, ...], context: int) -> dict[str, Any]:
    """Bytes of an 8B 4-bit model with a 128k vocabulary and a 6-bit drafter by the usual recipe."""
    target = kinds.base_of(kinds.LLAMA_8B)
    drafter = kinds.usual(target)
    kinds.quantised(drafter, _DRAFTER_BITS)
    plain = sizes.read(target, None, TreeShape.plain(), context)
    rows = {}
    for shape in shapes:
        if shape.depth:
            drafted = sizes.read(target, drafter, shape, context).drafter
            rows[str(shape)] = {
                "drafter_bytes": drafted,
                "share_of_plain": round(drafted / (plain.target + plain.kv), 4),
            }
    return {"target_bytes": plain.target, "kv_bytes": plain.kv, "context": context, "trees": rows}


def as_dict(budget: Budget, plain: Budget) -> dict[str, Any]:
    """Plain values; launches with all kinds."""
    counts = budget.counts
    result = {
        "shape": str(counts.shape),
        "primitives": counts.primitives,
        "dispatches": counts.dispatches,
        "dispatches_drawn": budget.drawn,
        "dispatches_to_plain": round(counts.dispatches / plain.counts.dispatches, 4),
        "parts": {
            name: {"primitives": p, "dispatches": d, "by_kind": _nonzero(counts.by_part[name])}
            for name, (p, d) in counts.parts.items()
        },
        "by_kind": _nonzero(counts.launches),
        "unknown_kinds": sorted(counts.unknown),
        "widest_sort": counts.widest_sort,
        "read_bytes": vars(budget.read),
    }
    if budget.host is not None:
        result["syncs_per_step"] = budget.host.syncs_per_step
        result["traces"] = budget.host.traces
        result["measured_launch_ms"] = round(1000 * budget.host.launch_seconds, 3)
    return result


def _nonzero(kinds: Counter[str]) -> dict[str, int]:
    return {kind: n for kind, n in kinds.most_common() if n}


def _show(budgets: list[Budget], others: list[Table], conditions: dict[str, Any]) -> None:
    out = Console(highlight=False)
    plain = budgets[0]
    table = tables.table("a step", *(str(b.counts.shape) for b in budgets))

    def row(name: str, values: list[str], style: str | None = None) -> None:
        table.add_row(name, *values, style=style)

    row("Metal dispatches, estimated", [str(b.counts.dispatches) for b in budgets], "bold")
    for part in parts.ORDER:
        found = [b.counts.parts.get(part, (0, 0))[1] for b in budgets]
        if any(found):
            row(f"  {part}", [str(number) for number in found])
    ratios = [b.counts.dispatches / plain.counts.dispatches for b in budgets]
    row("  to the plain step", [f"{ratio:.2f}" for ratio in ratios], "bold")
    for name in DRAWN:
        row(f"  {name}", [str(b.drawn[name]) for b in budgets])
    row("command buffers", [_buffers(b, plain) for b in budgets])
    row("primitives (views are free)", [str(b.counts.primitives) for b in budgets])
    row("widest sort", [str(b.counts.widest_sort or "none") for b in budgets])
    row("MB of target weights read", [f"{b.read.target / _MB:.1f}" for b in budgets])
    row("MB of drafter weights read", [f"{b.read.drafter / _MB:.1f}" for b in budgets])
    row("  to the target's", [f"{b.read.drafter / plain.read.target:.1%}" for b in budgets])
    row("MB of keys and values read", [f"{b.read.kv / _MB:.1f}" for b in budgets])
    hosts = [b.host for b in budgets if b.host is not None]
    row("synchronisations", [f"{h.syncs_per_step:.2f}" for h in hosts])
    row("traces of its bucket", [str(h.traces) for h in hosts])
    row("ms to launch, measured here", [f"{1000 * h.launch_seconds:.2f}" for h in hosts])
    out.print(table)
    out.print()
    for other in (_kinds(budgets), *others):
        out.print(other)
        out.print()
    if unknown := sorted(set().union(*(b.counts.unknown for b in budgets))):
        out.print(f"kinds without a row in the table, counted as one: {', '.join(unknown)}")
    out.print(", ".join(f"{name} {value}" for name, value in conditions.items()), style="dim")


def _buffers(budget: Budget, plain: Budget) -> str:
    """At MLX's limit of launches for most chips, and at the one that is set for a small model; of
    heavy weights there are more."""
    limits = (ops_per_buffer(plain.layers, plain.read.target) or USUAL_OPS, USUAL_OPS)
    ours, usual = (-(-budget.counts.dispatches // (ops + 1)) for ops in limits)
    return f"{ours} (else {usual})" if ours != usual else str(ours)


def _kinds(budgets: list[Budget]) -> Table:
    """Dispatches by kind; fused kernels are one kind."""
    table = tables.table("dispatches by kind", *(str(b.counts.shape) for b in budgets))
    grouped = []
    for budget in budgets:
        kinds = Counter[str]()
        for kind, number in budget.counts.launches.items():
            kinds["fused element by element" if kind.startswith(metal.FUSED) else kind] += number
        grouped.append(kinds)
    every = Counter[str]()
    for kinds in grouped:
        every |= kinds
    for kind, _ in every.most_common():
        table.add_row(kind, *(str(kinds[kind] or "") for kinds in grouped))
    return table


def _large(large: dict[str, Any]) -> Table:
    base = f"{large['target_bytes'] / _MB:.0f} MB of weights, {large['kv_bytes'] / _MB:.0f} of KV"
    table = tables.table(
        "8B, 4 bits, vocabulary 128k", "MB of a 6-bit drafter", "of the plain step"
    )
    table.title, table.title_justify, table.title_style = base, "left", "dim"
    for shape, found in large["trees"].items():
        megabytes = f"{found['drafter_bytes'] / _MB:.0f}"
        table.add_row(shape, megabytes, f"{found['share_of_plain']:.1%}")
    return table
