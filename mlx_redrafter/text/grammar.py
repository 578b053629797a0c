"""What an answer may be: a JSON schema, a regular expression or a grammar, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlx_redrafter.errors import OptionError, one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Source = Mapping[str, Any]
"""A grammar as llguidance reads it, one of those that make a whole."""

# As models were shown JSON; where space is free, a small one never stops writing it.
_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_OBJECT = {"type": "object"}
_SHOWN = 300  # letters of what llguidance says
_GAP = r"/[ \n]{0,4}/"  # between a thought and what follows

_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_WHOLE = 2**53 - 1


def of_schema(schema: Any = None) -> Source:
    """JSON that is valid by a schema, a dict or its text; None: any object. Raises OptionError."""
    given = _ANY_OBJECT if schema is None else schema
    try:
        given = json.loads(given) if isinstance(given, str | bytes) else given
        json.dumps(given).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise OptionError(f"the JSON schema is not JSON ({one_line(error)})") from None
    if not isinstance(given, Mapping):
        raise OptionError('the JSON schema is not an object: give {"type": ...}')
    return {"json_schema": {**_closed(given), "x-guidance": _FORM}}


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same without properties that it does not name, unless it says that there may be some, and
    with whole numbers that every reader of JSON has (RFC 7493), unless it says which: a small model
    would never stop inventing them, or writing zeros. Parts that are put together stay as they
    are."""
    if any(f'"{word}"' in json.dumps(schema) for word in ("allOf", "unevaluatedProperties")):
        return schema

    def closed(part: Any) -> Any:
        if isinstance(part, list):
            return [closed(each) for each in part]
        if not isinstance(part, Mapping):
            return part
        found = {k: v if k in ("const", "enum", "default") else closed(v) for k, v in part.items()}
        if isinstance(part.get("properties"), Mapping) and "patternProperties" not in part:
            found.setdefault("additionalProperties", False)
        if part.get("type") == "integer" and not _BOUNDS & part.keys():
            found.update(minimum=-_WHOLE, maximum=_WHOLE)
        return found

    return dict(closed(schema))


def of_regex(pattern: Any) -> Source:
    """A text that matches as a whole. Raises OptionError."""
    llguidance = _library()
    made = json.loads(llguidance.LLMatcher.grammar_from_regex(_text("regex", pattern)))
    return {"lark_grammar": made["grammars"][0]["lark_grammar"]}


def of_grammar(text: Any) -> Source:
    """A text by a grammar in llguidance's Lark, or llama.cpp's GBNF. Raises OptionError."""
    _library()
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return {"lark_grammar": any_to_lark(_text("grammar", text))}
    except OptionError:
        raise
    except Exception as error:  # the converter raises a type of its own
        raise OptionError(f"the grammar is not possible ({one_line(error)})") from None


def one_of(texts: Sequence[str]) -> Source:
    """One of several texts."""
    return {"lark_grammar": "start: " + " | ".join(map(quoted, texts))}


def quoted(text: str) -> str:
    """A text in a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _text(option: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise OptionError(f"{option} is not possible: give it as text")
    try:
        value.encode()
    except UnicodeError:
        raise OptionError(f"{option} is not valid text: give it in UTF-8") from None
    return value


def one_at_most(json_schema: Any, regex: Any, grammar: Any) -> None:
    """Raise OptionError where several are given."""
    given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise OptionError(f"{' and '.join(named)} cannot be followed at once: give one of them")


def asked(json_schema: Any, regex: Any, grammar: Any) -> Source | None:
    """The one that was given, None if none was; raises OptionError."""
    one_at_most(json_schema, regex, grammar)
    if json_schema is not None:
        return of_schema(json_schema)
    if regex is not None:
        return of_regex(regex)
    return of_grammar(grammar) if grammar is not None else None


class Grammars:
    """Grammars over the tokens of one tokenizer.

    Args:
        tokenizer: as `load` returns it.
        vocab_size: of the model's logits.

    Raises:
        OptionError: llguidance is not there, or cannot read this tokenizer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        inner = getattr(tokenizer, "_tokenizer", tokenizer)
        ends: list[int] = sorted(token for token in tokenizer.eos_token_ids if token < vocab_size)
        if tokenizer.eos_token_id in ends:  # the first is the one that is written
            ends.sort(key=lambda token: token != tokenizer.eos_token_id)
        if not ends:
            raise OptionError(
                "grammars are not possible with a tokenizer that names no end of text"
            )
        self.ends = ends
        self._tokenizer, self._library = _tokens(inner, vocab_size, ends), _library()
        self._inner = inner

    def compiled(
        self, *sources: Source, thought: tuple[str, str] | None = None, opened: bool = False
    ) -> Compiled:
        """A grammar; raises OptionError with what llguidance says.

        Args:
            sources: of several an answer follows one.
            thought: what opens and closes one that may come first; None: none.
            opened: the answer begins within it.
        """
        parts = list(sources)
        if thought is not None or len(sources) > 1:
            start = "start: body\n" if thought is None else self._behind(*thought, opened)
            bodies = " | ".join(f"@body_{i}" for i in range(len(sources)))
            named = [{"name": f"body_{i}", **source} for i, source in enumerate(sources)]
            parts = [{"lark_grammar": f"{start}body: {bodies}\n"}, *named]
        limits = self._library.LLParserLimits(verbose_errors=False)
        matcher = self._library.LLMatcher(
            self._tokenizer, json.dumps({"grammars": parts}), log_level=0, limits=limits
        )
        kind = "JSON schema" if "json_schema" in sources[-1] else "grammar"
        if matcher.is_error():
            text = " ".join(matcher.get_error().split())[:_SHOWN]
            raise OptionError(f"the {kind} is not possible ({text})")
        made = Compiled(matcher, self.ends, self.vocab_size)
        try:
            made.begin()
        except OptionError:
            raise OptionError(f"the {kind} is not possible (no text follows it)") from None
        return made

    def _behind(self, opening: str, closing: str, opened: bool) -> str:
        """A grammar in which a thought comes first."""
        mark, *rest = self.marked(closing).split(" ", 1)
        if mark.startswith("<["):
            within, end = r"/(.|\n)*/", " ".join([mark, *rest])
        else:
            within, end = "within", ""
        thought = f"{within} {end} {_GAP} body"
        start = thought if opened else f"body | {self.marked(opening)} {thought}"
        lazy = "" if end else f"\nwithin[suffix={quoted(closing)}]: /(.|\\n)*/"
        return f"start: {start}{lazy}\n"

    def marked(self, text: str) -> str:
        """A marker in a Lark grammar: special tokens by their numbers, the rest as text."""
        parts, words = [], ""
        for token in self._inner.encode(text, add_special_tokens=False):
            if self._tokenizer.is_special_token(token):
                parts += [quoted(words)] * bool(words) + [f"<[{token}]>"]
                words = ""
            else:
                words += self._inner.decode([token])
        if not parts:
            return quoted(text)
        return " ".join(parts + [quoted(words)] * bool(words))


