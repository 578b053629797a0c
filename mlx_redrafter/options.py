"""The options that commands share, declared once and handed around as dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from mlx_redrafter import blas, checks, console
from mlx_redrafter.console import DEBUG
from mlx_redrafter.errors import OptionError

if TYPE_CHECKING:
    from mlx_redrafter.prefill.config import SparsePrefill
    from mlx_redrafter.tree.shape import TreeShape

T = TypeVar("T")
MODEL, SAMPLING, DRAFTING, PROMPT = "Model", "Sampling", "Drafting", "Long prompts"


def _use_blas(ctx: typer.Context, value: str | None) -> str | None:
    """Start again with the BLAS asked for: it was chosen when the package was imported."""
    chosen = os.environ.get(blas.VARIABLE, "auto")
    if value and value != chosen and sys.platform == "linux" and not ctx.resilient_parsing:
        os.environ[blas.VARIABLE] = value
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return value


def _set_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[DEBUG] = value
    return value


Blas = Annotated[
    Literal["auto", "row-exact", "openblas", "reference"] | None,
    typer.Option(
        "--blas",
        callback=_use_blas,
        is_eager=True,
        show_default="auto",
        help=f"Matrix library on Linux; the same as setting {blas.VARIABLE}.",
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")
]


SparseMode = Annotated[
    Literal["off", "trianglemix", "xattention", "minference"],
    typer.Option(
        rich_help_panel=PROMPT,
        help="Read a long prompt with sparse attention, which may change the answer.",
    ),
]
SparseConfig = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=PROMPT, metavar="PATH", help="MInference's JSON file for the model."
    ),
]
SparseMinContext = Annotated[
    int, typer.Option(rich_help_panel=PROMPT, help="Tokens that are read densely before that.")
]
SparseTau = Annotated[
    float,
    typer.Option(rich_help_panel=PROMPT, help="Share of the attention that xattention keeps."),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which model and drafter to load."""

    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", rich_help_panel=MODEL, help="Built-in name, local folder or hub id."
        ),
    ] = "smollm2-135m"
    drafter: Annotated[
        str,
        typer.Option(
            "--drafter",
            "-d",
            rich_help_panel=MODEL,
            help="Local folder or hub id; 'auto' takes the one that came with the model, if any.",
        ),
    ] = "auto"
    no_draft: Annotated[
        bool,
        typer.Option("--no-draft", rich_help_panel=MODEL, help="Plain decoding, no drafter."),
    ] = False
    revision: Annotated[
        str | None,
        typer.Option(rich_help_panel=MODEL, help="Branch, tag or commit of a hub id."),
    ] = None

    def load(self, tree: TreeShape | None = None) -> tuple[Any, Any]:
        """(model, tokenizer) of `mlx_redrafter.load`; raises its errors.

        Without a tree to decode with, what drafting costs here is known afterwards.
        """
        from mlx_redrafter.api import load

        drafter = None if self.no_draft else self.drafter
        model, tokenizer = load(self.model, drafter, revision=self.revision)
        model.engine.say = console.note
        if drafter is not None and tree is None:
            model.budget.costs()
        return model, tokenizer


