"""The size of a prompt's chunks: what is chosen, measured, kept; and what a prefill leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from conftest import SHAPES, engine_of, prompt_of, random_drafter, run, write_target
from prefill_cases import MODES

from mlx_redrafter.api import Model
from mlx_redrafter.bench import budget as tune
from mlx_redrafter.budget import chunks
from mlx_redrafter.budget.chunks import SIZES, USUAL, Chunks, most
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.models.attention import attend
from mlx_redrafter.runtime import clock

FLAT = dict.fromkeys(SIZES, 1e-4)


def far(**seconds: float) -> Chunks:
    """As fast as the usual size but for the given ones (n128=...), behind 2048 tokens."""
    return Chunks(FLAT, {**FLAT, **{int(name[1:]): t for name, t in seconds.items()}})


def test_another_size_than_the_usual_one_must_be_clearly_faster() -> None:
    assert far().size(0, 4096, 4096) == USUAL
    assert far(n128=0.97e-4).size(0, 4096, 4096) == USUAL
    slow = {f"n{n}": 3e-4 for n in SIZES}
    assert far(**{**slow, "n256": 2e-4}).size(0, 4096, 4096) == 256
    assert far(**{**slow, "n2048": 2e-4}).size(0, 4096, 4096) == 2048
    # What is better behind 2048 tokens need not be so at the beginning.
    mixed = Chunks({**FLAT, 128: 2e-4}, {n: 3e-4 if n > 128 else 2.1e-4 for n in SIZES})
    assert (mixed.size(0, 2100, 4096), mixed.size(0, 16384, 4096)) == (USUAL, 128)
    assert mixed.size(14000, 16384, 4096) == 128


def test_memory_bounds_the_chunk(target: Decoder) -> None:
    heads = target.config.num_heads
    assert 4 * heads * 2**18 * most(target.config, 2**18) <= 2**30
    assert most(target.config, 2**40) == min(SIZES)
    quick = far(**{f"n{n}": 1e-3 - 1e-4 * n.bit_length() / 2 for n in SIZES})
    assert [quick.size(0, 5000, n) for n in (128, 700, 10**6)] == [128, 512, 2048]
    assert far().size(0, 5000, 300) == 256, "the usual size needs room too"


def test_measuring_times_few_layers_with_the_targets_own_weights(
    target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "SIZES", (16, USUAL, 1024))
    found = chunks.measure(target)
    assert found.layers == 2 < target.config.num_layers
    assert {16, USUAL} <= found.near.keys() == found.far.keys()
    assert all(t > 0 for part in (found.near, found.far) for t in part.values())
    assert Chunks.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    few = chunks._shallow(target)
    assert few.model.layers[1] is target.model.layers[1]


def test_sizes_beyond_the_usual_one_are_left_when_they_are_slow(
    target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    def fastest(runs: Any, rounds: int, warm: bool = False) -> dict[Any, float]:
        timed.extend(n for n, _ in runs if rounds == 1)
        return {(n, at): n * (2e-4 if n > USUAL else 1e-4) for n, at in runs}

    monkeypatch.setattr(clock, "fastest", fastest)
    assert list(chunks.measure(target).near) == [128, 256, 512]
    assert max(timed) == 1024


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    target = load_model(write_target(tmp_path / "model", max_position_embeddings=8192))
    return Model.of("tiny", tmp_path / "model", target, random_drafter(target), compiled=False)


@pytest.mark.measured
def test_measured_at_the_first_long_prompt_and_kept(
    loaded: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = Chunks(*[{**FLAT, 256: 0.5e-4}] * 2)
    calls: list[Decoder] = []
    said: list[str] = []
    monkeypatch.setattr(chunks, "measure", lambda target, text: calls.append(target) or best)
    loaded.engine.say = said.append
    assert loaded.budget.step_size(2048) == USUAL
    assert loaded.budget.step_size(6000, cached=5000) == USUAL
    assert not calls, "a short prompt measures nothing"
    assert loaded.budget.step_size(2049) == 256
    assert len(said) == 1 and said[0].startswith("Measuring in what chunks long prompts")
    loaded.budget._chunks = None  # as in another process
    assert loaded.budget.step_size(6000, cached=100) == 256
    assert len(calls) == 1
    plain = Model.of("tiny", loaded.folder, loaded.target, compiled=False)
    assert plain.budget.step_size(4000) == 256 and len(calls) == 1, "without a drafter the same"
    (file,) = (tmp_path / "cache" / "costs").glob("*.json")
    file.write_text('{"near": {}, "far": {}, "layers": 2}')
    loaded.budget._chunks = None
    assert loaded.budget.step_size(4000) == 256 and len(calls) == 2, "a broken file"
    assert loaded.budget.chunks(again=True) is best and len(calls) == 3


def test_tune_shows_the_sizes_and_what_is_chosen(
    loaded: Model, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(tune, "load", lambda *_: (loaded, None))
    tune.run("tiny", "auto", False, None, False)
    assert "chosen: 512 for 1024 tokens, 512 for 4096 tokens" in capsys.readouterr().out
    tune.run("tiny", "auto", False, None, True)
    found = json.loads(capsys.readouterr().out)
    assert found["prefill_step_sizes"] == {"1024": 512, "4096": 512}
    assert found["chunks"]["far"]["128"] == 3e-5


@pytest.mark.parametrize("mode", [None, "xattention"])
def test_no_logits_while_a_prompt_is_read(
    target: Decoder, monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    """The head is 49,152 x 576 in the built-in model: for all of a prompt a fifth of the work."""
    rows: list[int] = []
    real = Decoder.logits

    def logits(self: Decoder, hidden: mx.array) -> mx.array:
        rows.append(hidden.shape[0])
        return real(self, hidden)

    monkeypatch.setattr(Decoder, "logits", logits)
    options = MODES[mode] if mode is not None else None
    for drafter, shape in ((None, None), (random_drafter(target), SHAPES["beam-3x4-8"])):
        rows.clear()
        engine = engine_of(target, drafter, compiled=False)
        run(
            engine, prompt_of(300), None, shape, 1,
            step_size=64, sparse_prefill=options,
        )  # fmt: skip
        assert rows == [1 if shape is None else shape.nodes], "the first step's"


@pytest.mark.bits
def test_the_softmax_of_a_prompt_is_compiled_and_has_the_same_bits() -> None:
    rng = np.random.default_rng(0)
    for heads, kv_heads, n, slots in ((9, 3, 100, 256), (8, 1, 37, 128)):
        q = mx.array(rng.standard_normal((heads, n, 64)), mx.float32)
        slab = mx.array(rng.standard_normal((1, 2 * kv_heads, slots, 64)), mx.float32)
        mask = mx.arange(slots)[None] <= mx.arange(slots - n, slots)[:, None]
        compiled = np.array(attend(q, slab, mask, 0.125, 0.0))
        mx.disable_compile()
        try:
            assert np.array_equal(compiled, np.array(attend(q, slab, mask, 0.125, 0.0)))
        finally:
            mx.enable_compile()
