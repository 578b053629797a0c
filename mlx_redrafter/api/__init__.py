"""The Python API: load a model with its drafter, and generate text. Names follow mlx_lm."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter import arguments
from mlx_redrafter.api.parts import parts_of
from mlx_redrafter.budget.company import Company
from mlx_redrafter.budget.machine import Budget
from mlx_redrafter.cache.packed import GROUP
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.batch import Batch
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.grammar import Grammar
from mlx_redrafter.decoding.policy import Policy
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.drafters.lookup import Lookup
from mlx_redrafter.models import Loaded
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.reading import Progress
from mlx_redrafter.runtime import checks, threads
from mlx_redrafter.runtime.paths import BUILTIN
from mlx_redrafter.text.answer import Answer, GenerationResponse
from mlx_redrafter.text.grammar import Grammars
from mlx_redrafter.tree.shape import TreeShape

USUAL_LENGTH = 256  # tokens of an answer where nobody says it, as in mlx_lm


@dataclass(frozen=True)
class Model:
    """A target model, what drafts for it, and the engine that runs both.

    ``drafter`` is the trained one, or None; the text itself drafts in any case: ``engine.drafters``
    has all that draft. ``drafting`` tells whether `stream_generate` drafts unless it is told so or
    not: False where the model was loaded for plain decoding. ``budget`` knows what pays here.
    ``batch`` makes what runs several answers, if it is another than `Batch`.
    """

    name: str
    folder: Path
    target: Loaded
    drafter: Drafter | None
    drafter_folder: Path | None
    engine: Engine
    budget: Budget
    drafting: bool = True
    batch: Callable[[Engine, Company], Batch] | None = None
    _grammars: WeakKeyDictionary[Any, Grammars] = field(
        default_factory=WeakKeyDictionary, repr=False, compare=False
    )

    def grammars(self, tokenizer: Any) -> Grammars:
        """What makes grammars over a tokenizer's tokens; the first time it takes a moment.

        Raises:
            OptionError: llguidance is not there, or cannot read this tokenizer.
        """
        inner = getattr(tokenizer, "_tokenizer", tokenizer)
        if inner not in self._grammars:
            self._grammars[inner] = Grammars(tokenizer, self.target.config.vocab_size)
        return self._grammars[inner]

    @classmethod
    def of(
        cls,
        name: str,
        folder: Path,
        target: Loaded,
        drafter: Drafter | None = None,
        drafter_folder: Path | None = None,
        *,
        drafting: bool = True,
        compiled: bool = True,
    ) -> Model:
        """Put together of loaded parts."""
        engine = Engine(target, all_drafters(drafter), compiled)
        budget = Budget(engine, target, folder, drafter_folder)
        return cls(name, folder, target, drafter, drafter_folder, engine, budget, drafting)


def all_drafters(drafter: Drafter | None) -> list[Drafter]:
    """The text itself, and the trained one."""
    return [Lookup()] if drafter is None else [Lookup(), drafter]


def load(
    path_or_hf_repo: str | os.PathLike[str] = BUILTIN,
    drafter: str | os.PathLike[str] | None = "auto",
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = GROUP,
    exact: bool = False,
    **other: Any,
) -> tuple[Model, TokenizerWrapper]:
    """Load a model, its tokenizer and its drafter.

    Args:
        path_or_hf_repo: the built-in name, a local folder, or a hub id.
        drafter: ``auto`` takes the one that is shipped with or beside the model, if any (without
            one, drafts come from the text alone); a folder or hub id; None for plain decoding.
        revision: branch, tag or commit of a hub id.
        dtype: type of the weights; None: float32 on a CPU, as stored on Metal.
        tokenizer_config: options for transformers' tokenizer, as in mlx_lm.
        kv_bits: keep keys and values in 8 or 4 bits, from the first token on (mlx_lm's
            ``quantized_kv_start`` is 0 here); None: as they are computed.
        kv_group_size: how many of their numbers share a scale: 32, 64 or 128.
        exact: on Metal, multiply few rows in the order of a single one, so that the text of a
            drafted chain is plain text in 4 and 8 bits too; slower. On a CPU it is in any case.

    A model that one thread has loaded may be used in another. Options of mlx_lm's ``load`` that
    say nothing (None, False) are let through.

    Raises:
        HubError, ModelError, DrafterError, OptionError: with what was given and what is needed.
    """
    arguments.refuse(other, load)
    parts = parts_of(
        path_or_hf_repo, drafter, revision=revision, dtype=dtype, tokenizer_config=tokenizer_config,
        kv_bits=kv_bits, kv_group_size=kv_group_size, exact=exact,
    )  # fmt: skip
    model = Model.of(
        parts.name, parts.folder, parts.target, parts.drafter, parts.drafter_folder,
        drafting=parts.drafting, compiled=parts.compiled,
    )  # fmt: skip
    return model, parts.tokenizer


def stream_generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int | None = None,
    *,
    draft: bool | None = None,
    tree: TreeShape | None = None,
    stop: str | Sequence[str] | None = None,
    stop_tokens: Sequence[int] | None = None,
    session: Session | None = None,
    prefill_step_size: int | None = None,
    prompt_progress_callback: Progress | None = None,
    sparse_prefill: SparsePrefill | None = None,
    prediction: str | Sequence[int] | None = None,
    json_schema: dict[str, Any] | str | None = None,
    regex: str | None = None,
    grammar: str | Grammar | None = None,
    margins: bool = False,
    trees: bool = False,
    **sampling: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generate an answer, one response per token.

    Args:
        prompt: text (no template is applied) or token ids, in a list or a 1-D array.
        max_tokens: at most this many tokens, fewer where the context ends; None: 256; -1: no limit.
        draft: False decodes plainly, through the same code; the tokens are the same. True drafts
            from what there is: the drafter and the text itself. None: as the model was loaded.
        tree: how much to draft; None: chosen for every step by what pays on this machine and on
            this text (the first time it is measured, which takes a few seconds).
        stop: strings that end the answer; neither they nor what follows is emitted.
        stop_tokens: token ids that end the answer besides the model's own.
        session: keeps the KV cache for the next request; what follows a stop is not left in it.
        prefill_step_size: prompt tokens read in one pass; None: for a long prompt what is fastest
            on this machine (the first time it is measured, which takes a few seconds).
        prompt_progress_callback: called with (tokens read, tokens in the prompt).
        sparse_prefill: read a long prompt with sparse attention; the answer may then be another,
            drafted or not the same.
        prediction: what the answer may be, text or token ids, to draft from; it changes no answer.
        json_schema: the answer is JSON that is valid by this schema, a dict or its text.
        regex: the answer as a whole matches this expression.
        grammar: the answer follows this grammar, as text in llguidance's Lark or llama.cpp's GBNF.
            At most one of these three; drafted or not the text is the same.
        margins: count the tokens that rounding may have chosen, in ``stats.near_ties``: where
            drafted and plain text may part if `Engine.same_bits` is False.
        trees: give every step's draft tree, to look at: ``response.tree`` of its first token.
        sampling: see :class:`SamplingParams`: temp, top_p, top_k, min_p, penalties, seed, ...

    None stands for the default everywhere. Closing the generator, or dropping it, ends the answer
    between two steps; the session then holds what was given out.

    Any thread may generate, with a model from another thread too, and the next response may be
    asked for in another one. MLX wants the streams of a thread cleared when it ends, or the process
    aborts at exit: that is taken care of here. A thread that computes with MLX outside of this
    package has to call ``mx.clear_streams()`` as its last act. Let one answer end before the next
    one begins: answers of several threads at once are right but compete for the same device.

    Raises:
        OptionError: an unknown or impossible option, an empty prompt, a prompt beyond the context,
            a session in use or of another model, a grammar that is not possible; all at the call,
            before anything is computed (of two answers begun with one session, the second one's
            first response raises it).
    """
    given = dict(
        draft=draft, tree=tree, stop=stop, stop_tokens=stop_tokens, session=session,
        prefill_step_size=prefill_step_size, prompt_progress_callback=prompt_progress_callback,
        sparse_prefill=sparse_prefill, prediction=prediction, json_schema=json_schema, regex=regex,
        grammar=grammar, margins=margins, trees=trees, **sampling,
    )  # fmt: skip
    return _responses(checked(model, tokenizer, prompt, max_tokens, **given))


