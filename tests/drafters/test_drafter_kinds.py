"""Another kind of drafter is one class and one line in the registry, and nothing in decoding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from conftest import engine_of, plainly, prompt_of, run, write_target

from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters import Ask, Forgetful, Verified
from mlx_redrafter.drafters.loading import DRAFTERS, Kind, load_drafter
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.models.features import Features
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.nodes import END, Candidates, integers, prefixes
from mlx_redrafter.tree.shape import BEAMS, TreeShape


class Counting(Forgetful):
    """Drafts that every token is followed by the next number, and remembers the last bonus token:
    a state that is a tuple, and nothing read of the target."""

    part = BEAMS
    features = None

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def begin(self, read: Features) -> tuple[mx.array]:
        return (mx.array([0], mx.int32),)

    def propose(self, state: tuple[mx.array], ask: Ask) -> Sequence[Candidates]:
        columns = ask.shape.longest + 2
        place = integers(range(columns))
        counted = (ask.root + place) % self.vocab
        last = mx.where(place == 0, ask.root, state[0])
        rows = []
        for path in (counted, last):
            path = mx.where(place > ask.shape.depth, END, path)
            costs = 0.1 + 0.2 * mx.arange(columns - 1)
            costs = mx.where(mx.arange(columns - 1) == 0, 0.0, costs)
            rows.append(Candidates(prefixes(path), costs, tuple(range(columns - 1))))
        if ask.shape.one_path:
            return [Candidates(mx.where(place > ask.shape.depth, END, counted)[None], costs, (0,))]
        first, second = rows
        return [first, Candidates(second.paths[1:], second.costs[1:] + 0.05, second.depths[1:])]

    def commit(self, state: tuple[mx.array], done: Verified) -> tuple[mx.array]:
        return (mx.take(done.text, done.produced),)


def load(folder: Path, target: Decoder) -> Counting:
    return Counting(target.config.vocab_size)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(DRAFTERS, "counting", Kind(load, lambda folder, target: None))
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter" / "config.json").write_text(json.dumps({"model_type": "counting"}))
    return tmp_path / "drafter"


SHAPES = [TreeShape.chain(4), TreeShape(2, 3, 6), TreeShape(2, 3, 8, lookup=4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_text_is_the_same(folder: Path, target: Decoder, shape: TreeShape) -> None:
    engine = engine_of(target, load_drafter(folder, target))
    for params in (SamplingParams(), SamplingParams(temp=0.8, seed=3)):
        prompt = prompt_of(9)
        assert run(engine, prompt, params, shape, 24) == plainly(target, prompt, 24, params)


def test_what_it_drafts_right_is_accepted(folder: Path, tmp_path: Path) -> None:
    """A model that always says the same: the remembered token is right from the second step on."""
    target = load_model(write_target(tmp_path / "model"))
    engine, stats = engine_of(target, load_drafter(folder, target), False), DraftStats()
    bias = SamplingParams(logit_bias={7: 1000.0})
    assert run(engine, prompt_of(4), bias, TreeShape(2, 3, 6), 30, stats=stats) == [7] * 30
    assert stats.tokens_per_step > 2.5


def test_an_unknown_kind_names_what_is_known(tmp_path: Path, target: Decoder) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "counting"}))
    with pytest.raises(DrafterError, match="'counting' is not a drafter"):
        load_drafter(tmp_path, target)
