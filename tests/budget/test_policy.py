"""The policy: what it chooses, what it learns, and that its choices never change the text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    COSTS,
    Oracle,
    asked,
    assert_holds,
    engine_of,
    plainly,
    random_drafter,
    run,
    write_target,
)

from mlx_redrafter.api import Model
from mlx_redrafter.bench import budget as tune
from mlx_redrafter.budget import machine, yields
from mlx_redrafter.budget.automatic import Automatic, contenders, expected
from mlx_redrafter.budget.costs import NODES, Costs, measure
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding import engine as decoding
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.decoding.step import StepSpec
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

PLAIN, CHAIN, TREE = TreeShape.plain(), TreeShape.chain(3), TreeShape(3, 3, 8, lookup=7)
MIXED = (PLAIN, CHAIN, TREE, TreeShape(2, 2, 4, lookup=7), TreeShape(1, 0, 3, lookup=2))
LINEAR = Costs({n: n * 10e-3 for n in (1, 2, 3, 4)}, (0.0, 0.0), COSTS.draft, 0.5e-3)


class Dice:
    """Any shape at any step."""

    def __init__(self, shapes: Sequence[TreeShape], seed: int) -> None:
        self.shapes, self._random = shapes, np.random.default_rng(seed)

    def choose(self, position: int) -> TreeShape:
        return self.shapes[self._random.integers(len(self.shapes))]

    def record(
        self, shape: TreeShape, produced: int, seconds: float | None, experts: int = 0
    ) -> None:
        assert 1 <= produced <= shape.longest + 1
        assert seconds is None or seconds > 0


def automatic(costs: Costs, drafter: bool = True, sampled: bool = False) -> Automatic:
    table = yields.load(None)
    tokens = lambda shape: table.tokens(shape, sampled)  # noqa: E731
    shapes = contenders(yields.shapes(drafter), tokens, costs.seconds)
    return Automatic(shapes, tokens, costs.seconds)


# --- the same text ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_any_choice_gives_the_same_text(target: Decoder, texts: list[Any], seed: int) -> None:
    sampled = SamplingParams(temp=0.9, top_k=20, seed=seed, repetition_penalty=1.2)
    drafters = Oracle(target, [p + a for p, a in texts], (0, 0, 1)), random_drafter(target)
    for drafter, (prompt, answer) in itertools.product(drafters, texts[1:4]):
        engine = engine_of(target, drafter, compiled=seed % 2 == 0)
        session = Session()
        assert run(engine, prompt, None, Dice(MIXED, seed), 40, session) == answer
        longer = [*prompt, *answer[:20], 7]
        assert run(engine, longer, sampled, Dice(MIXED, seed), 16, session) == plainly(
            target, longer, 16, sampled
        )


def test_an_answer_cut_anywhere_leaves_a_true_cache(target: Decoder, texts: list[Any]) -> None:
    prompt, answer = texts[2]
    engine = engine_of(target, Oracle(target, [prompt + answer]), compiled=False)
    for n in range(1, 14):
        session = Session()
        steps = engine.generate(
            asked(prompt, SamplingParams(), Dice(MIXED, n), 30, session=session)
        )
        produced = [t for _ in range(n) for t in next(steps).tokens] if n < 8 else None
        if produced is None:
            produced = run(engine, prompt, None, Dice(MIXED, n), n, session)
        steps.close()
        text = [*prompt, *produced]
        assert text[: len(session.tokens)] == session.tokens
        assert len(session.tokens) >= len(prompt) - 1
        assert_holds(session, target, session.tokens)


def test_rows_that_are_never_put_into_place_are_noticed(
    target: Decoder, texts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation: a plain step that forgets what the tree before it accepted."""
    honest = decoding.make_step

    def forgetful(target: Any, drafters: Any, spec: StepSpec, on_trace: Any) -> Any:
        made = honest(target, drafters, spec, on_trace)
        if spec.shape.drafts:
            return made
        return lambda state, arrays: made(state._replace(pending=()), arrays)

    prompt, answer = texts[2]
    drafter = Oracle(target, [prompt + answer], (0, 1, 0, 2))
    engine = engine_of(target, drafter, compiled=False)
    shapes = (PLAIN, TreeShape(3, 3, 8))
    assert run(engine, prompt, None, Dice(shapes, 1), 40) == answer
    monkeypatch.setattr(decoding, "make_step", forgetful)
    engine = engine_of(target, drafter, compiled=False)
    assert run(engine, prompt, None, Dice(shapes, 1), 40) != answer


def test_one_trace_a_bucket_when_shapes_change(target: Decoder, texts: list[Any]) -> None:
    prompt, answer = texts[2]
    engine = engine_of(target, random_drafter(target))
    for _ in range(2):
        for seed in range(6):
            assert run(engine, prompt, None, Dice(MIXED[:3], seed), 40) == answer
        traces = engine.traces
    # every shape after every other: nothing pending, or the rows of the one tree
    assert traces <= 2 * 3
    assert run(engine, prompt, None, Dice(MIXED[:3], 0), 40) == answer
    assert engine.traces == traces


