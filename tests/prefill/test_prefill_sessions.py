"""What is written and kept after a sparse prefill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from conftest import RANKS, SHAPES, Oracle, engine_of, prompt_of, run
from prefill_cases import MODES, SMALL, TRIANGLEMIX, XATTENTION, rows
from tiny_models import build

from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.reading import read
from mlx_redrafter.prefill.sparse import SparseAttention
from mlx_redrafter.stats import DraftStats


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temp=0.8, seed=3)], ids=str)
@pytest.mark.parametrize("mode", ["trianglemix", "xattention", "minference"])
def test_drafted_text_after_a_sparse_prefill_is_the_plain_text_after_it(
    target: Decoder, mode: str, params: SamplingParams
) -> None:
    prompt, options = prompt_of(300, seed=5), MODES[mode]
    stats = DraftStats()
    plain = run(
        engine_of(target, None, compiled=False), prompt, params, None, 24, None, stats,
        sparse_prefill=options,
    )  # fmt: skip
    assert stats.sparse_prefill is not None
    assert stats.sparse_prefill.sparse_layers > 0
    assert stats.sparse_prefill.density < 0.9
    layers, accepted = stats.sparse_prefill.sparse_layers, 0
    # It finds its place by hidden states of dense reading: right sometimes, which is enough.
    drafter = Oracle(target, [prompt + plain], RANKS)
    engine = engine_of(target, drafter, compiled=False)
    for name in ("chain", "beam-3x4-8", "beam-and-lookup"):
        stats = DraftStats()
        drafted = run(engine, prompt, params, SHAPES[name], 24, None, stats, sparse_prefill=options)
        assert stats.sparse_prefill is not None
        assert stats.sparse_prefill.sparse_layers == layers  # none while drafting and verifying
        assert drafted == plain
        accepted += stats.accepted
    assert accepted > 0


def turn(
    target: Decoder, prompt: list[int], session: Session, options: SparsePrefill | None
) -> int:
    """One request; how many prompt tokens it had to read."""
    stats = DraftStats()
    run(
        engine_of(target, None, compiled=False), prompt, None, None, 3, session, stats,
        sparse_prefill=options,
    )  # fmt: skip
    return stats.prefill_tokens


def test_a_sparse_prefix_serves_only_its_own_configuration(target: Decoder) -> None:
    prompt = prompt_of(200)
    longer = prompt + prompt_of(60, seed=2)
    for second, kept in ((XATTENTION, 198), (TRIANGLEMIX, 32), (None, 32)):
        session = Session()
        assert turn(target, prompt, session, XATTENTION) == 200
        assert (session.tag, session.sparse_from) == (XATTENTION.tag, 32)
        assert turn(target, prompt, session, second) == 200 - kept  # what is before 32 is dense
        assert session.tag == (second.tag if second else "")
        if second is None:
            fresh_one = Session()
            turn(target, prompt, fresh_one, None)
            assert np.allclose(rows(session), rows(fresh_one), atol=1e-4)
    session = Session()
    turn(target, prompt, session, None)
    assert turn(target, longer, session, XATTENTION) == 60  # a dense prefix serves everybody
    assert (session.tag, session.sparse_from) == (XATTENTION.tag, 208)
    session.trim(150)
    assert session.tag == ""
    assert turn(target, prompt, session, None) == 50


def test_a_prompt_too_short_to_be_sparse_leaves_a_dense_session(target: Decoder) -> None:
    session = Session()
    turn(target, prompt_of(30), session, XATTENTION)
    assert session.tag == ""


def test_an_interrupt_within_a_sparse_pass_leaves_an_empty_session(
    target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slabs were handed over; one between passes leaves what was read."""
    prompt, session = prompt_of(200), Session()

    def interrupted(self: SparseAttention, layer: int, chunk: Any) -> str:
        if layer == 1 and chunk.offset >= 96:
            raise KeyboardInterrupt
        return "interrupted later"

    with monkeypatch.context() as patch:
        patch.setattr(SparseAttention, "choose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(engine_of(target, None, compiled=False), prompt, None, None, 3, session,
                step_size=64, sparse_prefill=XATTENTION)  # fmt: skip
    assert (session.tokens, session.caches, session.tag) == ([], [], "")
    again, fresh_one = Session(), Session()
    engine = engine_of(target, None, compiled=False)
    for one in (session, fresh_one, again):
        run(engine, prompt, None, None, 3, one, sparse_prefill=XATTENTION)
    assert np.array_equal(rows(session), rows(fresh_one))


@pytest.mark.parametrize("handed_over", [True, False])
def test_a_pass_that_reads_back_does_not_copy_the_slabs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handed_over: bool
) -> None:
    """xattention evaluates each layer on the way. With a name for the old slabs all are copied."""
    build(tmp_path, "llama", num_hidden_layers=4, max_position_embeddings=1 << 17)
    target, prompt = load_model(tmp_path), prompt_of(97)
    if not handed_over:
        monkeypatch.setattr(Session, "take", lambda self: self.caches)
    session = Session().open(target.caches, 1 << 16, target.dtype)
    mx.eval(session.caches, target.parameters())
    sparse = SparseAttention(
        SparsePrefill("xattention", **{**SMALL, "tau": 0.3, "start_layer": 0}), target.config
    )
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    read(target, prompt, session, 64, sparse=sparse)
    assert sparse.stats.sparse_layers == 4
    slab = session.caches[0].nbytes
    assert ((mx.get_peak_memory() - before) < slab / 2) == handed_over
