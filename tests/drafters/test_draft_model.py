"""A small model as drafter: the same text, and where it is the target itself, every draft right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from conftest import TINY, V, engine_of, plainly, prompt_of, run, write_target
from tiny_heads import PARAMS, SHAPES

from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.drafters import model as small
from mlx_redrafter.drafters.loading import check_folder, kind_of, load_drafter
from mlx_redrafter.drafters.model import DraftModel
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

PROMPT = prompt_of(9)
LENGTH = 40


@pytest.fixture(scope="module")
def itself(target: Decoder, target_folder: Path) -> DraftModel:
    """The target's own weights."""
    drafter = load_drafter(target_folder, target)
    assert isinstance(drafter, DraftModel)
    return drafter


@pytest.fixture(scope="module")
def other(target: Decoder, tmp_path_factory: pytest.TempPathFactory) -> DraftModel:
    """Another random model with a window and tokens of padding."""
    folder = write_target(
        tmp_path_factory.mktemp("small"), seed=3, num_hidden_layers=2, vocab_size=V + 1
    )
    drafter = load_drafter(folder, target)
    assert isinstance(drafter, DraftModel)
    return drafter


def accepted(engine: Engine, params: Any, shape: TreeShape, **more: Any) -> tuple[list[int], float]:
    """The answer and its tokens per step."""
    stats = DraftStats()
    tokens = run(engine, PROMPT, params, shape, LENGTH, stats=stats, **more)
    return tokens, stats.tokens_per_step


