"""Which attention reads a long prompt: the options, and MInference's pattern files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime import checks
from mlx_redrafter.runtime.paths import user_path

Mode = Literal["off", "a_shape", "tri_shape", "trianglemix", "xattention", "minference"]
Kind = Literal["vertical_and_slash", "stream_llm", "block_sparse"]


@dataclass(frozen=True)
class HeadPattern:
    """What one query head looks at.

    ``vertical`` columns and ``slash`` distances (diagonals); of stream_llm the first tokens and the
    local window; of block_sparse ``vertical`` blocks of 64 tokens, at most 100.
    """

    kind: Kind = "vertical_and_slash"
    vertical: int = 1000
    slash: int = 6096


Patterns = tuple[Mapping[int, HeadPattern], ...]
"""By layer and query head; a head that is missing has the default."""


@dataclass(frozen=True)
class SparsePrefill:
    """How the attention of a long prompt is thinned out; all lengths are in tokens.

    Args:
        mode: off; static: a_shape, tri_shape, trianglemix; found in the prompt: xattention,
            minference.
        tau: share of a query block's attention that xattention's blocks must hold; 1 is dense.
        stride: of xattention's antidiagonals.
        block: queries, and keys, that are taken together.
        min_context: what is before this position is read densely.
        dense_tail: the last tokens of the prompt are read densely (not with a_shape).
        sink, local: the first keys and those before a query block that are always looked at.
        start_layer: layers below are dense; None: half of them for trianglemix and xattention (in
            the lower half blocks of keys hold too little, docs/decisions.md), none for others.
        max_density: a layer whose selection scores a larger share of the pairs reads the chunk
            densely, as it would not pay.
        over: what becomes of xattention's blocks beyond that: ``dense``, or ``cap`` for as many as
            fit, which hold less than tau.
        last_queries: of a chunk, by which minference chooses.
        patterns: of minference, as `read_patterns` gives them; None: the default for every head.

    Raises:
        OptionError: with what was given and what is needed.
    """

    mode: Mode = "off"
    tau: float = 0.9
    stride: int = 16
    block: int = 128
    min_context: int = 32768
    dense_tail: int = 128
    sink: int = 128
    local: int = 512
    start_layer: int | None = None
    max_density: float = 0.5
    over: Literal["dense", "cap"] = "dense"
    last_queries: int = 64
    patterns: Patterns | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        def need(name: str, what: str, fine: Callable[[Any], bool]) -> None:
            given = getattr(self, name)
            try:
                possible = not isinstance(given, bool) and fine(given)
            except TypeError:  # of another type
                possible = False
            if not possible:
                raise OptionError(
                    f"sparse prefill: {name} {checks.shown(given)} is not possible: use {what}"
                )

        share = "a number above 0 and at most 1"
        need("mode", ", ".join(get_args(Mode)), lambda mode: mode in get_args(Mode))
        need("tau", share, lambda tau: 0 < tau <= 1)
        need("block", "a divisor of 128", lambda block: block > 0 and 128 % block == 0)
        fits = f"a divisor of the block, {self.block}"
        need("stride", fits, lambda stride: stride > 0 and self.block % stride == 0)
        for name in ("min_context", "dense_tail", "sink", "local"):
            need(name, "0 or more", lambda length: length >= 0)
        need("start_layer", "0 or more", lambda layer: layer is None or layer >= 0)
        need("max_density", share, lambda density: 0 < density <= 1)
        need("over", "dense or cap", lambda over: over in ("dense", "cap"))
        need("last_queries", "1 or more", lambda queries: queries > 0)
        if self.patterns is not None and self.mode != "minference":
            raise OptionError(
                f"sparse prefill: patterns are for mode minference, and the mode is {self.mode}"
            )

    @property
    def sink_blocks(self) -> int:
        return -(-self.sink // self.block)

    @property
    def local_blocks(self) -> int:
        return -(-self.local // self.block)

    @property
    def tail(self) -> int:
        """Tokens at the end of the prompt that are read densely."""
        return 0 if self.mode == "a_shape" else self.dense_tail

    @property
    def tag(self) -> str:
        """Mode and a short hash of everything that decides what a cache holds; off: empty."""
        if self.mode == "off":
            return ""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.patterns is not None:
            values["patterns"] = as_lists(self.patterns)
        text = json.dumps(values, sort_keys=True)
        return f"{self.mode}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def first_layer(self, layers: int) -> int:
        """The first layer that may be sparse, of so many."""
        if self.start_layer is not None:
            return self.start_layer
        return layers // 2 if self.mode in ("trianglemix", "xattention") else 0

    def head_patterns(self, layer: int, heads: int) -> list[HeadPattern]:
        """The pattern of every query head of a layer."""
        given = self.patterns[layer] if self.patterns is not None else {}
        return [given.get(head, HeadPattern()) for head in range(heads)]

    def check_model(self, layers: int, heads: int) -> None:
        """Refuse patterns of another model; raises OptionError."""
        if self.patterns is not None:
            _check_sizes(self.patterns, "the pattern file", layers, heads)


def read_patterns(
    path: Path | str, layers: int | None = None, heads: int | None = None
) -> Patterns:
    """MInference's published JSON, unchanged: per layer {"head": [type, vertical, slash, score]}.

    The score is ignored. With the numbers of the model, the file must fit them.

    Raises:
        OptionError: a file that cannot be read, or is not such a file, or is of another model.
    """
    file = user_path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} is not JSON ({error}); give a pattern file") from None
    if not isinstance(data, list) or not all(isinstance(layer, dict) for layer in data):
        raise OptionError(
            f"{path} is not a pattern file; needed: a list over layers of "
            '{"head": [type, vertical, slash, score]}'
        )
    patterns = tuple(
        {_number(head, path): _pattern(value, f"{path}, layer {at}, head {head}")
         for head, value in layer.items()}
        for at, layer in enumerate(data)
    )  # fmt: skip
    _check_sizes(patterns, str(path), layers, heads)
    return patterns


def write_patterns(
    path: Path | str,
    patterns: Sequence[Mapping[int, HeadPattern]],
    scores: Sequence[Mapping[int, float]] | None = None,
) -> None:
    """The same format; ``scores`` by layer and head, 1.0 where there is none."""
    Path(path).write_text(json.dumps(as_lists(patterns, scores)) + "\n")


def as_lists(
    patterns: Sequence[Mapping[int, HeadPattern]],
    scores: Sequence[Mapping[int, float]] | None = None,
) -> list[dict[str, list[Any]]]:
    """As in the file."""
    return [
        {
            str(head): [
                p.kind,
                p.vertical,
                p.slash,
                scores[layer].get(head, 1.0) if scores else 1.0,
            ]
            for head, p in sorted(by_head.items())
        }
        for layer, by_head in enumerate(patterns)
    ]


def _number(head: str, path: Path | str) -> int:
    if not head.isdecimal():
        raise OptionError(f"{path} has a head named {head!r}; needed: a number")
    return int(head)


def _pattern(value: Any, where: str) -> HeadPattern:
    kind, *sizes = value if isinstance(value, list) else [None]
    whole = [n for n in sizes[:2] if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
    if kind not in get_args(Kind) or len(whole) < 2:
        raise OptionError(
            f"{where}: {json.dumps(value)} is not possible; needed: [type, vertical, slash, "
            f"score] with a type of {', '.join(get_args(Kind))}"
        )
    return HeadPattern(cast(Kind, kind), *whole)


def _check_sizes(patterns: Patterns, name: str, layers: int | None, heads: int | None) -> None:
    if layers is not None and len(patterns) != layers:
        raise OptionError(
            f"{name} has {len(patterns)} layers and the model {layers}: use the file of this model"
        )
    highest = max((head for layer in patterns for head in layer), default=0)
    if heads is not None and highest >= heads:
        raise OptionError(
            f"{name} names head {highest}, and the model has only {heads} query heads per layer: "
            "use the file of this model"
        )
