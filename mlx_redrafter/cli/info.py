"""`mlx-redrafter info`: a model and its drafter, whether they fit, and what they need here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from mlx_redrafter.cli import remarks
from mlx_redrafter.cli.options import DrafterName, Json, KVBits, KVGroupSize, ModelArgument
from mlx_redrafter.errors import DrafterError, ModelError
from mlx_redrafter.runtime.checks import at_least
from mlx_redrafter.runtime.device import device, machine
from mlx_redrafter.runtime.paths import BUILTIN
from mlx_redrafter.terminal import console

if TYPE_CHECKING:
    from mlx_redrafter.cache.packed import Packing


def command(
    model: ModelArgument = BUILTIN,
    drafter: DrafterName = "auto",
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch, tag or commit of a Hugging Face id."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Length in tokens to size the cache for.", show_default="the model's longest"
        ),
    ] = None,
    self_check: Annotated[
        bool,
        typer.Option(
            "--self-check",
            help="Load both and count how often the drafter's first choice is the model's own.",
        ),
    ] = False,
    kv_bits: KVBits = None,
    kv_group_size: KVGroupSize = 64,
    as_json: Json = False,
) -> None:
    """Show a model and its drafter, whether they fit, and the memory they need."""
    from mlx_redrafter import arguments

    at_least(1, context=context)
    packing = arguments.packing(kv_bits, kv_group_size)
    facts = collect(model, drafter, revision, context, self_check, packing)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        show(facts)


def collect(
    name: str,
    drafter: str = "auto",
    revision: str | None = None,
    context: int | None = None,
    self_check: bool = False,
    packing: Packing | None = None,
) -> dict[str, Any]:
    """All facts, as plain values; without the self-check weights are looked at, not loaded.

    Raises HubError, ModelError, and OptionError where rows do not divide into the packing's groups.
    A drafter that does not fit is a fact, not an error.
    """
    from mlx_redrafter.hub import find_drafter, resolve
    from mlx_redrafter.text.tokenizer import refuse_stand_ins

    folder = resolve(name, revision)
    refuse_stand_ins(folder)
    model = _model(folder, context, packing)
    found = find_drafter(name, folder) if drafter == "auto" else resolve(drafter)
    known = _drafter(found, folder, model["vocabulary"]) if found is not None else None
    if self_check and found is not None and known is not None and known["fits"]:
        known |= _compared(found, folder, name)
    return {
        "name": name,
        "folder": str(folder),
        "model": model,
        "drafter": known,
        "machine": machine(),
    }


def _model(folder: Path, context: int | None, packing: Packing | None = None) -> dict[str, Any]:
    import mlx.core as mx

    from mlx_redrafter.cache.layer import bytes_of
    from mlx_redrafter.cache.snapshots import limit_of, states
    from mlx_redrafter.models.loading import read_model, unpacked_like
    from mlx_redrafter.models.weights import parameters

    model, weights = read_model(folder)
    config = model.config
    size, element = _sizes(weights)
    count = sum(value.size for value in parameters(unpacked_like(model, folder)).values())
    tokens = min(context or config.max_positions, config.max_positions)
    if packing is not None:
        model.pack(packing)
    dtype = mx.float32 if element == 4 else mx.float16
    cache = bytes_of(model.caches, tokens, dtype)
    return {
        "model_type": config.model_type,
        "parameters": count,
        "bits_per_weight": round(8 * size / count, 2),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "context": config.max_positions,
        "weights_bytes": size,
        "cache_tokens": tokens,
        "cache_bytes": cache,
        "cache_bytes_per_token": (bytes_of(model.caches, 2 * tokens, dtype) - cache) / tokens,
        "state_bytes": states(model.caches, element),
        "snapshots_bytes": limit_of(None),
    }


def _drafter(found: Path, folder: Path, vocabulary: int) -> dict[str, Any]:
    """Facts of a drafter beside the model in `folder`; `problem` says why it does not fit."""
    from mlx_redrafter.drafters.loading import kind_of
    from mlx_redrafter.hub import kept

    facts: dict[str, Any] = {
        "folder": str(found),
        "origin": kept.origin(found, folder),
        "fits": False,
        "problem": None,
    }
    try:
        described = kind_of(found).describe(found)
        size, element = _sizes(described.weights)
        level, _ = _sizes(described.one_level)
        facts |= described.facts
        facts["draft_vocabulary"] = facts.get("draft_vocabulary") or vocabulary
        if facts.get("head") == "target":
            level += facts["draft_vocabulary"] * described.width * element
        facts |= {"weights_bytes": size, "bytes_per_draft_step": level}
        facts["problem"] = kept.problem(found, folder)
        facts["fits"] = facts["problem"] is None
    except (DrafterError, ModelError) as error:
        facts["problem"] = str(error)
    return facts


def _compared(found: Path, folder: Path, name: str) -> dict[str, Any]:
    """How often the drafter's first choice is the model's next token; see evaluation/selfcheck."""
    from mlx_redrafter.evaluation import selfcheck
    from mlx_redrafter.models import load_model
    from mlx_redrafter.text.tokenizer import load_tokenizer

    fit = selfcheck.check(found, selfcheck.Along(load_model(folder), load_tokenizer(folder)))
    fit.warn(name)
    return {"agreement": round(fit.agreement, 4), "self_check": str(fit)}


def _sizes(weights: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the weights when loaded on this device, and of one activation."""
    import mlx.core as mx

    wide = device() == "cpu"
    floats = [w for w in weights.values() if mx.issubdtype(w.dtype, mx.floating)]
    element = 4 if wide else max((w.dtype.size for w in floats), default=2)
    size = sum(
        w.size * (4 if wide and mx.issubdtype(w.dtype, mx.floating) else w.dtype.size)
        for w in weights.values()
    )
    return size, element