@dataclass(frozen=True)
class DecodeOptions:
    """How to continue the prompt: everything that `stream_generate` takes beside the prompt."""

    max_tokens: Annotated[
        int, typer.Option(rich_help_panel=SAMPLING, help="Longest answer, in tokens; -1: no limit.")
    ] = 512
    temp: Annotated[
        float, typer.Option(rich_help_panel=SAMPLING, help="Temperature; 0 is greedy.")
    ] = 0.0
    top_p: Annotated[float, typer.Option(rich_help_panel=SAMPLING, help="0 is off.")] = 0.0
    top_k: Annotated[int, typer.Option(rich_help_panel=SAMPLING, help="0 is off.")] = 0
    min_p: Annotated[float, typer.Option(rich_help_panel=SAMPLING, help="0 is off.")] = 0.0
    repetition_penalty: Annotated[
        float | None, typer.Option(rich_help_panel=SAMPLING, show_default="off")
    ] = None
    repetition_context_size: Annotated[
        int, typer.Option(rich_help_panel=SAMPLING, help="Tokens back that it looks.")
    ] = 20
    presence_penalty: Annotated[
        float | None, typer.Option(rich_help_panel=SAMPLING, show_default="off")
    ] = None
    presence_context_size: Annotated[
        int, typer.Option(rich_help_panel=SAMPLING, help="Tokens back that it looks.")
    ] = 20
    frequency_penalty: Annotated[
        float | None, typer.Option(rich_help_panel=SAMPLING, show_default="off")
    ] = None
    frequency_context_size: Annotated[
        int, typer.Option(rich_help_panel=SAMPLING, help="Tokens back that it looks.")
    ] = 20
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=SAMPLING, metavar="ID=VALUE", help="Added to a logit; repeatable."
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(rich_help_panel=SAMPLING, help="Same seed, same text, drafted or not.")
    ] = 0
    stop: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=SAMPLING, help="Text that ends the answer; repeatable."),
    ] = None
    system_prompt: Annotated[str | None, typer.Option(help="First message of the template.")] = None
    beam_width: Annotated[
        int | None,
        typer.Option(rich_help_panel=DRAFTING, help="Candidates per level; 1 drafts a chain."),
    ] = None
    beam_length: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=DRAFTING,
            help="Drafted tokens on a branch; the root, which is already decided, not counted.",
        ),
    ] = None
    nodes: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=DRAFTING, help="Tokens checked in one pass, the root counted."
        ),
    ] = None
    candidates: Annotated[
        Literal["trellis", "beams"] | None,
        typer.Option(
            rich_help_panel=DRAFTING,
            help="Nodes from the whole beam search, or from its surviving beams (Apple's set).",
        ),
    ] = None
    lookup: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=DRAFTING,
            help="Tokens drafted from the text itself, where it said the same before; 0: none.",
        ),
    ] = None
    prefill_step_size: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=PROMPT,
            help="Prompt tokens read in one pass.",
            show_default="measured once; 512 for short prompts",
        ),
    ] = None
    sparse_prefill: SparseMode = "off"
    sparse_prefill_config: SparseConfig = None
    sparse_prefill_min_context: SparseMinContext = 32768
    sparse_prefill_tau: SparseTau = 0.9

    def tree(self) -> TreeShape | None:
        """The tree asked for, None where no option says anything; raises OptionError."""
        from mlx_redrafter.tree.shape import DEFAULT, TreeShape

        asked: dict[str, Any] = {
            "width": self.beam_width,
            "depth": self.beam_length,
            "nodes": self.nodes,
            "mode": self.candidates,
            "lookup": self.lookup,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        if not given:
            return None
        # A narrower or shorter tree than the default one holds fewer nodes.
        width, depth = given.get("width", DEFAULT.width), given.get("depth", DEFAULT.depth)
        lookup = given.setdefault("lookup", DEFAULT.lookup)
        given.setdefault("nodes", max(1, min(DEFAULT.nodes, 1 + width * depth + lookup)))
        return TreeShape(**given)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `stream_generate`; raises OptionError."""
        own = ["system_prompt", "beam_width", "beam_length", "nodes", "candidates", "lookup"]
        own += [f"sparse_prefill_{name}" for name in ("config", "min_context", "tau")]
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in own:
            del given[name]
        given["logit_bias"] = parse_logit_bias(self.logit_bias)
        given["stop"] = tuple(self.stop or ())
        given["tree"] = self.tree()
        given["sparse_prefill"] = self.sparse()
        return given

    def sparse(self) -> SparsePrefill | None:
        """How a long prompt is read, None where it is read densely; raises OptionError."""
        return sparse_prefill(
            self.sparse_prefill,
            self.sparse_prefill_config,
            self.sparse_prefill_min_context,
            self.sparse_prefill_tau,
        )

    def check(self) -> None:
        """Refuse impossible values before a model is loaded; raises OptionError."""
        from mlx_redrafter.decoding.request import length
        from mlx_redrafter.decoding.sampling import SamplingParams

        given = self.arguments()
        known = {f.name for f in dataclasses.fields(SamplingParams)}
        SamplingParams(**{name: value for name, value in given.items() if name in known})
        length(given["max_tokens"])
        if given["prefill_step_size"] is not None:
            checks.whole("prefill_step_size", given["prefill_step_size"], 1)


def sparse_prefill(
    mode: Any, config: str | None, min_context: int, tau: float
) -> SparsePrefill | None:
    """The four options as one, None where a prompt is read densely; raises OptionError."""
    from mlx_redrafter.prefill.config import SparsePrefill, read_patterns

    if config is not None and mode != "minference":
        raise OptionError(
            "--sparse-prefill-config needs --sparse-prefill minference, which it configures"
        )
    patterns = read_patterns(config) if config is not None else None
    chosen = SparsePrefill(mode, tau=tau, min_context=min_context, patterns=patterns)
    return chosen if chosen.mode != "off" else None


def parse_logit_bias(items: Sequence[str] | None) -> dict[int, float]:
    """["42=-5", ...] -> {42: -5.0, ...}; raises OptionError."""
    bias: dict[int, float] = {}
    for item in items or ():
        token, _, value = item.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise OptionError(
                f"--logit-bias {item}: needs TOKEN_ID=VALUE, for example --logit-bias 42=-5"
            ) from None
    return bias


def flat_options(command: Callable[..., T]) -> Callable[..., T]:
    """Show typer one option for every field of the dataclasses that `command` takes."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            parameters.append(parameter)
            continue
        group: Any = parameter.annotation
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in dataclasses.fields(group)
        ]

    def flat(**given: Any) -> T:
        for name, group in groups.items():
            own = {field.name: given.pop(field.name) for field in dataclasses.fields(group)}
            given[name] = group(**own)
        return command(**given)

    ordered = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    flat.__name__, flat.__doc__ = command.__name__, command.__doc__
    flat.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in ordered}
    return flat
