"""Targets over many sequences: what cannot run them together gives what plain decoding says."""

from __future__ import annotations

from collections.abc import Iterator

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from adapter_cases import TYPES, module_of
from conftest import engine_of, prompt_of, run

from mlx_redrafter.models import Decoder, sequences
from mlx_redrafter.models.adapter import AdaptedModel
from mlx_redrafter.models.batched import BatchedTarget, over
from mlx_redrafter.models.sequences import OneByOne, Request
from mlx_redrafter.runtime import metal

LAYERS = (0, 2)
ASKED = [Request(prompt_of(3 + 9 * i, seed=i), 0.0 if i % 2 else 0.9, seed=i) for i in range(5)]


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module", params=["mamba2", "lfm2"])
def adapted(request: pytest.FixtureRequest) -> AdaptedModel:
    raw = TYPES[str(request.param)]
    return AdaptedModel(module_of(raw, lively=True), raw)


def test_one_by_one_is_what_they_are_together(target: Decoder) -> None:
    """Tokens, sampled ones too, features and choices; parts of a long prompt are put together."""
    together, alone = BatchedTarget(target, LAYERS), OneByOne(target, LAYERS)
    long = Request(prompt_of(600), 0.7, seed=9)
    for asked in (ASKED, [long]):
        ours, theirs = (way.write(asked, 12, {5}) for way in (alone, together))
        assert [a.tokens for a in ours] == [a.tokens for a in theirs]
        pairs = [(r.prompt, a.tokens) for r, a in zip(asked, ours, strict=True)]
        for a, b, read in zip(ours, theirs, alone.read(pairs), strict=True):
            assert a.features.shape == (len(a.tokens), len(LAYERS), target.config.hidden_size)
            np.testing.assert_allclose(a.features, b.features, atol=2e-3)
            np.testing.assert_allclose(a.features, read, atol=2e-3)
        for prompt, answer in pairs:
            chosen = alone.choices(prompt, answer)
            assert chosen.tolist() == together.choices(prompt, answer).tolist()


def test_any_model_writes_and_reads(adapted: AdaptedModel) -> None:
    way = over(adapted, LAYERS)
    assert isinstance(way, OneByOne)
    first, again = way.write(ASKED, 10, {5}), way.write(ASKED[::-1], 10, {5})[::-1]
    engine = engine_of(adapted, None, compiled=False)
    for request, answer, same in zip(ASKED, first, again, strict=True):
        assert answer.tokens == same.tokens  # whatever was written before
        plain = run(engine, list(request.prompt), None, None, 10)
        if request.temp == 0:
            assert answer.tokens == [*plain, 5][: len(answer.tokens)]
            assert way.choices(request.prompt, answer.tokens).tolist() == answer.tokens
        [read] = way.read([(request.prompt, answer.tokens)])
        np.testing.assert_allclose(read, answer.features, atol=2e-3)
    assert over(adapted, ()).write(ASKED[:1], 4, ())[0].features.shape == (4, 0, 0)


def test_the_seed_of_an_answer_is_its_own(adapted: AdaptedModel) -> None:
    way, prompt = over(adapted, ()), prompt_of(8)
    texts = [a.tokens for a in way.write([Request(prompt, 1.0, i) for i in (1, 2, 1)], 8, ())]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize(
    "wrong", ["features of another layer", "shifted draws", "a position too far"]
)
def test_mutations_are_caught(target: Decoder, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    if wrong == "features of another layer":
        stacked = sequences.stacked
        monkeypatch.setattr(sequences, "stacked", lambda x, n: mx.roll(stacked(x, n), 1, axis=1))
    elif wrong == "shifted draws":
        sample = sequences.sample
        monkeypatch.setattr(sequences, "sample", lambda x, t, d: sample(x, t, (d + 0.3) % 1))
    else:
        at = sequences._Text._at
        monkeypatch.setattr(sequences._Text, "_at", lambda self: at(self) + (self.length > 0))
    with pytest.raises(AssertionError):
        test_one_by_one_is_what_they_are_together(target)


def test_halves_on_a_gpu_are_what_slabs_are(
    target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of unlike lengths, so that sequences leave; keys and values lie dense over all."""
    expected = BatchedTarget(target, LAYERS).write(ASKED, 12, {5, 17, 40})
    asked: list[tuple[int, ...]] = []
    original = mx.fast.scaled_dot_product_attention

    def fused(q: mx.array, k: mx.array, v: mx.array, **options: object) -> mx.array:
        asked.append(k.shape)
        return original(q, k, v, **options)

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(metal, "attention_calls", lambda n, *_: [n])
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", fused)
    way = BatchedTarget(target, LAYERS)
    assert {slab.shape[:2] for slab in way.caches(5, 64)} == {(10, 2)}
    found = way.write(ASKED, 12, {5, 17, 40})
    assert {rows for rows, *_ in asked} > {5} and {heads for _, heads, *_ in asked} == {2}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.features, theirs.features, atol=2e-3)
