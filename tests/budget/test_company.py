"""What answers that run together draft: trees shrink as there are more of them."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_redrafter.budget.automatic import Automatic
from mlx_redrafter.budget.company import Company, Seat
from mlx_redrafter.budget.costs import Costs
from mlx_redrafter.tree.shape import TreeShape

SHAPES = (TreeShape.plain(), TreeShape(2, 2, 4), TreeShape(3, 4, 8))
YIELDS = {1: 1.0, 4: 1.7, 8: 2.2}


def costs_of(**by_rows: float) -> Costs:
    known = {int(n[1:]): t for n, t in by_rows.items()}
    return Costs(known, draft=dict.fromkeys((1, 2, 3, 4), (0.1, 0.1)))


def policy(costs: Costs, ease: float = 1.0) -> Automatic:
    made = Automatic(SHAPES, lambda s: YIELDS[s.nodes], lambda s, at: costs.table(s, at))
    made._accepted *= ease
    return made


def settled(company: Company, seats: list[Seat]) -> list[int]:
    """Nodes that each chooses when nobody changes any more."""
    for _ in range(9):
        nodes = [seat.choose(300).nodes for seat in seats]
    return nodes


# Rows are free up to eight, then every one costs as much: a tile of a GPU.
FLAT = costs_of(n1=10.0, n2=10.0, n4=10.0, n8=10.0, n16=20.0)


def test_trees_shrink_as_answers_join_and_grow_as_they_leave() -> None:
    company = Company(FLAT, {16: 20.0, 32: 40.0, 64: 80.0})
    seats = [company.seat(policy(FLAT))]
    assert settled(company, seats) == [8]
    rows = []
    for _ in range(7):
        seats.append(company.seat(policy(FLAT)))
        rows.append(sum(settled(company, seats)))
    assert rows[-1] == 8, "eight plain answers fill the tile"
    assert all(not seat.planned.drafts for seat in seats)
    for seat in seats[1:]:
        company.leave(seat)
    assert settled(company, seats[:1]) == [8]


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_never_less_than_plain_together(count: int) -> None:
    company = Company(FLAT, {16: 20.0, 32: 40.0, 64: 80.0})
    seats = [company.seat(policy(FLAT)) for _ in range(count)]
    settled(company, seats)
    shapes = [seat.planned for seat in seats]
    drafted = sum(YIELDS[s.nodes] for s in shapes) / company.seconds(shapes)
    assert drafted >= 0.999 * count / company.check(count)


def test_who_gains_more_gets_the_rows() -> None:
    twelve = costs_of(n1=10.0, n12=10.0, n24=20.0)
    company = Company(twelve, {24: 20.0, 64: 53.0})
    easy, hard = company.seat(policy(twelve, 3.0)), company.seat(policy(twelve, 0.2))
    settled(company, [hard, easy])
    assert easy.planned.nodes > hard.planned.nodes


def test_in_turns_where_rows_cost_as_much_as_steps() -> None:
    dear = costs_of(n1=10.0, n2=24.0, n4=48.0, n8=96.0, n16=192.0)
    cheap = {TreeShape.plain(): 10.0, SHAPES[1]: 11.0, SHAPES[2]: 12.0}
    company = Company(dear, {16: 192.0, 64: 768.0})
    made: Any = [policy(dear), policy(dear)]
    for one in made:
        one._seconds = lambda shape, at: cheap[shape]
    seats = [company.seat(one) for one in made]
    settled(company, seats)
    assert company.in_turns()
    assert not Company(FLAT, {16: 20.0}).in_turns()


def test_a_curve_is_read_between_its_points_and_beyond() -> None:
    company = Company(FLAT, {16: 10.0, 64: 40.0})  # measured while the machine was idle
    assert company.check(3) == 10.0
    assert company.check(12) == pytest.approx(15.0)
    assert company.check(64) == pytest.approx(80.0)
    assert company.check(128) == pytest.approx(160.0)


def test_drafting_that_takes_longer_than_foreseen_ends() -> None:
    company = Company(FLAT, {16: 20.0, 32: 40.0, 64: 80.0})
    seats = [company.seat(policy(FLAT)) for _ in range(2)]
    settled(company, seats)
    shapes = [seat.planned for seat in seats]
    assert any(shape.drafts for shape in shapes)
    for _ in range(8):
        company.learn(shapes, 4 * company.seconds([TreeShape.plain()] * 2))
        company.learn([TreeShape.plain()] * 2, 10.0)
    for _ in range(20):
        settled(company, seats)
    assert not any(seat.planned.drafts for seat in seats)
