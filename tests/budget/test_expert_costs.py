"""What experts cost: counted in the step, measured on the model's own text, refitted by steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapter_cases import TYPES, module_of
from conftest import ByteTokenizer, run
from tiny_models import build

from mlx_redrafter.api import Model
from mlx_redrafter.bench import budget as tune
from mlx_redrafter.bench.counts import host
from mlx_redrafter.budget import chunks, machine
from mlx_redrafter.budget.chunks import Chunks
from mlx_redrafter.budget.costs import NODES, Costs, measure
from mlx_redrafter.budget.written import Written
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.policy import Fixed
from mlx_redrafter.drafters.lookup import Lookup
from mlx_redrafter.models import AdaptedModel, Decoder, load_model
from mlx_redrafter.models.experts import Experts, distinct
from mlx_redrafter.prefill.reading import USUAL
from mlx_redrafter.runtime.paths import ASSETS
from mlx_redrafter.tree.nodes import best_nodes
from mlx_redrafter.tree.shape import TreeShape

PLAIN = TreeShape.plain()
PROMPT = [5, 9, 2, 5, 9, 2, 5, 9]


class Heard(Fixed):
    """One shape, and what the engine says of its steps."""

    def __init__(self, shape: TreeShape) -> None:
        super().__init__(shape)
        self.experts: list[int] = []

    def record(
        self, shape: TreeShape, produced: int, seconds: float | None, experts: int = 0
    ) -> None:
        self.experts.append(experts)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("experts")
    build(folder, "qwen3_moe", num_hidden_layers=4)
    return load_model(folder)


# --- counted in the step ------------------------------------------------------------------------


def test_an_expert_that_several_rows_chose_counts_once_a_layer() -> None:
    rng = np.random.default_rng(0)
    for nodes in (1, 2, 7):
        layers = [np.stack([rng.permutation(9)[:k] for _ in range(nodes)]) for k in (3, 3, 2)]
        known = sum(len(set(layer.flatten().tolist())) for layer in layers)
        chosen = [mx.array(layer.astype(np.uint32))[None] for layer in layers]
        assert distinct(chosen).item() == known
        assert nodes == 1 or known < sum(layer.size for layer in layers)


@pytest.mark.parametrize("nodes", [1, 6])
def test_a_step_tells_how_many_experts_its_nodes_chose(
    routed: Any, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    route = Experts.route

    def watched(self: Experts, x: mx.array) -> tuple[mx.array, mx.array]:
        chosen, weights = route(self, x)
        if x.shape[0] == nodes:  # not the prompt
            seen.append(len(set(np.array(chosen).flatten().tolist())))
        return chosen, weights

    shape = TreeShape(1, 0, nodes, lookup=nodes - 1) if nodes > 1 else PLAIN
    engine, policy = Engine(routed, [Lookup()], compiled=False), Heard(shape)
    plain = run(engine, PROMPT, None, PLAIN, 10)
    monkeypatch.setattr(Experts, "route", watched)
    assert run(engine, PROMPT, None, policy, 10) == plain  # type: ignore[arg-type]
    layers = routed.routes // 3
    steps = [sum(seen[i : i + layers]) for i in range(0, len(seen), layers)]
    assert policy.experts == steps[: len(policy.experts)]
    assert (max(steps) == routed.routes) == (nodes == 1)


def test_counting_waits_for_nothing_more(routed: Any) -> None:
    engine = Engine(routed, [Lookup()], compiled=False)
    assert host.run(engine, PROMPT, TreeShape(1, 0, 3, lookup=2)).syncs_per_step == 1


def test_modules_of_mlx_lm_count_too() -> None:
    raw = TYPES["qwen3_moe"]
    adapted = AdaptedModel(module_of(raw, lively=True), raw)
    assert adapted.routes == raw["num_hidden_layers"] * raw["num_experts_per_tok"]
    policy = Heard(TreeShape(1, 0, 4, lookup=3))
    run(Engine(adapted, [Lookup()], compiled=False), PROMPT, None, policy, 8)  # type: ignore[arg-type]
    assert all(adapted.routes < n <= 4 * adapted.routes for n in policy.experts)
    assert AdaptedModel(module_of(TYPES["llama"]), TYPES["llama"]).routes == 0


# --- measured on the model's own text -----------------------------------------------------------


def test_passes_are_timed_over_what_the_model_writes(routed: Any) -> None:
    text = [*PROMPT, *range(40)]
    written = Written(routed, text, len(text), lambda f: f)
    engine = Engine(routed, compiled=False)
    own = run(engine, [*text, text[0]], None, PLAIN, 10)
    paths = [[t for t in path if t >= 0] for path in np.array(written._candidates.paths).tolist()]
    assert len(paths) == 16 and paths[-2] == [text[0], *own]
    for node in range(3, 16, 3):
        beside = paths[node - 1]
        assert paths[node][:-1] == beside[:-1] and paths[node][-1] != beside[-1]
    tree = best_nodes(written._candidates, 16)
    start = mx.array([len(text)], mx.int32)
    choices, *_ = written._run(*tree[:3], start, written._caches)
    longest = [paths.index(paths[-2][: n + 1]) for n in range(10)]
    assert [choices[node].item() for node in longest] == own
    for nodes in (1, 2, 8):
        once = written.timed(nodes)
        once()
        first = written.distinct[nodes]
        once()
        assert written.distinct[nodes] == first, "every pass stands behind the text"
    assert written.distinct[1] == routed.routes < written.distinct[2] < written.distinct[8]


def test_the_table_of_a_model_with_experts(routed: Any) -> None:
    engine = Engine(routed, compiled=False)
    costs = measure(routed, [], engine.step_function, False, lambda: PROMPT)
    assert costs.distinct.keys() == costs.verify.keys() and costs.distinct[1] == routed.routes
    assert costs.distinct[2] > costs.distinct[1]
    assert Costs.from_dict(json.loads(json.dumps(costs.as_dict()))) == costs
    assert all(costs.per_token[i] >= 0 for i in (0, 1))
    shown = tune.passes(costs).columns[-1]
    assert str(shown.header).startswith("experts") and next(iter(shown.cells)) == "1.00"
    assert len(tune.passes(Costs(costs.verify)).columns) == 4


@pytest.mark.measured
def test_a_table_from_before_experts_were_counted_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    build(tmp_path / "model", "qwen3_moe")
    model = Model.of("tiny", tmp_path / "model", load_model(tmp_path / "model"), compiled=False)
    said: list[str] = []
    known = model.budget.costs(said.append)
    (file,) = (tmp_path / "cache" / "costs").glob("*.json")
    stored = json.loads(file.read_text())
    model.budget._costs = None
    assert model.budget.costs(said.append) == known and len(said) == 1
    del stored["distinct"]
    file.write_text(json.dumps(stored))
    model.budget._costs = None
    assert model.budget.costs(said.append).distinct and len(said) == 2


@pytest.mark.measured
def test_what_is_timed_is_a_text_where_there_are_experts(
    routed: Any, target: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "load_tokenizer", lambda *_, **__: ByteTokenizer())
    given: list[Sequence[int]] = []
    usual = Chunks(*[{USUAL: 1e-5}] * 2)
    monkeypatch.setattr(chunks, "measure", lambda _, text: given.append(text) or usual)
    for model in (target, routed):
        Model.of("tiny", tmp_path / str(model.routes), model, compiled=False).budget.chunks(
            again=True
        )
    stored = json.loads((ASSETS / "selfcheck.json").read_text())
    text = f"{stored['question']}\n\n{stored['answer']}".encode()
    assert given == [(), [byte for byte in text if byte < routed.config.vocab_size]]
    read: list[list[int]] = []
    monkeypatch.setattr(chunks, "read", lambda _, prompt, *__: read.append(prompt))
    chunks._reading(routed, 3, 2, [7, 8])()
    assert read == [[7, 8, 7, 8, 7, 8]]


def test_an_answer_teaches_what_its_trees_choose(
    routed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the text is plain decoding's whatever is chosen because of it."""
    sizes = {n: float(n * routed.routes) for n in NODES}
    costs = Costs({n: 9e-3 + n * 1e-3 for n in NODES}, distinct=sizes)
    monkeypatch.setattr(machine.Budget, "costs", lambda _: costs)
    model = Model.of("tiny", tmp_path, routed, compiled=False)
    monkeypatch.setattr(model.engine, "count_trace", lambda: None)  # as if all were compiled
    text = PROMPT * 8
    plain = run(model.engine, text, None, PLAIN, 60)
    assert run(model.engine, text, None, model.budget.policy(False), 60) == plain  # type: ignore[arg-type]
    known = costs.experts(False)
    trees = {shape: known.expected(shape) for shape in known._means if shape.drafts}
    assert known.compared and trees
    assert all(routed.routes <= d < sizes[shape.nodes] for shape, d in trees.items())
    assert not costs.experts(True).compared
