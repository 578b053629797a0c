"""Every way on every prompt, in turns in one process, and the passes of the target among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_redrafter.api import Model
from mlx_redrafter.bench.speed import ways
from mlx_redrafter.bench.speed.costs import VerifyClock
from mlx_redrafter.bench.speed.ways import Answer, Way
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.errors import OptionError
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.tree.shape import TreeShape

Encoded = tuple[str, list[int]]
"""The group of a prompt and its token ids."""


@dataclass(frozen=True)
class Turn:
    """What was measured in one turn: all ways on one prompt at one temperature.

    ``timings``: way, shape (ours only; that of most steps), temp, prompt (its number), group,
    round, turn, tokens, steps and seconds (those of the first step left out), nodes (tokens checked
    per pass, on average), histogram (steps by accepted drafts), same (as plain decoding's?),
    prefill_density (share of the prompt's attention that was computed, where it was sparse).
    ``passes``: turn, prompt, capacity (slots), nodes, seconds of a bare pass.
    """

    timings: list[dict[str, Any]] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Comparison:
    """Measures in turns.

    Args:
        model: the target, its drafter, the engine.
        others: ways besides our plain decoding, which all are compared with.
        max_tokens: length of every answer; end tokens are ignored.
        rounds: turns per prompt and temperature.
        temps: temperatures.
        perfect: also time a perfect drafter, at temperature 0.
        seed: of sampled answers.
        turn: number of the next turn.
        sparse: how all of our own ways read a long prompt; None: densely.
    """

    model: Model
    others: Sequence[Way]
    max_tokens: int
    rounds: int
    temps: Sequence[float] = (0.0,)
    perfect: bool = False
    seed: int = 0
    turn: int = 0
    sparse: SparsePrefill | None = None
    _warm: set[tuple[Any, ...]] = field(default_factory=set)
    _clocks: dict[int, VerifyClock] = field(default_factory=dict)

    def turns(self, prompts: Sequence[Encoded], first: int = 0) -> Iterator[Turn]:
        """Prompt by prompt, numbered from ``first`` on, so that a run that is stopped has whole
        prompts; within a prompt temperature by temperature and round by round, every turn
        starting with another way."""
        length, seed, sparse = self.max_tokens, self.seed, self.sparse
        plain = ways.ours(self.model, TreeShape.plain(), length, seed, ways.PLAIN, sparse)
        for number, (group, ids) in enumerate(prompts, first):
            for temp in self.temps:
                row: list[Way] = [plain, *self.others]
                known = self._warm_up(row, ids, temp)
                if self.perfect and temp == 0:
                    answer = known or plain.decode(ids, temp).tokens
                    replays = ways.perfect(self.model, ids, answer, length, seed, sparse)
                    for way in replays:  # another answer is another graph
                        way.decode(ids, temp)
                    row += replays
                for count in range(self.rounds):
                    facts = {"temp": temp, "prompt": number, "group": group, "round": count}
                    yield self._turn(row, ids, facts)

    def _turn(self, row: list[Way], ids: list[int], facts: dict[str, Any]) -> Turn:
        start = self.turn % len(row)
        answers: dict[str, Answer] = {}
        for way in [*row[start:], *row[:start]]:
            answers[way.name] = way.decode(ids, facts["temp"])
        found = Turn()
        plain = answers[ways.PLAIN]
        for way in row:
            timing = _timing(way, answers[way.name], plain.tokens, facts["temp"])
            found.timings.append({**timing, **facts, "turn": self.turn})
        sizes = {1, *(shape.nodes for way in row for shape in way.shapes)}
        for nodes in sorted(sizes):
            seconds = self._clock(plain.capacity).seconds(nodes)
            found.passes.append(
                {
                    "turn": self.turn,
                    "prompt": facts["prompt"],
                    "capacity": plain.capacity,
                    "nodes": nodes,
                    "seconds": seconds,
                }
            )
        self.turn += 1
        return found

    def _warm_up(self, row: Sequence[Way], ids: list[int], temp: float) -> list[int]:
        """Compile what this prompt needs and no earlier one did; plain's answer, if it ran."""
        known: list[int] = []
        for way in row:
            # A graph belongs to a capacity: those of the first and of the last step.
            reach = (len(ids) + 2 * way.nodes, len(ids) + self.max_tokens + 2 * way.nodes)
            key = (way.name, temp > 0, *map(capacity_for, reach))
            if key not in self._warm:
                self._warm.add(key)
                tokens = way.decode(ids, temp).tokens
                known = tokens if way.name == ways.PLAIN else known
        return known

    def _clock(self, capacity: int) -> VerifyClock:
        if capacity not in self._clocks:
            self._clocks[capacity] = VerifyClock(
                self.model.target, capacity, self.model.engine.compiled
            )
        return self._clocks[capacity]


def _timing(way: Way, answer: Answer, plain: list[int], temp: float) -> dict[str, Any]:
    if answer.timed < 1:
        raise OptionError(
            f"{way.name} gave its {len(answer.tokens)} tokens in the first step, which is not "
            "timed: use a larger --max-tokens, or shorter prompts if the context is full"
        )
    stats = answer.stats
    # mlx_lm draws other random numbers than we do: only greedy answers can be the same.
    comparable = temp == 0 or way.shapes
    read = stats.sparse_prefill
    sparse = {"prefill_density": round(read.whole_density, 4)} if read is not None else {}
    return {
        "way": way.name,
        "shape": ways.describe(way.most_used(stats)),
        "tokens": answer.timed,
        "steps": stats.steps - 1,
        "seconds": answer.seconds,
        "nodes": 1 + stats.drafted / stats.steps,
        "histogram": {str(k): n for k, n in sorted(stats.histogram.items())},
        "same": answer.tokens == plain if comparable else None,
        **sparse,
    }