@dataclass(frozen=True)
class Asked:
    """A request that was found possible. What the budget chooses, and may have to measure first,
    is not chosen yet: the trees, unless the shape is ``fixed``, and ``step_size``, unless given.
    ``begin`` makes what turns its tokens into text."""

    model: Model
    request: Request
    fixed: bool
    step_size: int | None
    begin: Callable[[], Answer]

    def chosen(self) -> Chosen:
        """With everything chosen."""
        request, budget = self.request, self.model.budget
        shape: TreeShape | Policy = request.shape
        if not self.fixed:
            shape = budget.policy(sampled=request.sampling.temp > 0)
        step_size, sparse = self.step_size, request.sparse_prefill
        if step_size is None:
            tag = sparse.tag if sparse is not None else ""
            cached = request.session.shared(request.prompt, tag)
            step_size = budget.step_size(len(request.prompt), cached)
        answer = self.begin()
        stats = answer.stats
        return Chosen(replace(request, shape=shape, step_size=step_size, stats=stats), answer)


class Chosen(NamedTuple):
    """What an engine is asked, and what its tokens are given to."""

    request: Request
    answer: Answer


def checked(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int | None = None,
    *,
    draft: bool | None = None,
    tree: TreeShape | None = None,
    stop: str | Sequence[str] | None = None,
    stop_tokens: Sequence[int] | None = None,
    session: Session | None = None,
    prefill_step_size: int | None = None,
    prompt_progress_callback: Progress | None = None,
    sparse_prefill: SparsePrefill | None = None,
    prediction: str | Sequence[int] | None = None,
    json_schema: dict[str, Any] | str | None = None,
    regex: str | None = None,
    grammar: str | Grammar | None = None,
    margins: bool = False,
    trees: bool = False,
    **sampling: Any,
) -> Asked:
    """The arguments of `stream_generate`, found possible; raises OptionError as it does."""
    tokenizer = arguments.pair(model, tokenizer, Model)
    params = arguments.sampling(sampling, stream_generate)
    arguments.instance("tree", tree, TreeShape, "a TreeShape, TreeShape.chain(4) for example")
    arguments.instance("session", session, Session, "a Session()")
    arguments.instance("sparse_prefill", sparse_prefill, SparsePrefill, "a SparsePrefill(mode)")
    arguments.function("prompt_progress_callback", prompt_progress_callback)
    if prefill_step_size is not None:
        prefill_step_size = checks.whole("prefill_step_size", prefill_step_size, 1)
    config = model.target.config
    if sparse_prefill is not None:
        sparse_prefill.check_model(config.num_layers, config.num_heads)
    stops = arguments.stops(stop)
    end_tokens = {*tokenizer.eos_token_ids, *arguments.stop_tokens(stop_tokens, config.vocab_size)}
    ids = arguments.prompt_ids(tokenizer, prompt)
    room = max(0, config.max_positions - len(ids))
    predicted = arguments.prediction(tokenizer, prediction, config.vocab_size)[:room]
    plain = not (model.drafting if draft is None else draft)
    asked = Request(
        ids, params, TreeShape.plain() if plain else tree or TreeShape(),
        USUAL_LENGTH if max_tokens is None else max_tokens,
        session if session is not None else Session(),
        progress=prompt_progress_callback, sparse_prefill=sparse_prefill,
        prediction=() if plain else predicted, margins=bool(margins), trees=bool(trees),
        grammar=arguments.grammar(model, tokenizer, json_schema, regex, grammar),
    )  # fmt: skip
    answer = partial(Answer, tokenizer, len(ids), stops, end_tokens, asked.room(config))
    asked.session.check(model.target)
    return Asked(model, asked, plain or tree is not None, prefill_step_size, answer)


