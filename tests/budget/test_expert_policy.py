"""Models with experts on a machine that is reckoned: what the policy makes of their costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from mlx_redrafter.budget import yields
from mlx_redrafter.budget.automatic import FIRST, Automatic, contenders, expected
from mlx_redrafter.budget.costs import NEAR, NODES, Costs
from mlx_redrafter.tree.shape import TreeShape

PLAIN = TreeShape.plain()
LAYERS, EXPERTS, CHOSEN = 48, 128, 8
ROUTES = LAYERS * CHOSEN
TABLE = yields.load(None)


@dataclass
class Machine:
    """Seconds of a pass over so many nodes: a + b pairs + c distinct experts, over those of one
    node. shared: of a row's experts, those that it takes from the rows before it; easy: how much
    more likely than on average text drafts are accepted."""

    parts: tuple[float, float, float]
    shared: float = 0.0
    easy: float = 1.0
    busy: tuple[int, ...] = ()  # steps that take three times as long
    steps: int = 0
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))

    def distinct(self, nodes: int) -> float:
        found = float(CHOSEN)
        for _ in range(nodes - 1):
            found += (1 - self.shared) * CHOSEN * (1 - found / EXPERTS)
        return LAYERS * found

    def seconds(self, nodes: int, distinct: float) -> float:
        a, b, c = self.parts
        return 1e-2 * (a + b * nodes + c * distinct / ROUTES)

    def table(self, sizes: Mapping[int, float] | None = None) -> Costs:
        """As measured honestly, or with other numbers of distinct experts."""
        counts = sizes or {n: self.distinct(n) for n in NODES}
        return Costs({n: self.seconds(n, d) for n, d in counts.items()}, distinct=dict(counts))

    def step(self, shape: TreeShape) -> tuple[int, float, int]:
        """Tokens, seconds, and distinct experts."""
        n = shape.nodes
        d = int(self.distinct(n) * (self.random.uniform(0.9, 1.1) if n > 1 else 1))
        seconds = self.seconds(n, d) * self.random.uniform(0.95, 1.05)
        seconds *= 3 if self.steps in self.busy else 1
        self.steps += 1
        likely = expected(TABLE.tokens(shape, False), shape, self.easy) - 1
        tokens = 1 + self.random.binomial(shape.longest, likely / max(shape.longest, 1))
        return tokens, seconds, d


def answer(machine: Machine, costs: Costs, tokens: int = 500) -> tuple[float, list[TreeShape]]:
    """Times as fast as plain decoding, and the shapes of all steps. One is in flight ahead of what
    is known, and the first two are not timed, as in the engine."""
    yielded = lambda shape: TABLE.tokens(shape, False)  # noqa: E731
    price = lambda shape, position=NEAR: costs.seconds(shape, position)  # noqa: E731
    learn = lambda shape, at, passed, experts: costs.learn(shape, at, False, passed, experts)  # noqa: E731
    owed = 0 if costs.experts(False).compared else FIRST
    offered = [*contenders(yields.shapes(False), yielded, costs.table),
               *contenders(yields.shapes(False), yielded, price)]  # fmt: skip
    policy = Automatic(offered, yielded, price, learn, owed)
    made, spent, plainly, shapes = 0, 0.0, 0.0, [policy.choose(NEAR)]
    for step in range(tokens):
        shapes.append(policy.choose(NEAR))
        before = machine.steps
        found, seconds, experts = machine.step(shapes[step])
        policy.record(shapes[step], found, seconds if step > 1 else None, experts)
        made, spent = made + found, spent + seconds
        slow = 3 if before in machine.busy else 1
        plainly += found * slow * machine.seconds(1, ROUTES)
        if made >= tokens:
            break
    return plainly / spent, shapes[:-1]


def drafted(shapes: list[TreeShape]) -> list[int]:
    """Which steps drafted."""
    return [i for i, shape in enumerate(shapes) if shape.drafts]


LOSING = Machine((0.1, 0.5, 0.4))
FLAT = {n: float(ROUTES) for n in NODES}  # rows that are all alike
FLATTERING = {
    "honest": LOSING.table(),
    "of equal rows": LOSING.table(FLAT),
    "too flat": Costs({n: 9e-3 + n * 1e-3 for n in NODES}, distinct=LOSING.table().distinct),
    "of equal rows and too flat": Costs({n: 9.5e-3 + n * 5e-4 for n in NODES}, distinct=FLAT),
}


@pytest.mark.parametrize("table", FLATTERING)
def test_never_slower_where_drafting_loses(table: str) -> None:
    costs = Costs.from_dict(FLATTERING[table].as_dict())
    for _ in range(3):
        speed, shapes = answer(Machine(LOSING.parts), costs)
        found = drafted(shapes)
        assert speed > 0.96
        assert len([i for i in found if i > 30]) <= 6, "probes, rarer and rarer"


def test_small_trees_where_these_win_and_large_ones_lose() -> None:
    machine = Machine((0.7, 0.0, 0.3), easy=2.0)
    for flattering, costs in enumerate((machine.table(), machine.table(FLAT))):
        if flattering:  # only large trees are offered at first
            assert answer(machine, costs)[0] > 0.96
        for _ in range(2):
            speed, shapes = answer(machine, costs)
            assert speed > 1.15 and max(shape.nodes for shape in shapes) <= 4
            assert len(drafted(shapes)) > 0.9 * len(shapes)


def test_it_drafts_on_where_a_busy_machine_makes_everything_slow() -> None:
    machine = Machine((0.7, 0.05, 0.25), 0.5, easy=2.0, busy=tuple(range(60, 90)))
    speed, shapes = answer(machine, machine.table())
    assert len([shape for shape in shapes[FIRST:] if not shape.drafts]) < 15
    assert speed > 1.15


def test_a_pace_that_one_shape_shows_is_that_of_all() -> None:
    machine = Machine((0.7, 0.05, 0.25), 0.5)
    costs, shape = machine.table(), TreeShape(1, 0, 6, lookup=5)
    for step in range(140):
        one = PLAIN if step < 120 and step % 2 else shape
        _, seconds, experts = machine.step(one)
        costs.learn(one, NEAR, False, seconds * (2 if step >= 120 else 1), experts)
    for one in (PLAIN, shape, TreeShape(1, 0, 3, lookup=2)):
        assert costs.seconds(one) == pytest.approx(2 * costs.table(one), rel=0.15)


def test_what_one_shape_shows_of_the_text_is_known_of_the_others() -> None:
    """The table's text shares experts, the text at hand does not."""
    machine = Machine((0.5, 0.0, 0.5), shared=0.9)
    costs, other = machine.table(), Machine(machine.parts, shared=0.0)
    small, wide = TreeShape(1, 0, 3, lookup=2), TreeShape(1, 0, 8, lookup=7)
    truly = other.seconds(8, other.distinct(8))
    assert costs.seconds(wide) < 0.6 * truly
    for _ in range(20):
        for shape in (PLAIN, small):
            _, seconds, experts = other.step(shape)
            costs.learn(shape, NEAR, False, seconds, experts)
    assert costs.seconds(wide) == pytest.approx(truly, rel=0.2)
    assert costs.seconds(small) == pytest.approx(other.seconds(3, other.distinct(3)), rel=0.05)
    assert not costs.drifted, "the text is another, the machine is not"
    untouched = machine.table()
    assert costs.seconds(wide) > 1.5 * untouched.seconds(wide), "another model's costs stay"


def test_a_machine_that_changed_is_measured_again() -> None:
    costs, now = Machine((0.8, 0.1, 0.1)).table(), Machine((0.2, 0.4, 0.4))
    shape = TreeShape(1, 0, 6, lookup=5)
    for _ in range(20):
        for one in (PLAIN, shape):
            _, seconds, experts = now.step(one)
            costs.learn(one, NEAR, False, seconds, experts)
    truly = now.seconds(6, now.distinct(6)) / now.seconds(1, ROUTES)
    assert costs.seconds(shape) / costs.seconds(PLAIN) == pytest.approx(truly, rel=0.1)
    assert costs.seconds(shape, sampled=True) == pytest.approx(costs.table(shape))
    assert costs.drifted
