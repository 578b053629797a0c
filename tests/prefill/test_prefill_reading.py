"""Reading prompts densely and sparsely: chunks, families, sessions, and what is written after."""

from __future__ import annotations

from pathlib import Path

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
from conftest import engine_of, one_pass, prompt_of, run
from prefill_cases import FEW, MODES, SMALL, XATTENTION, fresh, read_by, rows
from tiny_models import CASES, build

from mlx_redrafter.cache.layer import new_caches
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.models.decoder import Functions
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.reading import Part, parts, read
from mlx_redrafter.prefill.selectors import Blocks, Chunk
from mlx_redrafter.prefill.sparse import SparseAttention
from mlx_redrafter.prefill.xattention import everything


def as_before(target: Decoder, prompt: list[int], step: int) -> tuple[mx.array, list[mx.array]]:
    """Dense reading as the engine had it: passes, masks and slots to the letter."""
    kv = new_caches(target.caches, capacity_for(len(prompt)), target.dtype)
    slots = mx.arange(kv[0].shape[2], dtype=mx.int32)
    total, done = len(prompt) - 1, 0
    while done < total:
        chunk = list(prompt[done : min(done + step, total)])
        positions = mx.arange(done, done + len(chunk), dtype=mx.int32)
        filled = slots[: min(capacity_for(done + len(chunk)), slots.shape[0])]
        hidden, _, kv = one_pass(
            target, mx.array(chunk, mx.int32), positions, filled[None] <= positions[:, None],
            filled, kv, mx.array([done], mx.int32),
        )  # fmt: skip
        done += len(chunk)
    return hidden[-1:], kv


@pytest.mark.bits
@pytest.mark.parametrize(
    ("length", "step"), [(2, 512), (25, 1), (25, 24), (65, 64), (300, 24), (300, 512), (700, 512)]
)
def test_off_is_to_the_bit_what_it_was(target: Decoder, step: int, length: int) -> None:
    prompt = prompt_of(length)
    expected, kv = as_before(target, prompt, step)
    hidden, session, _ = read_by(target, prompt, None, step)
    assert np.array_equal(np.array(hidden), np.array(expected))
    for mine, theirs in zip(session.caches, kv, strict=True):
        assert np.array_equal(np.array(mine), np.array(theirs))


def test_off_in_the_engine_is_no_option_at_all(target: Decoder) -> None:
    prompt, sessions = prompt_of(200), [Session(), Session()]
    engine = engine_of(target, None, compiled=False)
    answers = [
        run(engine, prompt, None, None, 5, session, sparse_prefill=options)
        for session, options in zip(sessions, (None, SparsePrefill()), strict=True)
    ]
    assert answers[0] == answers[1]
    assert np.array_equal(rows(sessions[0]), rows(sessions[1]))
    assert sessions[1].tag == ""


def test_chunks_are_whole_blocks_between_dense_ends() -> None:
    assert list(parts(0, 200, 64, XATTENTION)) == [
        Part(0, 32, "short context"),
        Part(32, 96),
        Part(96, 160),
        Part(160, 176),
        Part(176, 199, "dense tail"),
    ]
    assert list(parts(70, 150, 40, XATTENTION)) == [
        Part(70, 80, "not whole blocks"),
        Part(80, 112),
        Part(112, 128),
        Part(128, 149, "dense tail"),
    ]
    assert list(parts(0, 32, 64, XATTENTION)) == [Part(0, 31, "short context")]
    assert list(parts(0, 50, 64, XATTENTION)) == [Part(0, 49, "dense tail")]
    assert list(parts(0, 49, 100)) == [Part(0, 48, "off")]
    assert list(parts(48, 49, 100)) == []
    assert list(parts(0, 66, 8, MODES["a_shape"]))[3:] == [
        Part(24, 32, "short context"),
        Part(32, 48),
        Part(48, 64),
        Part(64, 65, "not whole blocks"),
    ]


@pytest.mark.parametrize("options", [None, *MODES.values()], ids=["off", *MODES])
def test_every_token_is_read_once_and_the_tail_densely(options: SparsePrefill | None) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        prompt, step = int(rng.integers(1, 300)), int(rng.integers(1, 100))
        start = int(rng.integers(0, prompt))
        at = start
        for part in parts(start, prompt, step, options):
            assert part.start == at < part.stop
            assert part.stop - part.start <= max(step, 16)
            if options is not None and not part.dense:
                assert part.start % 16 == part.stop % 16 == 0
                assert part.start >= 32
                assert part.stop <= prompt - options.tail
            at = part.stop
        assert at == prompt - 1


@pytest.fixture(scope="module", params=[(4, 4), (4, 1), (8, 1)], ids=["1", "4", "8"])
def grouped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """Targets with 1, 4 and 8 query heads to a key/value head; Gemma's soft cap in one of them."""
    heads, kv_heads = request.param
    case = "gemma2" if kv_heads == heads else "llama"
    folder = tmp_path_factory.mktemp("grouped")
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    build(folder, case, **sizes, max_position_embeddings=4096, head_dim=8)
    return load_model(folder)


