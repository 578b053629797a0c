"""`mlx-redrafter train`: all stages, or one of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from mlx_redrafter.cli import net
from mlx_redrafter.errors import OptionError, RedrafterError
from mlx_redrafter.runtime.paths import expanded
from mlx_redrafter.terminal import console
from mlx_redrafter.training import folder, lines
from mlx_redrafter.training.config import KINDS, Evaluating, TrainConfig

if TYPE_CHECKING:
    from mlx_redrafter.training.stages import Run

OPTIONS: dict[str, dict[str, str]] = {
    "Data": {
        "model": "Built-in name, local folder or Hugging Face id (org/name).",
        "out": "Folder of the run; the drafter goes into its subfolder drafter.",
        "prompts": "Prompts to answer (jsonl); without a file the model writes its own.",
        "answers": "Answers of an earlier run to train on as well (jsonl or jsonl.gz).",
        "answer_tokens": "Tokens of answers to train on in total, with those of --answers.",
        "max_tokens": "Longest answer, in tokens, its thought not counted.",
        "thinking": "Share of the answers that think, if the chat template has a switch for it.",
        "thought_tokens": "A thought is closed after so many tokens, and the answer follows.",
        "prompt_tokens": "Longest prompt that the model may write, in tokens.",
        "system_prompt": "Instructions at the start of every conversation.",
        "batch": "Answers written at once; lowered automatically to fit in memory.",
        "seed": "Same seed, same data and same drafter.",
    },
    "Drafter": {
        "kind": f"What to train: {', '.join(KINDS)}.",
        "cell": "Recurrent cell: gru, or sum or elman as in Apple's.",
        "initial_state": "Where the cell starts: context, or zero as in Apple's.",
        "context_layers": "Layers to read, as 2,15,29; auto takes three, '' the last state only.",
        "head": "Output matrix: own, or target to use the model's.",
        "exit_dim": "Width of the head; by default the model's hidden size.",
        "num_draft_layers": "Residual blocks of the head; 1 in each of Medusa's.",
        "draft_vocab_size": "How many of the most frequent tokens can be drafted; 0: all.",
        "warm_start": "Drafter folder of the same shape to start from.",
    },
    "Fit": {
        "positions": "Positions to train on; those seen twice count twice.",
        "batch_positions": "Positions in an optimiser step.",
        "segment": "Neighbouring positions that are read together.",
        "rollout": "Draft steps to train per position; 4 Medusa heads.",
        "candidates": "Tokens whose logits are computed in a step.",
        "learning_rate": "Highest learning rate of the schedule.",
        "warmup": "Share of the steps before the highest learning rate.",
        "head_rate": "Learning rate of an own output matrix, as a share of the rest's.",
        "weight_decay": "Weight decay of AdamW.",
        "clip": "Largest norm of a gradient.",
        "step_decay": "Draft step k weighs this to the power of k.",
        "hard": "Share of the loss on the tokens alone, not on their distribution.",
        "acceptance": "Weight of the acceptance loss.",
        "acceptance_after": "Share of the steps before the acceptance loss begins.",
        "cache_gb": "GB of disk for hidden states; of what does not fit a part is kept.",
    },
    "Result": {"bits": "Bits of the drafter's weights: 4, 5, 6, 8 or 16."},
}
_SHORT = {"model": "-m", "out": "-o"}
_RESULT = "Result"

command = typer.Typer(cls=net.Commands, add_completion=False)
File = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", callback=expanded, help="YAML file with these options; flags override it."
    ),
]
Estimate = Annotated[
    bool,
    typer.Option(
        "--estimate", help="Only try, for a minute or more, how long everything will take."
    ),
]
EvalPrompts = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_RESULT,
        help="Number of prompts in the evaluation.",
        show_default="as many of the built-in ones as the time allows",
    ),
]
EvalTokens = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_RESULT,
        help="Longest answer in the evaluation.",
        show_default="128 or fewer",
    ),
]


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Show typer an option for every field of TrainConfig, None where it is not given.

    ``command`` gets those that are given as its first argument.
    """
    own = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.name != "given"
    ]
    hints = get_type_hints(TrainConfig)
    panels = {name: panel for panel, names in OPTIONS.items() for name in names}
    names = [name for names in OPTIONS.values() for name in names]
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                hints[name] | None,
                typer.Option(
                    f"--{name.replace('_', '-')}", *([_SHORT[name]] if name in _SHORT else []),
                    callback=expanded if "Path" in str(hints[name]) else None,
                    help=OPTIONS[panels[name]][name],
                    rich_help_panel=None if panels[name] == "Data" else panels[name],
                    show_default=str(defaults[name]) if defaults[name] is not None else False,
                ),
            ],
        )
        for name in names
    ]  # fmt: skip

    def flat(**values: Any) -> None:
        given = {name: values.pop(name) for name in names}
        command({k: v for k, v in given.items() if v is not None}, **values)

    parameters = [*options, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
    flat.__name__, flat.__doc__ = command.__name__, command.__doc__
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in parameters}
    return flat