# --- the choice ---------------------------------------------------------------------------------


def test_drafting_where_it_pays_and_not_where_it_cannot() -> None:
    assert automatic(COSTS).choose(256).drafts
    never = automatic(LINEAR)
    assert [never.choose(256) for _ in range(500)] == [PLAIN] * 500, "not even to try"


@pytest.mark.parametrize("drafter", [True, False])
def test_hard_text_ends_in_plain_decoding_with_rarer_and_rarer_probes(drafter: bool) -> None:
    costs = Costs({1: 10e-3, 2: 13e-3, 4: 16e-3, 8: 20e-3, 16: 32e-3}, (0, 0), COSTS.draft, 1e-3)
    chosen = automatic(costs, drafter)
    shapes = []
    for _ in range(600):
        shapes.append(chosen.choose(256))
        chosen.record(shapes[-1], 1, None)
    probes = [i for i, shape in enumerate(shapes) if shape.drafts]
    late = [b - a for a, b in itertools.pairwise(probes) if a > 60]
    assert late == sorted(late) and late[-1] > 90
    assert sum(shape.drafts for shape in shapes[100:]) < 10


def test_it_comes_back_when_the_text_gets_easy() -> None:
    costs = Costs({1: 10e-3, 2: 13e-3, 4: 16e-3, 8: 20e-3, 16: 32e-3}, (0, 0), COSTS.draft, 1e-3)
    chosen = automatic(costs)
    for _ in range(100):
        chosen.record(chosen.choose(256), 1, None)
    assert not chosen.choose(256).drafts
    easy = []
    for _ in range(120):
        easy.append(chosen.choose(256))
        chosen.record(easy[-1], easy[-1].longest + 1, None)
    assert all(shape.drafts for shape in easy[-20:]) and easy[-1].nodes >= 8


def test_expected_tokens() -> None:
    assert expected(1.0, PLAIN, 3.0) == 1.0
    assert expected(2.5, TREE, 1.0) == pytest.approx(2.5)
    assert 1.0 < expected(2.5, TREE, 0.5) < 2.5 < expected(2.5, TREE, 2.0) < 8.0
    assert expected(2.5, TREE, 1e9) == pytest.approx(8.0)
    assert expected(9.9, CHAIN, 1.0) == 4.0


def test_contenders_are_few_and_plain_is_among_them() -> None:
    table = yields.load(None)
    for costs, drafter in itertools.product((COSTS, LINEAR), (True, False)):
        shapes = yields.shapes(drafter)
        found = contenders(shapes, lambda s: table.tokens(s, False), costs.seconds)
        assert found[0] == PLAIN and len(set(found)) == len(found) <= 5
        assert drafter or all(shape.depth == 0 for shape in found)


def test_more_nodes_are_expected_to_yield_more() -> None:
    table = yields.load(None)
    for sampled in (False, True):
        for shape in yields.shapes(drafter=True)[1:]:
            tokens = table.tokens(shape, sampled)
            assert 1 < tokens <= shape.longest + 1, shape


# --- the costs ----------------------------------------------------------------------------------


def test_the_table_between_and_beyond_what_was_measured() -> None:
    assert COSTS.table(TreeShape(1, 0, 6, lookup=5)) == pytest.approx(12.5e-3)
    assert COSTS.table(PLAIN, 1256) == pytest.approx(11e-3)
    assert COSTS.table(TreeShape(1, 0, 16, lookup=15), 1256) == pytest.approx(24e-3)
    assert COSTS.table(TreeShape(2, 3, 4)) == pytest.approx(11e-3 + 0.3e-3 + 1.2e-3 + 0.5e-3)
    assert LINEAR.table(TREE) == float("inf")
    assert Costs.from_dict(COSTS.as_dict()) == COSTS


def test_running_steps_correct_the_table() -> None:
    costs = Costs.from_dict(COSTS.as_dict())
    before = costs.seconds(TREE), costs.seconds(PLAIN)
    for _ in range(12):
        costs.learn(TREE, 256, False, 2 * before[0])
    costs.learn(TREE, 256, False, 100.0)  # one hiccup
    assert costs.seconds(TREE) == pytest.approx(2 * before[0], rel=0.1)
    slower = pytest.approx(2 * before[1], rel=0.1)
    assert costs.seconds(PLAIN) == slower, "the whole machine is slower"
    assert costs.seconds(PLAIN, sampled=True) == pytest.approx(before[1])
    assert not costs.drifted


def test_a_shape_that_was_timed_on_a_busy_machine_is_not_shunned_for_ever() -> None:
    costs = Costs.from_dict(COSTS.as_dict())
    fair = costs.seconds(TREE) / costs.seconds(PLAIN)
    for _ in range(20):  # everything takes twice as long
        costs.learn(TREE, 256, False, 2 * costs.table(TREE))
    for _ in range(20):  # and then, without a step of that shape, no longer
        costs.learn(PLAIN, 256, False, costs.table(PLAIN))
    assert costs.seconds(TREE) / costs.seconds(PLAIN) == pytest.approx(fair, rel=0.1)