def show(facts: Mapping[str, Any]) -> None:
    """The facts on stdout, a name and a value a line."""
    here = facts["machine"]
    rows = [*_model_rows(facts), ("", ""), *_drafter_rows(facts), ("", "")]
    rows.append(("device", f"{here['device']}, {here['chip']}, {here['memory_gb']:.0f} GB"))
    if here["blas"]:
        rows.append(("BLAS", here["blas"]))
    rows.append(("versions", _versions(here)))
    width = max(len(name) for name, _ in rows) + 2
    lines = (
        Text.assemble((name.ljust(width), "dim"), value) if value else Text()
        for name, value in rows
    )
    console.show(Text("\n").join(lines))


def _versions(here: Mapping[str, Any]) -> str:
    return (
        f"mlx-redrafter {here['mlx_redrafter']}, MLX {here['mlx']}, mlx-lm {here['mlx_lm']}, "
        f"Python {here['python']}, {here['system']}"
    )


def _model_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    model = facts["model"]
    return [
        ("model", f"{facts['name']} ({model['model_type']})"),
        ("folder", facts["folder"]),
        ("parameters", f"{model['parameters'] / 1e6:,.1f} million"),
        ("bits per weight", f"{model['bits_per_weight']:g} as loaded on this device"),
        ("layers", f"{model['layers']}, hidden size {model['hidden_size']}"),
        ("heads", f"{model['heads']} of {model['head_dim']}, {model['kv_heads']} for keys"),
        ("vocabulary", f"{model['vocabulary']:,}"),
        ("context", f"{model['context']:,} tokens"),
        ("memory", f"{_megabytes(model['weights_bytes'])} weights"),
        ("", f"{_megabytes(model['cache_bytes'])} cache for {model['cache_tokens']:,} tokens"),
        ("", f"{model['cache_bytes_per_token'] / 1e3:,.1f} kB for each of them"),
        *_state_rows(model),
    ]


def _state_rows(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What recurrences and convolutions keep, however long the text is."""
    if not model["state_bytes"]:
        return []
    state = _megabytes(model["state_bytes"])
    most = _megabytes(model["snapshots_bytes"])
    return [
        ("", f"{state} of it states of fixed size, and as much for each snapshot of a session"),
        ("", f"{most} snapshots at most (one every 512 tokens and turn while there is room)"),
    ]


def _drafter_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    drafter = facts["drafter"]
    if drafter is None:
        return [("drafter", remarks.no_drafter(facts["name"]))]
    rows = [("drafter", drafter["folder"]), ("from", drafter["origin"])]
    if drafter.get("base"):
        rows.append(("made for", str(drafter["base"])))
    if "architecture" in drafter:
        rows += [
            ("architecture", drafter["architecture"]),
            ("head", f"{drafter['head']}, {drafter['draft_vocabulary']:,} tokens"),
            ("reads", f"{_megabytes(drafter['bytes_per_draft_step'])} for each drafted level"),
        ]
    rows.append(("fits", "yes" if drafter["fits"] else f"no: {drafter['problem']}"))
    if "self_check" in drafter:
        rows.append(("self-check", drafter["self_check"]))
    return rows


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"