def _tokens(inner: Any, vocab_size: int, ends: list[int]) -> LLTokenizer:
    _library()
    from llguidance.hf import from_tokenizer

    try:
        size = max(vocab_size, len(inner))
        return from_tokenizer(inner, n_vocab=size, eos_token=ends)
    except Exception as error:
        raise OptionError(
            f"grammars are not possible with this model's tokenizer, which llguidance cannot read "
            f"({one_line(error)}): use a model with a tokenizer.json of bytes or pieces"
        ) from None


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise OptionError(
            "grammars need llguidance: pip install 'mlx-redrafter[grammar]'"
        ) from None
    return llguidance


class Compiled:
    """A `decoding.grammar.Grammar`."""

    def __init__(self, matcher: LLMatcher, ends: Sequence[int], vocab_size: int) -> None:
        self._matcher, self._ends, self._vocab_size = matcher, ends, vocab_size

    def begin(self) -> Standing:
        """For one answer."""
        return Standing(self._matcher.deep_copy(), self._ends, self._vocab_size)


class Standing:
    """A `decoding.grammar.Place`. A token is legal by its bit in the mask: where bytes are certain
    llguidance would take other tokens for them, too.

    Args:
        matcher: llguidance's, for this one alone.
        ends: tokens that end an answer, the usual one first.
        vocab_size: of the model's logits.
    """

    def __init__(self, matcher: LLMatcher, ends: Sequence[int], vocab_size: int) -> None:
        self._matcher, self._ends, self.end = matcher, ends, ends[0]
        self._vocab_size, self.over = vocab_size, False
        self._only_ends = np.zeros(-(-vocab_size // 32), np.uint32)
        self._known = np.full_like(self._only_ends, -1 & 0xFFFFFFFF)
        if vocab_size % 32:  # a tokenizer may have more tokens than the model
            self._known[-1] = (1 << vocab_size % 32) - 1
        for token in ends:
            self._only_ends[token >> 5] |= np.uint32(1 << (token & 31))
        self._mask = self._read(matcher)

    def take(self, tokens: Sequence[int]) -> int:
        """See `Place`."""
        for count, token in enumerate(tokens):
            legal = bool(self._mask[token >> 5] >> (token & 31) & 1)
            if not legal or self.over or self._certain(self._mask) == self.end:
                return count
            self._go(self._matcher, token)
            self.over = token in self._ends
            self._mask = self._read(self._matcher)
        return len(tokens)

    def mask(self) -> npt.NDArray[np.uint32]:
        """See `Place`."""
        return self._mask

    def forced(self, most: int) -> list[int]:
        """See `Place`."""
        found: list[int] = []
        probe, mask = self._matcher, self._mask
        while len(found) < most and not self.over:
            token = self._certain(mask)
            if token is not None:
                found.append(token)
            if token is None or token == self.end:
                break
            if probe is self._matcher:
                probe = probe.deep_copy()
            self._go(probe, token)
            mask = self._read(probe)
        return found

    def _certain(self, mask: npt.NDArray[np.uint32]) -> int | None:
        """The one token that is legal, if there is only one; of ends the usual one."""
        if np.count_nonzero(mask) > len(self._ends):  # words: in haste
            return None
        if not (mask & ~self._only_ends).any():
            return self.end
        places = np.flatnonzero(mask)
        word = int(mask[places[0]])
        if len(places) > 1 or word & (word - 1):
            return None
        return int(places[0]) * 32 + word.bit_length() - 1

    def _read(self, matcher: LLMatcher) -> npt.NDArray[np.uint32]:
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: len(self._known)]
        self._check(matcher)
        return bits & self._known

    def _go(self, matcher: LLMatcher, token: int) -> None:
        matcher.consume_token(token)
        self._check(matcher)

    def _check(self, matcher: LLMatcher) -> None:
        if matcher.is_error():
            text = " ".join(matcher.get_error().split())[:_SHOWN]
            raise OptionError(f"the grammar cannot be followed any further ({text})")
