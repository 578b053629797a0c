"""The fields that requests of every dialect may have, and what the engine makes of them."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mlx_redrafter import arguments
from mlx_redrafter.decoding.grammar import Grammar
from mlx_redrafter.decoding.request import length
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.server.engine import Engine
from mlx_redrafter.server.problems import Problem, invalid, of_option
from mlx_redrafter.server.reader import Reading
from mlx_redrafter.server.requests import Generation
from mlx_redrafter.server.settings import Settings
from mlx_redrafter.tree.shape import DEFAULT, TreeShape

MOST_STOPS, MOST_CHOICES = 16, 8
B = TypeVar("B", bound="Body")


class Body(BaseModel):
    """A JSON object; fields that nobody knows are let through, None is as absent."""

    model_config = ConfigDict(extra="ignore", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_none(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: value for name, value in given.items() if value is not None}


class Extra(Body):
    """Options of ours, in ``x_redrafter``."""

    draft: bool | None = None
    tokens: bool = False
    trees: bool = False
    alone: bool = False
    tree: str | None = None
    lookup: int | None = None
    sparse_prefill: Literal["off", "trianglemix", "xattention", "minference"] | None = None
    sparse_prefill_min_context: int | None = None


class Options(Body):
    """How to draw, and how to draft."""

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    repetition_context_size: int | None = None
    presence_penalty: float | None = None
    presence_context_size: int | None = None
    frequency_penalty: float | None = None
    frequency_context_size: int | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    num_draft_tokens: int | None = None
    cache_prompt: bool = True
    x_redrafter: Extra = Extra()
    length_field: ClassVar[str] = "max_tokens"  # its name in the dialect

    @property
    def predicted(self) -> str:
        """What the answer may be, in the dialect that has it; raises Problem."""
        return ""

    @property
    def longest(self) -> int | None:
        """Tokens of the answer, as the request has it."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer


def parse(kind: type[B], body: Any) -> B:
    """A body of that kind; raises Problem, which names the field."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        # Below a union pydantic names the branch: the field itself is what a client knows.
        names = [str(part) for part in first["loc"][:1]]
        names += [str(part) for part in first["loc"][1:] if isinstance(part, int)][:1]
        place = names[0] + "".join(f"[{index}]" for index in names[1:]) if names else None
        text = first["msg"][:1].lower() + first["msg"][1:]
        raise invalid(f"{place or 'the body'}: {text}", place) from None


def sampling(
    options: Options, settings: Settings, engine: Engine, ahead: int = 0
) -> SamplingParams:
    """How the tokens are drawn: as the request says, else the server's options, else the model's
    files. ``ahead`` is the number of the answer among those to one prompt. Raises Problem."""
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    asked = {name: value for name, value in vars(options).items() if name in known}
    asked["temp"] = options.temperature
    if asked["repetition_penalty"] is None:
        asked["repetition_penalty"] = options.repeat_penalty
    if asked["top_k"] == -1:  # off, in other servers
        asked["top_k"] = 0
    given = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        if name != "seed":
            _checked(name, value, engine)
    seed = options.seed if options.seed not in (None, -1) else secrets.randbits(32)
    given["seed"] = ((seed or 0) + ahead) % 2**32
    return SamplingParams(**{**engine.sampling, **settings.sampling, **given})


def _checked(name: str, value: Any, engine: Engine) -> None:
    field = "temperature" if name == "temp" else name
    try:
        SamplingParams(**{name: value}).check(engine.vocab_size)
    except OptionError as error:
        text = str(error)
        raise of_option(OptionError(field + text[len(name) :]), field) from None


def generation(
    options: Options,
    settings: Settings,
    engine: Engine,
    prompt: list[int],
    reading: Reading | None = None,
    ahead: int = 0,
    grammar: Grammar | None = None,
) -> Generation:
    """An answer for the engine to make. Raises Problem."""
    longest = options.longest if options.longest is not None else settings.max_tokens
    try:
        stops = arguments.stops(options.stop)
    except OptionError as error:
        raise of_option(error, "stop") from None
    if len(stops) > MOST_STOPS:
        raise invalid(f"stop has {len(stops)} texts: give at most {MOST_STOPS}", "stop")
    try:
        most = length(-1 if longest is None else longest)
    except OptionError as error:
        named = str(error).replace("max_tokens", options.length_field, 1)
        raise of_option(OptionError(named), options.length_field) from None
    room = engine.context - len(prompt)
    (draft, tree), extra = _drafting(options, settings), options.x_redrafter
    return Generation(
        prompt=prompt,
        sampling=sampling(options, settings, engine, ahead),
        max_tokens=room if most == -1 else min(most, room),
        stop=stops,
        draft=draft,
        tree=tree,
        prediction=arguments.prediction(engine.tokenizer, options.predicted, engine.vocab_size),
        tokens=extra.tokens or extra.trees,
        trees=extra.trees,
        alone=extra.alone,
        cached=options.cache_prompt,
        sparse_prefill=_sparse(options, settings, engine),
        reading=reading or Reading(),
        grammar=grammar,
    )


def _drafting(options: Options, settings: Settings) -> tuple[bool | None, TreeShape | None]:
    """(draft, tree) of a request; raises Problem."""
    extra, chain = options.x_redrafter, options.num_draft_tokens
    try:
        if chain is not None and extra.tree is None:
            return (False, None) if chain == 0 else (extra.draft, TreeShape.chain(chain))
        tree = settings.tree if extra.tree is None else _tree(extra.tree)
        if extra.lookup is not None:
            shape = tree or DEFAULT
            nodes = max(1, shape.nodes - shape.lookup) + extra.lookup
            tree = TreeShape(shape.width, shape.depth, nodes, shape.mode, extra.lookup)
        return extra.draft, tree
    except OptionError as error:
        place = "x_redrafter" if extra.tree is not None or extra.lookup is not None else None
        raise of_option(error, place or "num_draft_tokens") from None


def _tree(text: str) -> TreeShape:
    """``3x4/8``: beam width, beam length, nodes; ``3x4`` has all nodes."""
    sizes, _, nodes = text.partition("/")
    width, _, depth = sizes.partition("x")
    parts = (width, depth, nodes or "1")
    if not all(part.isascii() and part.isdecimal() and len(part) < 4 for part in parts):
        raise OptionError(f"tree {text[:40]!r} is not possible: give WIDTHxLENGTH/NODES, '3x4/8'")
    all_nodes = 1 + int(width) * int(depth)
    return TreeShape(int(width), int(depth), int(nodes) if nodes else all_nodes)


def _sparse(options: Options, settings: Settings, engine: Engine) -> SparsePrefill | None:
    extra, base = options.x_redrafter, settings.sparse_prefill
    mode, least = extra.sparse_prefill, extra.sparse_prefill_min_context
    if mode == "off" or (mode is None and base is None):
        return None
    own = base or SparsePrefill()
    changes: dict[str, Any] = {} if least is None else {"min_context": least}
    if mode is not None and mode != own.mode:
        changes |= {"mode": mode, "patterns": None}
    try:
        return dataclasses.replace(own, **changes)
    except OptionError as error:
        raise of_option(error, "x_redrafter") from None


def refuse_model(name: str, settings: Settings, engine: Engine) -> None:
    """Where the name of the model counts: raises Problem for another one."""
    if settings.strict_model and name and name != engine.name:
        raise Problem(
            f"there is no model {name[:100]!r} here: use {engine.name!r}",
            status=404, code="model_not_found", param="model",
        )  # fmt: skip