@pytest.mark.parametrize("params", PARAMS)
def test_the_text_is_the_same_and_every_draft_of_the_target_itself_right(
    target: Decoder, itself: DraftModel, params: str
) -> None:
    plain = plainly(target, PROMPT, LENGTH, PARAMS[params])
    engine = engine_of(target, itself)
    for shape in SHAPES:
        tokens, per_step = accepted(engine, PARAMS[params], shape)
        assert tokens == plain
        # Beams that compete may push the true path out of a tree; a chain is never wrong.
        steps = -(-LENGTH // (shape.depth + 1))
        assert per_step > (LENGTH / steps if shape.one_path else 1 + 0.6 * shape.depth) - 0.01


def test_a_random_model_drafts_badly_and_changes_nothing(
    target: Decoder, other: DraftModel
) -> None:
    engine = engine_of(target, other)
    for params in PARAMS.values():
        plain = plainly(target, PROMPT, LENGTH, params)
        for shape in [*SHAPES, TreeShape.plain()]:
            tokens, per_step = accepted(engine, params, shape)
            assert tokens == plain
            assert per_step < 1.5


def rows(session: Session, target: Decoder) -> list[np.ndarray]:
    """Of the drafter's layers, what its slabs hold of the session's tokens."""
    first, known = target.config.num_layers, len(session.tokens)
    return [np.array(kept)[0, :, :known] for kept in session.caches[first:]]


def read(drafter: DraftModel, tokens: list[int]) -> list[np.ndarray]:
    """The same of one pass over a text."""
    from mlx_redrafter.cache.layer import Pass, new_caches

    n = len(tokens)
    slots = mx.arange(128, dtype=mx.int32)
    own = Pass(new_caches(drafter.caches, 128, mx.float32), mx.array([0], mx.int32))
    ids, mask = mx.array(tokens, mx.int32), slots[None] <= slots[:n, None]
    drafter.model(ids, slots[:n], mask, slots, own)
    return [np.array(kept)[0, :, :n] for kept in own.caches]


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.bits
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_its_rows_are_those_of_one_pass(
    target: Decoder, itself: DraftModel, shape: TreeShape
) -> None:
    """Read in chunks, by steps, after an answer that was stopped, and after a session was cut."""
    engine = engine_of(target, itself)
    session = Session()
    text = PROMPT + run(engine, PROMPT, None, shape, LENGTH, session=session, step_size=4)
    assert session.tokens == text[: len(session.tokens)]
    assert same(rows(session, target), read(itself, session.tokens))
    again = [*text[:20], 5, 6, 7]
    plain = plainly(target, again, 12)
    assert run(engine, again, None, shape, 12, session=session) == plain
    assert same(rows(session, target), read(itself, session.tokens))


def test_shapes_may_change_from_step_to_step(target: Decoder, itself: DraftModel) -> None:
    """A step that does not ask the drafter has it read what it gave out all the same."""
    from mlx_redrafter.decoding.policy import Policy

    class Turns(Policy):
        shapes = (TreeShape.plain(), TreeShape.chain(3), TreeShape(3, 3, 7))

        def choose(self, position: int) -> TreeShape:
            self.count = getattr(self, "count", -1) + 1
            return self.shapes[self.count % 3]

        def record(
            self, shape: TreeShape, tokens: int, seconds: float | None, experts: int = 0
        ) -> None:
            pass

    stats = DraftStats()
    tokens = run(engine_of(target, itself), PROMPT, None, Turns(), LENGTH, stats=stats)  # type: ignore[arg-type]
    assert tokens == plainly(target, PROMPT, LENGTH)
    assert stats.tokens_per_step > 2.5


def wrong_start(drafter: DraftModel, *args: Any) -> mx.array:
    """Reads what was given out one position too far."""
    tokens, count, position, own = args
    return DraftModel._read(drafter, tokens, count, position + 1, own)


def test_mistakes_are_seen_in_what_is_accepted(
    target: Decoder, target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plainly(target, PROMPT, LENGTH)
    chain, tree = TreeShape.chain(4), TreeShape(4, 5, 16)
    right = engine_of(target, load_drafter(target_folder, target))
    best = accepted(right, None, tree)[1]

    class Shifted(DraftModel):
        _read = wrong_start

    mistaken = Shifted(load_model(target_folder), V)
    tokens, per_step = accepted(engine_of(target, mistaken), None, chain)
    assert tokens == plain
    assert per_step < 3

    class Forgetting(DraftModel):
        def commit(self, state: Any, done: Any) -> Any:
            super().commit(state, done)
            return done.text[:1], done.produced * 0 + 1  # one token, whatever came out

    tokens, per_step = accepted(
        engine_of(target, Forgetting(load_model(target_folder), V)), None, chain
    )
    assert tokens == plain
    assert per_step < 3

    real = small.Branches
    monkeypatch.setattr(small, "Branches", _seeing_all(real))
    tokens, per_step = accepted(engine_of(target, load_drafter(target_folder, target)), None, tree)
    assert tokens == plain
    assert per_step < best


def _seeing_all(real: type[small.Branches]) -> type[small.Branches]:
    class All(real):  # type: ignore[valid-type, misc]
        def step(self, tokens: mx.array, state: mx.array, fixed: mx.array) -> Any:
            return super().step(tokens, mx.ones_like(state), fixed)

    return All


def test_fewer_layers_of_the_target_draft_for_it(
    target: Decoder, target_folder: Path, tmp_path: Path
) -> None:
    config = json.loads((target_folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    weights = mx.load(str(target_folder / "model.safetensors"))
    kept = {n: w for n, w in weights.items() if not n.startswith("model.layers.2.")}  # type: ignore[union-attr]
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), kept)
    check_folder(tmp_path, target)
    drafter = load_drafter(tmp_path, target)
    assert kind_of(tmp_path).describe(tmp_path).facts["architecture"] == "llama of 2 layers"
    for params in PARAMS.values():
        assert accepted(engine_of(target, drafter), params, SHAPES[1])[0] == plainly(
            target, PROMPT, LENGTH, params
        )


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    (lambda folder: _edit(folder, hidden_size=64), "do not fit|other shapes|has other"),
    (lambda folder: _edit(folder, num_hidden_layers=5), "lacks"),
]


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(("damage", "words"), REFUSED)
def test_a_broken_model_is_one_line(
    target: Decoder, target_folder: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    folder = Path(shutil.copytree(target_folder, tmp_path / "small"))
    damage(folder)
    for attempt in (load_drafter, check_folder):
        with pytest.raises(DrafterError, match=words) as caught:
            attempt(folder, target)
        assert "\n" not in str(caught.value)


def test_another_tokenizer_is_refused(target: Decoder, tmp_path: Path) -> None:
    folder = write_target(tmp_path / "small", vocab_size=2 * V)
    for attempt in (load_drafter, check_folder):
        with pytest.raises(DrafterError, match=f"{2 * V} tokens.*{V}.*same tokenizer"):
            attempt(folder, target)
    assert TINY["vocab_size"] == V