@pytest.mark.parametrize(("length", "step"), [(640, 128), (1663, 512), (2305, 2048)])
def test_with_every_key_each_position_has_the_same_next_token(
    grouped: Decoder, length: int, step: int
) -> None:
    """Blocks of 128, from position 128 on; a ragged rest is read densely."""
    options = SparsePrefill("xattention", tau=1.0, max_density=1.0, start_layer=0)
    sparse = SparseAttention(options, grouped.config)
    tokens = mx.array(prompt_of(length), mx.int32)
    slots = mx.arange(capacity_for(length))
    kinds: list[list[mx.array]] = []
    for attention in (None, sparse):
        kv, outs, at = new_caches(grouped.caches, slots.size, grouped.dtype), [], 0
        while at < length:
            stop = min(length, 128 if at == 0 else at + step)
            positions = mx.arange(at, stop)
            functions = Functions() if attention is None else Functions(attention.at(at))
            hidden, _, kv = one_pass(
                grouped, tokens[at:stop], positions, slots <= positions[:, None], slots, kv,
                mx.array([at]), functions=functions,
            )  # fmt: skip
            outs.append(hidden)
            at = stop
        kinds.append([mx.concatenate(outs), mx.argmax(grouped.logits(mx.concatenate(outs)), -1)])
    (expected, chosen), (hidden, same) = kinds
    assert sparse.stats.sparse_layers >= 2 * ((length - 128) // step)
    assert mx.abs(hidden - expected).max().item() <= 1e-5
    assert mx.array_equal(same, chosen).item()


@pytest.mark.parametrize("case", CASES)
def test_with_every_key_each_family_reads_as_densely(case: str, tmp_path: Path) -> None:
    """tau 1 and everything local: the same hidden state, the same next token."""
    build(tmp_path, case)
    target = load_model(tmp_path)
    if target.config.sinks or target.config.latent:
        _, _, stats = read_by(
            target, prompt_of(150, vocab=97), SparsePrefill("a_shape", **SMALL), 64
        )
        assert stats is not None and stats.sparse_layers == 0
        reason = "attention sinks" if target.config.sinks else "latent attention"
        assert stats.declined[reason] > 0
        return
    everything = [
        SparsePrefill("xattention", **{**SMALL, "tau": 1.0, "start_layer": 0}),
        SparsePrefill("a_shape", **{**SMALL, "local": 512}),
        SparsePrefill("minference", **SMALL),  # 1000 columns
    ]
    windowed = sum(map(bool, target.config.layer_windows))
    for length, step in ((150, 64), (131, 37)):
        prompt = prompt_of(length, vocab=target.config.vocab_size)
        expected, dense, _ = read_by(target, prompt, None, step)
        logits = target.logits(expected)
        for options in everything:
            hidden, session, stats = read_by(target, prompt, options, step)
            assert stats is not None
            assert stats.declined["sliding window"] == windowed * stats.sparse_chunks
            assert stats.sparse_layers > 0
            assert stats.density == stats.whole_density == 1.0
            assert mx.abs(hidden - expected).max().item() <= 1e-4
            assert np.allclose(rows(session), rows(dense), atol=1e-4)
            assert mx.argmax(target.logits(hidden)).item() == mx.argmax(logits).item()


def test_quantised_weights_are_read_sparsely(tmp_path: Path) -> None:
    build(tmp_path, "qwen3")
    target = load_model(tmp_path)
    nn.quantize(target, group_size=32, bits=4, class_predicate=lambda _, m: _fits(m))
    prompt = prompt_of(150)
    expected, _, _ = read_by(target, prompt)
    options = SparsePrefill("xattention", **{**SMALL, "tau": 1.0, "start_layer": 0})
    hidden, _, stats = read_by(target, prompt, options)
    assert stats is not None
    assert stats.sparse_layers > 0
    assert mx.abs(hidden - expected).max().item() <= 1e-4


def _fits(module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


@pytest.mark.parametrize("mode", MODES)
def test_less_than_every_key_is_counted_and_changes_something(target: Decoder, mode: str) -> None:
    prompt = prompt_of(400)
    expected, _, _ = read_by(target, prompt)
    hidden, _, stats = read_by(target, prompt, MODES[mode])
    assert stats is not None
    assert (stats.chunks, stats.sparse_chunks) == (8, 6)
    lower = 6 if mode in ("trianglemix", "xattention") else 0
    assert stats.declined["lower layer"] == lower
    assert stats.sparse_layers == 3 * stats.sparse_chunks - lower
    assert 0.05 < stats.density < 0.9
    assert stats.density < stats.whole_density < 1
    assert not np.allclose(np.array(hidden), np.array(expected), atol=1e-4)


def test_a_layer_that_would_score_too_much_is_dense(target: Decoder) -> None:
    prompt = prompt_of(300)
    expected, _, _ = read_by(target, prompt, None, 64)
    options = SparsePrefill("xattention", **{**SMALL, "max_density": 0.01, "start_layer": 0})
    hidden, _, stats = read_by(target, prompt, options)
    assert stats is not None
    assert (stats.sparse_layers, stats.sparse_chunks) == (0, 0)
    assert stats.declined["too many keys"] > 0
    assert mx.abs(hidden - expected).max().item() <= 1e-4


def test_another_selector_can_be_measured(target: Decoder) -> None:
    prompt = prompt_of(200)
    expected, _, _ = read_by(target, prompt)
    options, seen = MODES["a_shape"], []

    def select(layer: int, chunk: Chunk) -> Blocks:
        seen.append((layer, chunk.offset))
        return everything(chunk)

    sparse = SparseAttention(options, target.config, selector=select)
    hidden = read(target, prompt, fresh(target, 200), 64, sparse=sparse).hidden
    assert mx.abs(hidden - expected).max().item() <= 1e-4
    assert seen == [(layer, at) for at in (32, 96, 160) for layer in range(3)]


def test_patterns_of_another_model_are_refused(target: Decoder) -> None:
    options = SparsePrefill("minference", patterns=FEW[:2])
    with pytest.raises(OptionError, match="has 2 layers and the model 3"):
        run(engine_of(target, None, compiled=False), prompt_of(5), sparse_prefill=options)
