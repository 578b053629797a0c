"""Plain and drafted decoding raced on one prompt: what is run, the verdict, and its figures."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mlx_redrafter.cli.options import DecodeOptions, ModelOptions
from mlx_redrafter.cli.race import screen
from mlx_redrafter.cli.race.lanes import Lane, Piece, View, synchronize, take_turns, views
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime import blas
from mlx_redrafter.runtime.device import conditions, dtype_name
from mlx_redrafter.terminal import console
from mlx_redrafter.terminal.progress import Waiting
from mlx_redrafter.tree.shape import TEXT

if TYPE_CHECKING:
    from mlx_redrafter.tree.shape import TreeShape

WARM_UP_TOKENS = 8
Show = Callable[[Sequence[View]], None]
PLAIN, DRAFTED = "plain decoding", "with drafting"
AROUND = 32  # characters shown on either side of a difference


def check(source: ModelOptions, options: DecodeOptions, picture: Path | None) -> None:
    """Refuse what cannot be a race before a model is loaded; raises OptionError."""
    if source.no_draft:
        raise OptionError("race compares plain decoding with drafting: leave out --no-draft")
    tree = options.tree()
    if tree is not None and not tree.drafts:
        raise OptionError("with --nodes 1 nothing is drafted: use 2 or more")
    if picture is not None and not picture.parent.is_dir():
        raise OptionError(f"--save-svg {picture}: there is no folder {picture.parent}")


def run(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int],
    options: DecodeOptions,
    *,
    question: str,
    picture: Path | None = None,
    as_json: bool = False,
) -> int:
    """Race, shown live on a terminal; returns the exit code: 1 if the texts differ where they must
    not, in float32 on a CPU.

    Args:
        prompt: what both continue; ``question`` is what is shown of it.
        picture: file for an SVG of the moment when the first one finishes.

    Raises:
        OptionError: there is nothing to draft from, or the picture cannot be written; and the
            errors of `stream_generate`.
    """
    tree, out = tree_of(model, options), Console(highlight=False)
    facts = conditions_of(model, options, tree)
    console.note("Warming up: the first pass compiles the kernels ...")
    contest = Contest(model, tokenizer, prompt, options, tree)
    lanes = _decode(contest, None if as_json else out, question)
    plain, drafted = views(lanes)
    exact = is_exact(facts["dtype"])
    lines = verdict(plain, drafted, facts["dtype"], exact)
    if picture is not None:
        moment = min(lane.clock for lane in lanes)
        _save(picture, screen.picture(question, views(lanes, moment), lines, console.facts(facts)))
    if as_json:
        print(json.dumps({**_figures(lanes), **facts}))
    else:
        if not screen.is_live(out):
            out.print(screen.table((plain, drafted)))
        console.show("\n" + "\n".join(lines), out)
        console.note(console.facts(facts))
    return int(plain.token_ids != drafted.token_ids and exact)


@dataclass(frozen=True)
class Contest:
    """One prompt, to be answered plainly and with drafting; without a tree by what pays."""

    model: Any
    tokenizer: Any
    prompt: str | Sequence[int]
    options: DecodeOptions
    tree: TreeShape | None = None

    def answer(self, draft: bool, **more: Any) -> Any:
        """The responses of `stream_generate`, whose errors it raises."""
        from mlx_redrafter.api import stream_generate

        arguments = {**self.options.arguments(), "tree": self.tree, "draft": draft, **more}
        return stream_generate(self.model, self.tokenizer, self.prompt, **arguments)

    def warm_up(self) -> None:
        """A few tokens of every shape that may be chosen: what is first used on a clock is compiled
        on it."""
        from mlx_redrafter.tree.shape import TreeShape

        shapes: Sequence[TreeShape] = (TreeShape.plain(), self.tree or TreeShape.plain())
        if self.tree is None:
            shapes = self.model.budget.policy(self.options.temp > 0).shapes
        for shape in shapes:
            with contextlib.ExitStack() as stack:
                waiting = stack.enter_context(contextlib.closing(Waiting()))
                more = {"tree": shape, "prompt_progress_callback": waiting.on_progress}
                warming = stack.enter_context(contextlib.closing(self.answer(True, **more)))
                for _ in itertools.islice(warming, WARM_UP_TOKENS):
                    waiting.close()
        synchronize()

    def in_turns(self, show: Show = lambda views: None) -> tuple[Lane, Lane]:
        """Both to their ends: (plain, drafted)."""
        with contextlib.ExitStack() as stack:
            # Both stay open to the end: on Metal the first to close would unpin the other's
            # weights.
            plainly, drafting = (
                stack.enter_context(contextlib.closing(self.answer(draft)))
                for draft in (False, True)
            )
            lanes = Lane(PLAIN, plainly), Lane(DRAFTED, drafting)
            take_turns(lanes, show)
        return lanes


def _decode(contest: Contest, out: Console | None, question: str) -> tuple[Lane, Lane]:
    """Warm both up and let them run to the end: (plain, drafted); on ``out`` if it is live."""
    contest.warm_up()
    if out is None or not screen.is_live(out):
        return contest.in_turns()
    out.print(screen.title(question))
    with screen.screen(out) as show:
        return contest.in_turns(show)


def tree_of(model: Any, options: DecodeOptions) -> TreeShape | None:
    """What to draft; None leaves it to `stream_generate`. A model without a drafter drafts from the
    text itself; raises OptionError if that was turned off."""
    tree = options.tree()
    if tree is None or model.drafter is not None:
        return tree
    tree = tree.only([TEXT])
    if not tree.drafts:
        raise OptionError(
            f"there is no drafter for {model.name} and --lookup 0 leaves nothing to draft from: "
            "give a drafter with --drafter, or leave out --lookup"
        )
    return tree


@dataclass(frozen=True)
class Difference:
    """Where two answers part: the number of the token from 1, and both texts around it."""

    token: int
    before: str
    plain: str
    drafted: str


def difference(plain: Sequence[Piece], drafted: Sequence[Piece]) -> Difference | None:
    """The first one; None if all tokens are the same."""
    pairs = itertools.zip_longest((p.token for p in plain), (p.token for p in drafted))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return None
    before = "".join(p.text for p in plain[:at])[-AROUND:]
    after = ("".join(p.text for p in pieces[at:])[:AROUND] for pieces in (plain, drafted))
    return Difference(at + 1, before, *after)


def compared(ratio: float) -> str:
    """What drafting brings; ``ratio``: its speed by that of plain decoding."""
    pays = "" if ratio >= 1 else ": here drafting does not pay"
    return f"With drafting: {ratio:.2f}x the speed of plain decoding{pays}."


def verdict(plain: View, drafted: View, dtype: str, exact: bool) -> list[str]:
    """Whether the texts are the same, and which way was faster, in plain words.

    Args:
        exact: whether a row's logits here are the same in a pass over one token and over several.
    """
    speed = compared(drafted.speed / plain.speed)
    parted = difference(plain.pieces, drafted.pieces)
    if parted is None:
        return [f"Same text: yes, all {plain.tokens} tokens are identical.", speed]
    around = [
        f"  {name:<16}...{_one_line(parted.before)} >>>{_one_line(text) or ' (nothing)'}"
        for name, text in ((PLAIN, parted.plain), (DRAFTED, parted.drafted))
    ]
    if exact:
        reason = f"In {dtype} this must not happen: please run `mlx-redrafter doctor`."
    else:
        reason = (
            f"In {dtype} a pass over several tokens may round differently from a pass over one; "
            "where two tokens are nearly equally likely, that decides."
        )
    return [f"Same text: NO, they part at token {parted.token}.", *around, reason, speed]


def is_exact(dtype: str) -> bool:
    """Must the texts be the same? In float32 on a CPU, where no row depends on the others."""
    return dtype == "float32" and blas.rows_alone()


def _one_line(text: str) -> str:
    return text.replace("\r", "").replace("\n", "\\n")


def conditions_of(model: Any, options: DecodeOptions, tree: TreeShape | None) -> dict[str, Any]:
    """What the figures hold for."""
    return conditions(
        model.name,
        dtype_of(model.target),
        drafter=model.drafter_folder.name if model.drafter_folder else None,
        tree=str(tree) if tree is not None else "automatic",
        temp=options.temp,
        seed=options.seed,
    )


def dtype_of(target: Any) -> str:
    """The type of the weights, such as "float32"; "4-bit" where they are quantised."""
    bits = {module.bits for module in target.modules() if hasattr(module, "bits")}
    return f"{min(bits)}-bit" if bits else dtype_name(target.dtype)


def _figures(lanes: tuple[Lane, Lane]) -> dict[str, Any]:
    """Everything measured, as plain values."""
    plain, drafted = views(lanes)
    parted = difference(plain.pieces, drafted.pieces)
    results = {}
    for key, lane, seen in zip(("plain", "drafted"), lanes, (plain, drafted), strict=True):
        assert lane.last is not None, "a lane that was raced has an answer"
        stats = lane.last.stats.as_dict()
        results[key] = {
            "text": lane.text,
            "tokens": seen.tokens,
            "finish_reason": lane.last.finish_reason,
            "seconds": round(seen.seconds, 4),
            "tokens_per_second": round(seen.speed, 2),
            "prompt_seconds": round(lane.prompt_seconds, 4),
            **{key: stats[key] for key in ("steps", "drafted", "accepted", "acceptance_rate")},
            "tokens_per_step": round(seen.tokens_per_step, 4),
        }
    return {
        "same": parted is None,
        "first_difference": asdict(parted) if parted is not None else None,
        "ratio": round(drafted.speed / plain.speed, 3),
        **results,
        "prompt_tokens": lanes[0].last.prompt_tokens if lanes[0].last else 0,
    }


def _save(path: Path, svg: str) -> None:
    try:
        path.write_text(svg, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"--save-svg {path}: {error.strerror or error}") from None
