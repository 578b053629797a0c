"""What is said of an answer and of what drafts it, in words."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_redrafter.stats import DraftStats, PrefillStats
    from mlx_redrafter.text.answer import GenerationResponse
    from mlx_redrafter.tree.shape import TreeShape


def drafts_from(drafter: str | None, tree: TreeShape | None) -> str:
    """What drafts, in a few words: the trained drafter of that name, the text itself, both; ""."""
    sources = []
    if drafter is not None and (tree is None or tree.depth):
        sources.append(drafter)
    if tree is None or tree.lookup:
        sources.append("the text itself")
    return " and ".join(sources)


def drafter_name(folder: Path | None) -> str | None:
    """The hub id of a drafter's folder, or its name; None where there is no drafter."""
    from mlx_redrafter.hub import kept

    if folder is None:
        return None
    if folder.parent.name == "snapshots" and (hub := folder.parent.parent.name).count("--") == 2:
        return "/".join(hub.split("--")[1:])
    if known := kept.facts(folder):
        return f"the drafter trained on {str(known.get('trained', ''))[:10]}"
    return f"{folder.parent.name}/{folder.name}" if folder.name == "drafter" else folder.name


def no_drafter(model: str) -> str:
    """What to say once of a model for which no trained drafter was found."""
    from mlx_redrafter.drafters import published

    text = f"no trained drafter for {model} was found, so drafts come from the text itself; "
    train = f"to train one: mlx-redrafter train -m {shlex.quote(model)}"
    if (row := published.recommended(model)) is None:
        small = published.small_member(model)
        member = f"a small model of its family can draft: --drafter {small}; " if small else ""
        return f"{text}{member}{train}, to use one: --drafter FOLDER-OR-ID"
    size = f", {row.size:g} GB" if row.size else ""
    what = f"published for this model ({row.kind}{size})"
    if row.pickled:
        return (
            f"{text}{what}: mlx-redrafter convert {row.id} --out FOLDER, then --drafter FOLDER; "
            f"{train}"
        )
    return f"{text}{what}: --drafter {row.id}; {train}"


def no_template(model: str, system_prompt: str | None = None) -> str:
    """What to say once of a base model."""
    without = ", without the system prompt" if system_prompt else ""
    return f"note: {model} has no chat template, so it continues the text as it stands{without}"


def cut_thought(tokens: int, limit: int, how: str) -> str:
    """What to say of an answer that ends before its thought; ``how`` to allow a longer one."""
    if limit < 0 or tokens < limit:
        return "the answer ended inside a thought: the model's context is full"
    return f"the answer ended inside a thought, at the limit of {limit} tokens: {how} allows more"


def summary(last: GenerationResponse) -> str:
    """Tokens, tokens per second and tokens per step of an answer, in one line."""
    read = last.stats.prefill_tokens
    new = f" ({read} new)" if 0 < read < last.prompt_tokens else ""
    parts = [
        f"{last.generation_tokens} token{'' if last.generation_tokens == 1 else 's'}",
        f"{last.generation_tps:.1f} tokens/s",
        f"{last.stats.tokens_per_step:.2f} tokens per step",
        f"prompt {last.prompt_tokens} tokens{new}, {last.prompt_tps:.1f} tokens/s",
    ]
    if last.peak_memory:
        parts.append(f"peak {last.peak_memory:.2f} GB")
    if last.finish_reason == "length":
        parts.append("ended by the token limit")
    return " · ".join(parts)


def details(stats: DraftStats) -> str:
    """Counts, acceptance and time split of an answer, one fact a line."""
    values = stats.as_dict()
    histogram = " ".join(f"{k}:{n}" for k, n in values["histogram"].items())
    depths = " ".join(f"{share:.0%}" for share in values["per_depth"])
    shapes = " · ".join(f"{name}: {n}" for name, n in values["shapes"].items())
    seconds = " · ".join(f"{name} {value:.2f}" for name, value in values["seconds"].items())
    rows = [
        ("prompt read", f"{stats.prefill_tokens} tokens"),
        ("steps", f"{stats.steps} (passes of the model), {stats.tokens} tokens"),
        ("tokens per step", f"{stats.tokens_per_step:.2f}"),
        (
            "drafts checked",
            f"{stats.drafted}, accepted {stats.accepted} ({stats.acceptance_rate:.1%})",
        ),
        ("steps by accepted", histogram or "-"),
        ("accepted by depth", depths or "-"),
        ("steps by shape", shapes or "-"),
        ("seconds", seconds),
    ]
    if stats.near_ties is not None:
        told = f"{stats.near_ties} of {stats.tokens} tokens were chosen by less than rounding"
        rows.append(("near ties", f"{told}: where plain and drafted text may part"))
    if stats.sparse_prefill is not None:
        rows.insert(1, ("sparse prefill", sparse_prefill(stats.sparse_prefill)))
    return "\n".join(f"  {name:<18}{value}" for name, value in rows)


def sparse_prefill(stats: PrefillStats) -> str:
    """What sparse prefill did with a prompt, in a few words."""
    text = f"{stats.mode}: {stats.sparse_chunks} of {stats.chunks} chunks"
    if stats.sparse_layers:
        text += f", in their sparse layers {stats.density:.0%} of the attention"
    reasons = ", ".join(f"{reason} {count}" for reason, count in stats.declined.most_common())
    return text + (f"; dense layer passes: {reasons}" if reasons else "")