def test_neither_the_first_step_nor_the_last_is_timed(target: Decoder, texts: list[Any]) -> None:
    """The last has none behind it, the first nobody saw begin."""
    seconds: list[float | None] = []

    class Timed(Dice):
        def record(self, *args: Any) -> None:
            seconds.append(args[2])

    engine, prompt = engine_of(target), texts[1][0]
    run(engine, prompt, None, Timed([PLAIN], 0), 24)
    assert len(seconds) == 24
    assert seconds[0] is seconds[-1] is None
    assert sum(known is not None for known in seconds) > 12


def test_shapes_that_stand_otherwise_to_each_other_than_in_the_table() -> None:
    costs = Costs.from_dict(COSTS.as_dict())
    for _ in range(40):
        costs.learn(TREE, 256, False, 1.6 * costs.table(TREE))
        costs.learn(PLAIN, 256, False, costs.table(PLAIN))
    ratio = costs.seconds(TREE) / costs.seconds(PLAIN)
    assert ratio == pytest.approx(1.6 * costs.table(TREE) / costs.table(PLAIN), rel=0.1)
    assert costs.drifted


def test_measuring_a_tiny_model(target: Decoder) -> None:
    engine = engine_of(target, random_drafter(target), compiled=False)
    costs = measure(target, engine.drafters, engine.step_function, compiled=False)
    known = sorted(costs.verify)
    assert known[0] == 1 and set(known) <= set(NODES)
    times = [costs.verify[n] for n in known]
    assert times == sorted(times) and times[0] > 0
    assert set(costs.draft) == {1, 2, 3, 4} and all(a > 0 for a, _ in costs.draft.values())
    assert measure(target, [], engine.step_function, compiled=False).draft == {}


def test_what_was_drafted_is_in_the_statistics(target: Decoder, texts: list[Any]) -> None:
    prompt, answer = texts[2]
    engine, stats = engine_of(target, random_drafter(target), compiled=False), DraftStats()
    assert run(engine, prompt, None, Dice(MIXED, 3), 40, stats=stats) == answer
    assert sum(stats.shapes.values()) == stats.steps
    assert set(stats.shapes) <= {str(shape) for shape in MIXED} and len(stats.shapes) > 2


# --- kept on disk, and shown --------------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    target = load_model(write_target(tmp_path / "model"))
    return Model.of("tiny", tmp_path / "model", target, random_drafter(target), compiled=False)


@pytest.mark.measured
def test_measured_once_and_read_afterwards(loaded: Model, tmp_path: Path) -> None:
    said: list[str] = []
    first = loaded.budget.costs(said.append)
    assert loaded.budget.costs(said.append) is first and len(said) == 1
    loaded.budget._costs = None  # as in another process
    assert loaded.budget.costs(said.append) == first and len(said) == 1
    loaded.budget.costs(said.append, again=True)
    assert len(said) == 2
    (file,) = (tmp_path / "cache" / "costs").glob("*.json")
    file.write_text('{"verify": 3}')
    loaded.budget._costs = None
    loaded.budget.costs(said.append)
    assert len(said) == 3, "a broken file is measured again"


@pytest.mark.measured
def test_another_machine_is_measured_anew(loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    loaded.budget.costs(said.append)
    for change in ("OMP_NUM_THREADS", "MLX", "macOS"):
        if change == "MLX":
            monkeypatch.setattr(machine, "version", lambda name: "9.9")
        elif change == "macOS":
            monkeypatch.setattr("platform.mac_ver", lambda: ("26.2", ("", "", ""), "arm64"))
        else:
            monkeypatch.setenv(change, "7")
        loaded.budget._costs = None
        loaded.budget.costs(said.append)
    assert len(said) == 4


@pytest.mark.measured
def test_a_table_that_no_longer_holds_is_measured_again_at_the_next_start(loaded: Model) -> None:
    said: list[str] = []
    known = loaded.budget.costs(said.append)
    for _ in range(30):
        known.learn(PLAIN, 256, False, known.table(PLAIN))
        known.learn(TREE, 256, False, 2 * known.table(TREE))
    assert known.drifted
    assert loaded.budget.costs(said.append) is known and len(said) == 1
    loaded.budget._costs = None  # as in another process
    assert not loaded.budget.costs(said.append).drifted and len(said) == 2


def test_tune_shows_costs_and_contenders(
    loaded: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(tune, "load", lambda *_: (loaded, None))
    plot = tmp_path / "curve.png"
    tune.run("tiny", "auto", False, plot, False)
    shown = capsys.readouterr().out
    assert "plain" in shown and "lookup" in shown and "1.40" in shown
    assert plot.stat().st_size > 5000
    tune.run("tiny", "auto", False, None, True)
    found = json.loads(capsys.readouterr().out)
    assert found["costs"]["verify"]["8"] == 0.014
    assert found["choices"]["greedy"][0]["times_plain"] == 1.0
    with pytest.raises(OptionError, match="ends in"):
        tune.run("tiny", "auto", False, tmp_path / "curve.doc", False)