def _responses(asked: Asked) -> Generator[GenerationResponse, None, None]:
    """The answer to a request."""
    threads.clear_at_end()
    model, session = asked.model, asked.request.session
    request, answer = asked.chosen()
    steps = model.engine.generate(request)
    with wired(model.target):
        try:
            for emitted in steps:
                threads.clear_at_end()  # the caller may go on in another thread
                for token, from_draft, tree in emitted.each():
                    yield (response := answer.add(token, from_draft, tree))
                    if response.finish_reason is not None:
                        return
        finally:
            steps.close()
            if answer.count:
                session.trim(answer.kept)


def generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | mx.array,
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """The whole answer as text. ``verbose`` prints it as it comes, and the statistics.

    Other arguments and errors: see :func:`stream_generate`.
    """
    arguments.instance("verbose", verbose, int, "True or False")
    pieces = []
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        pieces.append(response.text)
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print(
            f"\n\nPrompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s\n"
            f"Answer: {response.generation_tokens} tokens, {response.generation_tps:.1f} tokens/s, "
            f"{response.stats.tokens_per_step:.2f} tokens per step\n"
            f"Peak memory: {response.peak_memory:.2f} GB"
        )
    return "".join(pieces)


@contextlib.contextmanager
def wired(target: Loaded) -> Iterator[None]:
    """On Metal keep the weights resident while generating, as mlx_lm does."""
    if not mx.metal.is_available():
        yield
        return
    from mlx_lm.generate import wired_limit

    with contextlib.ExitStack() as stack:
        # It prints when a model is nearly too large, and stdout is the answer's.
        with contextlib.redirect_stdout(sys.stderr):
            stack.enter_context(wired_limit(target))
        yield
