"""Drafted text equals plain text over several rounds of the rings of sliding windows, and sessions
over them are cut as far back as they hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from conftest import RANKS, SHAPES, Oracle, engine_of, plainly, prompt_of, run, write_target
from tiny_models import MIXED, V, build

from mlx_redrafter.cache import ring as ring_module
from mlx_redrafter.cache.packed import Packing
from mlx_redrafter.cache.ring import Ring
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.models.batched import BatchedTarget, Request
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

WINDOW, SPARE = 8, 32
AROUND = WINDOW + SPARE
SAMPLED = SamplingParams(temp=0.9, top_k=20, seed=5)
WIDE = SHAPES["beam-3x4-8"]


LAYERS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "sliding_window": WINDOW,
    "head_dim": 32,
    "layer_types": MIXED,
}


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rings that short texts go around several times; compiling would take most of the time."""
    monkeypatch.setattr(ring_module, "SPARE", SPARE)
    monkeypatch.setattr(ring_module, "NODES", 16)
    if "graph" not in request.node.name:
        mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def target(tmp_path: Path) -> Decoder:
    return load_model(write_target(tmp_path, **LAYERS))


def closed(session: Session) -> bool:
    """Are all rings of a session rings by now?"""
    pairs = zip(session.kinds, session.caches, strict=True)
    rings = [kind.capacity(kept) is None for kind, kept in pairs if ring_module.ring_of(kind)]
    return bool(rings) and all(rings)


def exact(target: Any, prompt: list[int], tokens: int, ways: int = 2) -> None:
    """Greedy with a tree, and sampled with a chain."""
    for params, shape in ((SamplingParams(), "beam-4x5-16"), (SAMPLED, "chain"))[:ways]:
        answer, stats, session = plainly(target, prompt, tokens, params), DraftStats(), Session()
        engine = engine_of(target, Oracle(target, [prompt + answer], RANKS), compiled=False)
        assert run(engine, prompt, params, SHAPES[shape], tokens, session, stats) == answer
        assert closed(session) and stats.tokens_per_step > 1.3


@pytest.mark.parametrize("bits", [None, 8], ids=["", "8 bits"])
def test_drafted_text_is_plain_text(target: Decoder, bits: int | None) -> None:
    """Behind a prompt that fills several rings, and from one that fills none."""
    if bits is not None:
        target.pack(Packing(bits, 32))
    exact(target, prompt_of(90), 60)
    exact(target, prompt_of(9), 2 * AROUND, ways=1)


@pytest.mark.parametrize("case", ["gpt_oss", "gemma4_text", "gemma3_text"])
def test_with_sinks_and_shared_keys(tmp_path: Path, case: str) -> None:
    build(tmp_path, case)
    exact(load_model(tmp_path), prompt_of(90, vocab=V), 40)


def test_where_every_layer_has_a_window(target: Decoder) -> None:
    """Nothing says then how long a text may be."""
    other = Decoder(dataclasses.replace(target.config, layer_windows=(WINDOW, WINDOW)))
    other.model, other.lm_head = target.model, target.lm_head
    exact(other, prompt_of(90), 60, ways=1)
    exact(other, prompt_of(9), 60, ways=1)


@pytest.mark.slow
def test_a_step_is_one_graph_however_long_the_text(target: Decoder) -> None:
    """Compiled; the slabs of the other layers grow once."""
    prompt = prompt_of(9)
    answer = plainly(target, prompt, 200)
    engine = engine_of(target, Oracle(target, [prompt + answer], RANKS))
    assert run(engine, prompt, None, WIDE, 200) == answer
    assert engine.traces == 2


def test_a_slab_becomes_a_ring_while_an_answer_runs(
    target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_module, "SPARE", 150)  # 128 slots are a slab, 256 a ring
    exact(target, prompt_of(110), 70, ways=1)


def read_again(target: Decoder, session: Session, prompt: list[int], params: Any = None) -> int:
    """Tokens of the prompt that were read; the answer is that of a new session."""
    stats = DraftStats()
    engine = engine_of(target, None, compiled=False)
    assert run(engine, prompt, params, None, 12, session, stats) == plainly(target, prompt, 12)
    return stats.prefill_tokens


def session_of(target: Decoder, prompt: list[int], tokens: int) -> tuple[Session, list[int]]:
    session, answer = Session(), plainly(target, prompt, tokens)
    engine = engine_of(target, Oracle(target, [prompt + answer], RANKS), compiled=False)
    assert run(engine, prompt, None, WIDE, tokens, session) == answer
    assert closed(session)
    return session, prompt + answer


def test_a_session_is_cut_within_the_ring(target: Decoder) -> None:
    """What a tree or two may have written is not there any more, the rest of the ring is."""
    session, text = session_of(target, prompt_of(90), 60)
    known = len(session.tokens)
    assert read_again(target, session, [*text[: known - 3], 5, 6]) == 2
    session, text = session_of(target, prompt_of(90), 60)
    back = SPARE - WIDE.nodes - WIDE.longest - 3
    assert session._intact(known - back)
    assert read_again(target, session, [*text[: known - back], 5, 6]) == 2


def test_beyond_the_ring_the_end_of_the_prompt_is_left(target: Decoder) -> None:
    """And before that nothing."""
    prompt = prompt_of(90)
    session, text = session_of(target, prompt, 60)
    assert read_again(target, session, [*text[:100], 5, 6]) == 102 - 89
    session, text = session_of(target, prompt, 60)
    assert read_again(target, session, [*text[:60], 5, 6]) == 62
    assert read_again(target, session, [*text[:60], 5, 6, 7]) == 2


def test_an_answer_left_anywhere_leaves_a_true_session(target: Decoder) -> None:
    prompt = prompt_of(70)
    answer = plainly(target, prompt, 60)
    engine = engine_of(target, Oracle(target, [prompt + answer], RANKS), compiled=False)
    for n in (1, 2, 7, 30, 41):
        session = Session()
        assert run(engine, prompt, None, WIDE, n, session) == answer[:n]
        read_again(target, session, [*prompt, *answer[: n // 2], 9])


def test_a_ring_that_forgets_how_far_it_was_written_is_caught(
    target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, text = session_of(target, prompt_of(90), 60)
    monkeypatch.setattr(Ring, "intact", lambda *_: True)
    with pytest.raises(AssertionError):
        read_again(target, session, [*text[:100], 5, 6])


def test_trees_that_are_too_large_are_one_line(target: Decoder) -> None:
    with pytest.raises(OptionError, match="17 nodes are not possible"):
        oracle = Oracle(target, [prompt_of(9)], RANKS)
        run(engine_of(target, oracle, compiled=False), prompt_of(9), None, TreeShape(4, 5, 17), 4)


def test_several_sequences_at_once_keep_everything(target: Decoder) -> None:
    """Training reads padded sequences: their windows are masked."""
    batched = BatchedTarget(target, ())
    asked = [Request(prompt_of(n, n), 0.0, n) for n in (50, 90)]
    together = batched.write(asked, 8, set())
    for request, answer in zip(asked, together, strict=True):
        assert batched.write([request], 8, set())[0].tokens == answer.tokens
        assert plainly(target, list(request.prompt), 8) == answer.tokens


def test_a_long_text_needs_no_more_memory_than_its_window(target: Decoder) -> None:
    session, _ = session_of(target, prompt_of(200), 8)
    window, full = (mx.array(kept).shape[2] for kept in session.caches)
    assert (window, full) == (AROUND + 16, 256)
