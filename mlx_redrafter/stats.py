"""What drafting did for one answer: counts, acceptance, and where the time went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class PrefillStats:
    """What sparse prefill did. A layer pass is one layer reading one chunk of the prompt; pairs
    are of a query and a key that dense causal attention would score, over all query heads."""

    mode: str
    chunks: int = 0
    sparse_chunks: int = 0  # with a sparse layer in them
    sparse_layers: int = 0  # layer passes
    declined: Counter[str] = field(default_factory=Counter)  # dense layer passes by reason
    scored_pairs: int = 0  # in the sparse layer passes
    sparse_pairs: int = 0  # that dense attention would have scored in them
    dense_pairs: int = 0  # in the dense layer passes

    @property
    def density(self) -> float:
        """Share of the pairs that the sparse layer passes scored."""
        return self.scored_pairs / self.sparse_pairs if self.sparse_pairs else 1.0

    @property
    def whole_density(self) -> float:
        """Share of the pairs that the whole prefill scored, dense layer passes included."""
        pairs = self.sparse_pairs + self.dense_pairs
        return (self.scored_pairs + self.dense_pairs) / pairs if pairs else 1.0

    def sparse(self, scored: int, pairs: int) -> None:
        """One layer pass over some of the pairs."""
        self.sparse_layers += 1
        self.scored_pairs += scored
        self.sparse_pairs += pairs

    def dense(self, reason: str, pairs: int, layers: int = 1) -> None:
        """Layer passes over all pairs, so many in each."""
        self.declined[reason] += layers
        self.dense_pairs += layers * pairs

    def add(self, other: PrefillStats) -> None:
        """Accumulate another prompt's statistics into this one."""
        for name in ("chunks", "sparse_chunks", "sparse_layers"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("scored_pairs", "sparse_pairs", "dense_pairs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.declined.update(other.declined)
        self.mode = other.mode

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "mode": self.mode,
            "chunks": self.chunks,
            "sparse_chunks": self.sparse_chunks,
            "sparse_layers": self.sparse_layers,
            "declined": dict(self.declined.most_common()),
            "density": round(self.density, 4),
            "whole_density": round(self.whole_density, 4),
        }


_COUNTS = (
    "steps", "drafted_steps", "tokens", "drafted", "accepted", "foretold", "predicted",
    "prefill_tokens",
)  # fmt: skip


@dataclass
class DraftStats:
    """Statistics of one answer; all counts are integers, all times are seconds.

    ``steps`` passes of the target, ``tokens`` they produced, ``drafted`` nodes they checked
    (roots not counted), ``accepted`` drafted tokens that were kept, ``histogram`` steps by the
    number of accepted drafts, ``shapes`` steps by what was drafted, ``shape`` the last of them. A
    step always yields one token more than it accepts: the bonus. ``foretold`` tokens followed the
    ones before them in the prediction that came with the request too, and ``predicted`` of these
    were accepted drafts.
    """

    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    histogram: Counter[int] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    shape: str = ""
    drafted_steps: int = 0
    foretold: int = 0
    predicted: int = 0
    prefill_tokens: int = 0  # prompt tokens read, those of a reused prefix not counted
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0  # launching steps and waiting for them: draft, verify, commit
    host_seconds: float = 0.0  # whoever consumes the tokens: text, printing
    sparse_prefill: PrefillStats | None = None  # where it was on
    near_ties: int | None = None  # tokens that rounding may have chosen, where they are counted

    def record(self, produced: int, drafted: int, shape: str = "") -> None:
        """One step that produced ``produced`` tokens (accepted drafts and the bonus)."""
        self.steps += 1
        self.drafted_steps += drafted > 0
        self.tokens += produced
        self.drafted += drafted
        self.accepted += produced - 1
        self.histogram[produced - 1] += 1
        self.shape = shape
        if shape:
            self.shapes[shape] += 1

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafts over checked drafts (0 without drafting)."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def per_depth(self) -> list[float]:
        """Share of steps in which the draft at depth 1, 2, ... was accepted."""
        deepest = max(self.histogram, default=0)
        return [
            sum(n for k, n in self.histogram.items() if k >= depth) / self.steps
            for depth in range(1, deepest + 1)
        ]

    def add(self, other: DraftStats) -> None:
        """Accumulate another answer's statistics into this one."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("prefill_seconds", "decode_seconds", "host_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.histogram.update(other.histogram)
        self.shapes.update(other.shapes)
        if other.near_ties is not None:
            self.near_ties = (self.near_ties or 0) + other.near_ties
        if other.sparse_prefill is not None:
            self.sparse_prefill = self.sparse_prefill or PrefillStats(other.sparse_prefill.mode)
            self.sparse_prefill.add(other.sparse_prefill)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        sparse = {"sparse_prefill": self.sparse_prefill.as_dict()} if self.sparse_prefill else {}
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "tokens_per_step": round(self.tokens_per_step, 4),
            "prefill_tokens": self.prefill_tokens,
            "predicted": self.predicted,
            "acceptance_rate": round(self.acceptance_rate, 4),
            "histogram": {str(k): self.histogram[k] for k in sorted(self.histogram)},
            "shapes": dict(self.shapes.most_common()),
            "per_depth": [round(p, 4) for p in self.per_depth],
            "seconds": {
                "prefill": round(self.prefill_seconds, 4),
                "draft_verify": round(self.decode_seconds, 4),
                "host": round(self.host_seconds, 4),
            },
            **sparse,
            **({} if self.near_ties is None else {"near_ties": self.near_ties}),
        }
