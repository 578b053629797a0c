"""Which kernels attention asks MLX for on Metal, and that what they are given is the same sum."""

from __future__ import annotations

from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from tiny_models import C, assert_close, build, tokens_of

from mlx_redrafter.budget import chunks
from mlx_redrafter.cache.session import Session
from mlx_redrafter.models import attention, decoder_config, load_model
from mlx_redrafter.prefill.reading import read
from mlx_redrafter.runtime import metal

TOLERANCE = 1e-5


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """As on a GPU; the list grows by (shape of queries, of keys, of the mask or what stands for
    it) of every call of MLX's function, which refuses what no kernel of Metal's takes."""
    calls: list[tuple[Any, ...]] = []
    original = mx.fast.scaled_dot_product_attention

    def fused(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        mask = options["mask"]
        calls.append((q.shape, k.shape, mask if isinstance(mask, str) else mask.shape))
        kernel = metal.attention_kernel(q.shape[2], q.shape[1], k.shape[1], q.shape[3])
        assert kernel != metal.UNFUSED, calls[-1]
        return original(q, k, v, **options)

    monkeypatch.setattr(attention, "fused_kernels", lambda: True)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", fused)
    return calls


@pytest.mark.parametrize(
    ("shape", "calls"),
    [
        ((1, 32, 8, 128), [1]), ((8, 32, 8, 128), [8]), ((9, 32, 8, 128), [9]),
        ((4, 28, 4, 128), [4]), ((5, 28, 4, 128), [2, 3]), ((8, 64, 8, 128), [4, 4]),
        ((7, 40, 8, 128), [3, 4]), ((6, 40, 8, 128), [6]), ((6, 12, 2, 128), [3, 3]),
        ((8, 32, 1, 64), [1] * 8), ((1, 64, 1, 64), []), ((8, 32, 8, 80), []),
        ((9, 32, 8, 80), [9]), ((9, 8, 4, 256), []), ((8, 8, 4, 256), [8]), ((1, 9, 3, 32), []),
    ],
)  # fmt: skip
def test_queries_are_split_for_the_vector_kernel(
    shape: tuple[int, int, int, int], calls: list[int]
) -> None:
    """(queries, heads, heads of keys, size): Qwen2.5-7B has 28, 4, 128."""
    assert metal.attention_calls(*shape) == calls
    assert not calls or sum(calls) == shape[0]


@pytest.mark.parametrize("seen", ["tree", "causal"])
@pytest.mark.parametrize("queries", [5, 7, 8])
def test_split_calls_give_what_one_does(
    queries: int, seen: str, asked: list[tuple[Any, ...]]
) -> None:
    """Fails where a call gets the masks of others, or a causal one all keys."""
    rng = np.random.default_rng(queries)
    heads, kv_heads, size = 14, 2, 64
    q, slab = (
        mx.array(rng.standard_normal(shape).astype(np.float32))
        for shape in ((heads, queries, size), (1, 2 * kv_heads, C, size))
    )
    mask = None
    if seen == "tree":
        mask = mx.array(np.arange(C) <= rng.integers(3, C, (queries, 1)))
    found = attention.attend(q, slab, mask, 0.2, 0.0)
    assert len(asked) == 2
    whole = attention._attend_fused(q, slab, mask, 0.2, None, [min(queries, 4), queries - 4])
    rest = attention._attend_unfused(q, slab, mask, 0.2, 0.0, attention.softmax, None)
    for expected in (whole, rest):
        assert_close(found, expected, TOLERANCE)


def test_sizes_without_a_kernel_read_keys_once_per_head(asked: list[tuple[Any, ...]]) -> None:
    rng = np.random.default_rng(0)
    q = mx.array(rng.standard_normal((8, 3, 80)).astype(np.float32))
    slab = mx.array(rng.standard_normal((1, 4, C, 80)).astype(np.float32))
    assert attention.attend(q, slab, None, 0.1, 0.0).shape == (3, 640)
    assert not asked


@pytest.mark.parametrize("windows", [False, True])
def test_a_prompt_is_read_without_a_mask(
    windows: bool, asked: list[tuple[Any, ...]], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, but for layers with a window; what comes out is what masks give."""
    build(tmp_path, "gemma3_text" if windows else "llama")
    monkeypatch.setattr(metal, "_FULL_SIZES", (16,))
    monkeypatch.setattr(metal, "_VECTOR_SIZES", (16,))
    model, prompt = load_model(tmp_path), tokens_of(40).tolist()
    session = Session().open(model.caches, C, model.dtype)
    last = read(model, prompt, session, 13).hidden
    kinds = {mask if isinstance(mask, str) else "array" for _, _, mask in asked}
    assert kinds == ({"causal", "array"} if windows else {"causal"})
    assert {keys[2] for _, keys, mask in asked if mask == "causal"} == {13, 26, 39}
    monkeypatch.setattr(attention, "fused_kernels", lambda: False)
    again = Session().open(model.caches, C, model.dtype)
    assert_close(last, read(model, prompt, again, 13).hidden, TOLERANCE)


def test_scores_of_a_size_without_a_kernel_bound_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Metal too: 32k tokens of gemma3's 8 heads of 256 are 1 MB a token of the chunk."""
    monkeypatch.setattr(chunks, "fused_kernels", lambda: True)
    sizes = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 97,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "rope_theta": 1e4,
    }  # fmt: skip
    fits, wide = (decoder_config({**sizes, "head_dim": size}) for size in (128, 256))
    assert chunks.most(fits, 2**18) == max(chunks.SIZES)
    assert chunks.most(fits, 2**18, packed=True) < max(chunks.SIZES)
    assert 4 * 8 * 2**18 * chunks.most(wide, 2**18) <= 2**30