@command.callback(invoke_without_command=True)
@_with_options
def train(
    given: dict[str, Any],
    ctx: typer.Context,
    config: File = None,
    estimate: Estimate = False,
    eval_prompts: EvalPrompts = None,
    eval_tokens: EvalTokens = None,
) -> None:
    """Train a drafter for any model, on this machine, from nothing but the model.

    It writes prompts and answers them; the drafter learns to predict the answers.

    Ctrl-C stops; the same command goes on.
    """
    evaluating = {"prompts": eval_prompts, "max_tokens": eval_tokens}
    if ctx.invoked_subcommand is not None:
        if estimate:
            raise OptionError("--estimate is for all stages: leave out the stage")
        ctx.obj = (given, config, evaluating)
    elif estimate:
        _estimate(given, config, evaluating)
    else:
        _stages(given, config, evaluating)


def _stage(name: str, text: str) -> None:
    """Add the subcommand of one stage."""

    def stage(
        given: dict[str, Any],
        ctx: typer.Context,
        config: File = None,
        eval_prompts: EvalPrompts = None,
        eval_tokens: EvalTokens = None,
    ) -> None:
        before, file, asked = ctx.obj
        for key, value in (("prompts", eval_prompts), ("max_tokens", eval_tokens)):
            asked[key] = asked[key] if value is None else value
        _stages({**before, **given}, config or file, asked, name)

    stage.__doc__ = text
    command.command(name, cls=net.Command)(_with_options(stage))


_stage("prompts", "Write the prompts, or take them from a file.")
_stage("answers", "Answer the prompts, until there are enough tokens.")
_stage("fit", "Train the drafter on the answers.")
_stage("evaluate", "Measure the drafter live, and write its model card.")


def _stages(
    given: dict[str, Any],
    file: Path | None,
    evaluating: dict[str, int | None],
    only: str | None = None,
) -> None:
    asked = Evaluating.of(evaluating)
    config, before = folder.settle(given, file)
    with folder.alone(config.out):
        try:
            import mlx.core as mx

            from mlx_redrafter.training import stages

            run, kept = stages.open_run(config, before, asked), None
            for name, stage in stages.STAGES.items():
                if only in (None, name):
                    mx.reset_peak_memory()
                    stage(run)
                    console.note(f"{name}: at most {mx.get_peak_memory() / 1e9:.1f} GB of memory")
                    if name in ("fit", "evaluate"):
                        kept = stages.keep(run)
        except RedrafterError:
            if before is None and not folder.decided(config.out):
                (config.out / folder.FILE).unlink(missing_ok=True)  # nothing was begun
            raise
        except KeyboardInterrupt:
            console.note(
                "stopped; what is done is kept. To go on: "
                + _again(config.out, given, file, evaluating, only)
            )
            raise
    if only in (None, "fit", "evaluate"):
        _advise(run, kept)


def _again(
    out: Path,
    given: dict[str, Any],
    file: Path | None,
    evaluating: dict[str, int | None],
    only: str | None,
) -> str:
    """The same command, with every flag: a folder in which nothing was begun remembers none."""
    asked = {f"eval_{name.removeprefix('max_')}": value for name, value in evaluating.items()}
    options = {**given, "out": out, "config": file, **asked, "debug": net.debugging() or None}
    return lines.line("train", *([only] if only else []), **options)


def _advise(run: Run, place_kept: Path | None) -> None:
    """How to use the new drafter: without naming it, if it is the one that is found."""
    from mlx_redrafter.hub import find_drafter, kept

    model, place, chats = run.config.model, run.config.out / "drafter", run.chats
    found = find_drafter(model, run.place)
    if place_kept is not None and found == place_kept:
        older = len(kept.all_of(run.place)) - 1
        before = f", before {older} older one{'s' * (older > 1)}" if older else ""
        use = lines.use(model, chats)
        console.note(f"wrote {place} and kept it for this model{before}; use it: {use}")
        return
    if found is not None:
        console.note(f"note: without --drafter this model goes on using the one in {found}")
    console.note(f"wrote {place}; use it: {lines.use(model, chats, place)}")


def _estimate(given: dict[str, Any], file: Path | None, evaluating: dict[str, int | None]) -> None:
    from mlx_redrafter.training import estimate

    asked = Evaluating.of(evaluating)
    config, _ = folder.settle(given, file)
    estimate.show(estimate.measure(config, asked))
