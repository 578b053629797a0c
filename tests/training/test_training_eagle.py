"""EAGLE-3 heads that are trained: what a step computes, what it learns, what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_training import SMALL, Stop, copied, run_fit, write_answers

from mlx_redrafter.drafters.eagle import Eagle
from mlx_redrafter.drafters.loading import check_folder, kind_of, load_drafter
from mlx_redrafter.models import Decoder
from mlx_redrafter.training.data import Batch
from mlx_redrafter.training.differentiable import attention_weights, swiglu
from mlx_redrafter.training.fit import Fit, fit
from mlx_redrafter.training.kinds.eagle import EagleTrainee
from mlx_redrafter.training.shards import features_folder, shards

HEAD = replace(SMALL, kind="eagle3", num_draft_layers=2)
Floats = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture(scope="module")
def folder(target: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_answers(target, tmp_path_factory.mktemp("training"))


class Naive:
    """A head by plain NumPy: every pair of a sequence anew, full causal attention."""

    def __init__(self, trainee: EagleTrainee) -> None:
        self.w = {k: np.array(v, np.float64) for k, v in tree_flatten(trainee.module.parameters())}
        self.shape = trainee.shape

    def norm(self, x: Floats, name: str) -> Floats:
        mean = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean + self.shape.norm_eps) * self.w[f"{name}.weight"]

    def mixed(self, features: Floats) -> Floats:
        """(n, L, D) -> (n, H)."""
        parts = [self.norm(features[:, i], f"fc_norm.{i}") for i in range(features.shape[1])]
        return np.concatenate(parts, axis=1) @ self.w["fc.weight"].T

    def turned(self, x: Floats) -> Floats:
        """(n, heads, Dh), row i rotated to position i."""
        half = x.shape[2] // 2
        theta = np.arange(len(x))[:, None] * self.shape.rope.base ** (-np.arange(half) / half)
        cos, sin = np.cos(theta)[:, None], np.sin(theta)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)

    def last(self, f: Floats, e: Floats) -> Floats:
        """The block's output at the last of n pairs: (H,)."""
        w, size = self.w, self.shape.head_dim
        u = np.concatenate(
            [self.norm(e, "midlayer.input_layernorm"), self.norm(f, "midlayer.hidden_norm")], axis=1
        )
        q, k, v = (
            (u @ w[f"midlayer.self_attn.{name}_proj.weight"].T).reshape(len(u), -1, size)
            for name in "qkv"
        )
        q, k = self.turned(q)[-1], self.turned(k)
        read = []
        for head in range(len(q)):
            of = head * k.shape[1] // len(q)
            scores = k[:, of] @ q[head] / size**0.5
            p = np.exp(scores - scores.max())
            read.append(p @ v[:, of] / p.sum())
        y = f[-1] + w["midlayer.self_attn.o_proj.weight"] @ np.concatenate(read)
        x = self.norm(y, "midlayer.post_attention_layernorm")
        gate, up = (w[f"midlayer.mlp.{name}_proj.weight"] @ x for name in ("gate", "up"))
        return y + w["midlayer.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)

    def draft(self, f: Floats, e: Floats, steps: int) -> list[Floats]:
        """What the output rows are multiplied with: true pairs of f, then its own outputs."""
        result = []
        for _ in range(steps):
            out = self.last(f, e[: len(f)])
            result.append(self.norm(out, "norm"))
            f = np.concatenate([f, out[None]])
        return result


def conversation(batch: Batch, run: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens and features of one run from its beginning, and how many come before its answer."""
    assert batch.before is not None
    seen = batch.before.seen[run]
    tokens = np.concatenate([batch.before.tokens[run][seen], batch.tokens[run]])
    features = np.concatenate([batch.before.features[run][seen], batch.features[run]])
    return tokens, features, int(seen.sum())


def untrained(target: Decoder, folder: Path, to: Path, **changes: Any) -> Fit:
    """Not as it begins: norms of weights that are not 1."""
    run = Fit(target, replace(HEAD, **changes), copied(folder, to))
    mx.random.seed(3)
    for name, value in tree_flatten(run.drafter.trainable_parameters()):
        if "norm" in name:
            changed = value + 0.3 * mx.random.normal(value.shape)
            run.drafter.load_weights([(name, changed)], strict=False)
    return run


def furthest(run: Fit, target: Decoder, batch: Batch, steps: int) -> float:
    """The largest difference to the naive computation where positions count."""
    assert isinstance(run.trainee, EagleTrainee)
    naive, worst = Naive(run.trainee), 0.0
    inside = [np.array(x) for x in run.trainee.inputs(run._arrays(batch, 0))]
    layers = [run.data.target.layers.index(i) for i in run.trainee.shape.features]
    length = batch.valid.shape[2]
    for b in range(len(batch.tokens)):
        tokens, features, before = conversation(batch, b)
        e = np.array(target.embed(mx.array(tokens)), np.float64)
        f = naive.mixed(features[:, layers].astype(np.float64))
        for t in range(length):
            count = int(batch.valid[:, b, t].sum())  # draft steps that are trained here
            expected = naive.draft(f[: before + t + 1], e, count)
            for k, x in enumerate(expected):
                worst = max(worst, float(np.abs(inside[k][b * length + t] - x).max()))
    return worst


@pytest.mark.parametrize("layers", ["auto", "0,1"])
def test_every_step_is_what_inference_computes(
    folder: Path, target: Decoder, tmp_path: Path, layers: str
) -> None:
    run = untrained(target, folder, tmp_path / "own", rollout=4, context_layers=layers)
    batch = next(run.data.batches(run.runs, 0, 0))
    assert batch.before is not None and not batch.before.seen.all()
    assert batch.valid[3].sum() > 4
    assert furthest(run, target, batch, 4) < 1e-5


def _own_left_out(own: list[mx.array]) -> list[mx.array]:
    return []


def _one_late(own: list[mx.array]) -> list[mx.array]:
    return own[:-1]


@pytest.mark.parametrize("mistake", [_own_left_out, _one_late])
def test_the_naive_computation_finds_mistakes(
    folder: Path, target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[list[mx.array]], list[mx.array]],
) -> None:  # fmt: skip
    from mlx_redrafter.training.kinds import eagle

    run, right = untrained(target, folder, tmp_path / "own"), eagle.attended
    monkeypatch.setattr(
        eagle, "attended", lambda q, rows, seen, own: right(q, rows, seen, mistake(own))
    )
    assert furthest(run, target, next(run.data.batches(run.runs, 0, 0)), 3) > 1e-3


def test_a_position_sees_nothing_after_it(folder: Path, target: Decoder, tmp_path: Path) -> None:
    run = untrained(target, folder, tmp_path / "own")
    batch = next(run.data.batches(run.runs, 0, 0))
    arrays = run._arrays(batch, 0)
    before = [np.array(x).reshape(len(batch.tokens), -1, 32) for x in run.trainee.inputs(arrays)]
    arrays["features"] = mx.concatenate(
        [arrays["features"][:, :4], mx.random.normal(arrays["features"][:, 4:].shape)], axis=1
    )
    after = [np.array(x).reshape(before[0].shape) for x in run.trainee.inputs(arrays)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old[:, :4], new[:, :4])
        assert np.abs(old[:, 4:] - new[:, 4:]).max() > 1e-3


def test_gradients_are_those_of_mlx() -> None:
    x, y = mx.random.normal((5, 7)) * 4, mx.random.normal((5, 7))

    def score(function: Callable[..., mx.array], *inputs: mx.array) -> Any:
        return mx.grad(lambda *a: mx.sum(mx.sin(function(*a)) * y), list(range(len(inputs))))(
            *inputs
        )

    for mine, theirs in [
        (score(attention_weights, x), score(lambda a: mx.softmax(a, axis=-1), x)),
        (score(swiglu, x, y), score(lambda a, b: a * mx.sigmoid(a) * b, x, y)),
    ]:
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


# Batches


def test_all_positions_of_all_answers_are_trained_on(
    folder: Path, target: Decoder, tmp_path: Path
) -> None:
    run = Fit(target, HEAD, own := copied(folder, tmp_path / "own"))
    batches = run.data.batches(run.runs, 0, 0)
    wanted = {
        tuple(c.prompt[1:] + c.answer)
        for s in shards(own, whole=True) for c in s.conversations()[:-1] if len(c.answer) > 1
    }  # fmt: skip
    found = set()
    for batch in [next(batches) for _ in range(20)]:
        for b in range(len(batch.tokens)):
            tokens, _, before = conversation(batch, b)
            found.add(tuple(tokens[: before + 1 + int(batch.valid[0, b].sum())].tolist()))
    assert found == wanted
    held = [c for s in shards(own) for c in s.conversations()[-1:]]
    kept = [conversation(b, i) for b in run.data.held_out(4, 8) for i in range(len(b.tokens))]
    assert {tuple(t[: n + 2].tolist()) for t, _, n in kept} == {
        tuple((c.prompt[1:] + c.answer)[: len(c.prompt) + 1]) for c in held
    }


def test_the_features_of_an_answer_are_those_of_its_conversation(
    folder: Path, target: Decoder, tmp_path: Path
) -> None:
    run = Fit(target, HEAD, own := copied(folder, tmp_path / "own"))
    next(run.data.batches(run.runs, 0, 0))
    shard, whole = shards(own)[0], shards(own, whole=True)[0]
    assert whole.features_file.parent == features_folder(own, True)
    answers, all_rows = np.load(shard.features_file)[:, 1:], np.load(whole.features_file)
    first, answer = 0, 0
    for c in shard.conversations():
        first += len(c.prompt) - 1
        np.testing.assert_allclose(
            all_rows[first : first + len(c.answer)], answers[answer : answer + len(c.answer)],
            atol=2e-3,
        )  # fmt: skip
        first, answer = first + len(c.answer), answer + len(c.answer)
    assert first == len(all_rows)


# The result


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"draft_vocab_size": 0}, {"bits": 8}])
def test_a_head_learns_loads_and_says_what_it_is(
    folder: Path, target: Decoder, tmp_path: Path, changes: dict[str, int]
) -> None:
    run = Fit(target, replace(HEAD, **changes), copied(folder, tmp_path / "own"))
    batches = [next(run.data.batches(run.runs, 1, 0))]
    before = run.score(batches)
    run.run(lambda _: None)
    assert run.score(batches)["loss"] < before["loss"] - 0.05
    place = run.export(tmp_path / "drafter")
    drafter = load_drafter(place, target)
    check_folder(place, target)
    assert isinstance(drafter, Eagle) and drafter.config == run.trainee.shape
    raw = json.loads((place / "config.json").read_text())
    assert (raw["model_type"], raw["feature_layers_are"]) == ("eagle3", "outputs")
    names = mx.load(str(place / "model.safetensors")).keys()
    assert {"fc.weight", "fc_norm.1.weight", "midlayer.self_attn.q_proj.weight"} <= names
    assert ("draft_vocab" in names) == (changes.get("draft_vocab_size") != 0)
    assert kind_of(place).describe(place).facts["feature_layers_are"] == "outputs"


@pytest.mark.bits
def test_an_interrupted_fit_is_the_same(folder: Path, target: Decoder, tmp_path: Path) -> None:
    whole = run_fit(target, copied(folder, tmp_path / "whole"), HEAD)
    own = copied(folder, tmp_path / "parts")

    def stop(row: dict[str, int]) -> None:
        if row["step"] == 7:
            raise Stop

    with pytest.raises(Stop):
        fit(target, HEAD, own, stop)
    parts = run_fit(target, own, HEAD)
    assert whole.keys() == parts.keys()
    assert all(mx.array_equal(value, parts[name]).item() for name, value in whole.items())


def test_a_warm_start(folder: Path, target: Decoder, tmp_path: Path) -> None:
    first = Fit(target, HEAD, copied(folder, tmp_path / "own"))
    first.run(lambda _: None)
    place = first.export(tmp_path / "drafter")
    batches = [next(first.data.batches(first.runs, 1, 0))]
    again = Fit(target, replace(HEAD, warm_start=place), copied(folder, tmp_path / "again"))
    assert again.score(batches)["loss"] == pytest.approx(first.score(batches)["loss"], abs=0.02)
