"""The options that commands share, declared once and handed around as dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime import checks
from mlx_redrafter.runtime.checks import checked_text
from mlx_redrafter.runtime.paths import BUILTIN, expanded
from mlx_redrafter.terminal import console

if TYPE_CHECKING:
    from mlx_redrafter.distributed.cluster import Cluster
    from mlx_redrafter.distributed.split import Split
    from mlx_redrafter.prefill.config import SparsePrefill
    from mlx_redrafter.tree.shape import TreeShape

SAMPLING, DRAFTING, PROMPT = "Sampling", "Drafting", "Long prompts"
MAX_TOKENS, THINKING_TOKENS = 512, 4096  # longest answers, where no option says so


ModelName = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Built-in name, local folder or Hugging Face id (org/name)."
    ),
]
DrafterName = Annotated[
    str,
    typer.Option(
        "--drafter",
        "-d",
        help="Folder or Hugging Face id of a drafter; 'auto' finds the model's own.",
    ),
]

ModelArgument = Annotated[
    str, typer.Argument(help="Built-in name, local folder or Hugging Face id (org/name).")
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        callback=expanded,
        help='Prompts to measure with: jsonl with "prompt" and "category".',
        show_default="92 built-in",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no statistics on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print all statistics on stderr.")]

SparseMode = Annotated[
    Literal["off", "trianglemix", "xattention", "minference"],
    typer.Option(
        rich_help_panel=PROMPT,
        metavar="MODE",
        help="Read sparsely: trianglemix, xattention or minference; may change the answer.",
    ),
]
SparseConfig = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=PROMPT,
        metavar="PATH",
        help="Patterns of the heads for minference (JSON).",
    ),
]
SparseMinContext = Annotated[
    int, typer.Option(rich_help_panel=PROMPT, help="Read this many tokens densely first.")
]
SparseTau = Annotated[
    float,
    typer.Option(rich_help_panel=PROMPT, help="Share of attention xattention keeps."),
]
Context = Annotated[
    int, typer.Option(rich_help_panel=SAMPLING, help="How many of the last tokens to consider.")
]
KVBits = Annotated[
    int | None,
    typer.Option(
        show_default="off",
        help="Keep keys and values in 8 or 4 bits, from the first token on; may change the answer.",
    ),
]
KVGroupSize = Annotated[int, typer.Option(help="Numbers to a scale: 32, 64 or 128.")]
Exact = Annotated[
    bool, typer.Option("--exact", help="Drafts change no bit on Metal either; slower.")
]


def penalty(text: str) -> Any:
    """A penalty that is off where it is not given."""
    return typer.Option(rich_help_panel=SAMPLING, show_default="off", help=text)


@dataclass(frozen=True)
class ModelOptions:
    """Which model and drafter to load."""

    model: ModelName = BUILTIN
    drafter: DrafterName = "auto"
    no_draft: Annotated[
        bool, typer.Option("--no-draft", help="Decode plainly, without any drafting.")
    ] = False
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch, tag or commit of a Hugging Face id."),
    ] = None

    kv_bits: KVBits = None
    kv_group_size: KVGroupSize = 64
    exact: Exact = False

    def load(
        self, tree: TreeShape | None = None, there: tuple[Cluster, Split] | None = None
    ) -> tuple[Any, Any]:
        """(model, tokenizer) of `mlx_redrafter.load`; raises its errors.

        Without a tree to decode with, what drafting costs here is known afterwards. there: the
        machines that share the model, and how.
        """
        from mlx_redrafter.api import load

        drafter = None if self.no_draft else self.drafter
        given: dict[str, Any] = {
            "revision": self.revision,
            "kv_bits": self.kv_bits,
            "kv_group_size": self.kv_group_size,
            "exact": self.exact,
        }
        if there is not None:
            from mlx_redrafter.distributed import lead

            model, tokenizer = lead.load(there[0], self.model, drafter, there[1], **given)
        else:
            model, tokenizer = load(self.model, drafter, **given)
        model.engine.say = console.note
        if drafter is not None and tree is None:
            model.budget.costs()
        return model, tokenizer


@dataclass(frozen=True)
class DecodeOptions:
    """How to continue the prompt: everything that `stream_generate` takes beside the prompt."""

    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest answer, in tokens; -1: no limit.",
            show_default="512; up to 4096 if it thinks",
        ),
    ] = None
    temp: Annotated[float, typer.Option(help="0 takes the likeliest token; more varies.")] = 0.0
    system_prompt: Annotated[
        str | None, typer.Option(help="Instructions that come before the question.")
    ] = None
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Think first, or not.",
            show_default="as the template has it",
        ),
    ] = None
    chat_template_config: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Variables for the chat template.",
        ),
    ] = None
    seed: Annotated[
        int,
        typer.Option(rich_help_panel=SAMPLING, help="Same seed, same text, drafted or not."),
    ] = 0
    top_p: Annotated[
        float,
        typer.Option(rich_help_panel=SAMPLING, help="Keep the likeliest up to a share; 0: off."),
    ] = 0.0
    top_k: Annotated[
        int,
        typer.Option(rich_help_panel=SAMPLING, help="Keep this many of the likeliest; 0: off."),
    ] = 0
    min_p: Annotated[
        float,
        typer.Option(
            rich_help_panel=SAMPLING,
            help="Drop what is under this share of the top.",
        ),
    ] = 0.0
    stop: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=SAMPLING, help="Text that ends the answer; repeatable."),
    ] = None
    repetition_penalty: Annotated[
        float | None, penalty("Make used tokens less likely; 1 is off.")
    ] = None
    repetition_context_size: Context = 20
    presence_penalty: Annotated[float | None, penalty("Subtracted from logits of used tokens.")] = (
        None
    )
    presence_context_size: Context = 20
    frequency_penalty: Annotated[
        float | None, penalty("Subtracted from a logit for every use.")
    ] = None
    frequency_context_size: Context = 20
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=SAMPLING,
            metavar="ID=VALUE",
            help="Added to the logit of a token; repeatable.",
        ),
    ] = None
    beam_width: Annotated[
        int | None,
        typer.Option(rich_help_panel=DRAFTING, help="Branches of the drafted tree; 1: a chain."),
    ] = None
    beam_length: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=DRAFTING,
            help="Drafted tokens on a branch.",
        ),
    ] = None
    nodes: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=DRAFTING,
            help="Tokens checked in one pass, the root too.",
        ),
    ] = None
    lookup: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=DRAFTING,
            help="Tokens to draft where text repeats; 0: off.",
        ),
    ] = None
    prefill_step_size: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=PROMPT,
            help="Prompt tokens to read in one pass.",
            show_default="measured",
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
        own = ["system_prompt", "thinking", "chat_template_config"]
        own += ["beam_width", "beam_length", "nodes", "lookup"]
        own += [f"sparse_prefill_{name}" for name in ("config", "min_context", "tau")]
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in own:
            del given[name]
        given["max_tokens"] = MAX_TOKENS if self.max_tokens is None else self.max_tokens
        given["logit_bias"] = parse_logit_bias(self.logit_bias)
        given["stop"] = tuple(self.stop or ())
        given["tree"] = self.tree()
        given["sparse_prefill"] = self.sparse()
        return given

    def template_config(self, tokenizer: Any) -> dict[str, Any]:
        """The variables of the chat template; raises OptionError."""
        from mlx_redrafter.text.template import parse_config, thinking_switch

        config = parse_config(self.chat_template_config)
        if self.thinking is None:
            return config
        return {**config, **thinking_switch(tokenizer, self.thinking, config)}

    def for_model(self, tokenizer: Any, context: int) -> DecodeOptions:
        """With a longest answer that fits a model: one that thinks first needs more room.

        Raises OptionError where the template lacks what the options ask of it.
        """
        from mlx_redrafter.text.template import thinks

        config = self.template_config(tokenizer)
        if self.max_tokens is not None:
            return self
        longest = MAX_TOKENS
        if thinks(tokenizer, config):
            longest = max(longest, min(THINKING_TOKENS, context // 2))
        return dataclasses.replace(self, max_tokens=longest)

    def sparse(self) -> SparsePrefill | None:
        """How a long prompt is read, None where it is read densely; raises OptionError."""
        return sparse_prefill(
            self.sparse_prefill,
            self.sparse_prefill_config,
            self.sparse_prefill_min_context,
            self.sparse_prefill_tau,
        )

    def check(self, raw: bool = False) -> None:
        """Refuse impossible values before a model is loaded; raises OptionError.

        ``raw``: the prompt is not put into a chat template.
        """
        from mlx_redrafter.decoding.request import length
        from mlx_redrafter.decoding.sampling import SamplingParams
        from mlx_redrafter.text.template import parse_config

        config = parse_config(self.chat_template_config)
        if raw and (self.system_prompt or self.thinking is not None or config):
            raise OptionError(
                "--raw uses no chat template: leave out --system-prompt, --thinking, --no-thinking "
                "and --chat-template-config"
            )
        given = self.arguments()
        known = {f.name for f in dataclasses.fields(SamplingParams)}
        SamplingParams(**{name: value for name, value in given.items() if name in known})
        length(given["max_tokens"])
        checks.at_least(1, prefill_step_size=self.prefill_step_size)
        checked_text(self.system_prompt or "", "system prompt")
        checked_text("".join(self.stop or ()), "stop text")


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
