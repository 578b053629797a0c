"""Quantised keys and values: rows alone, attention over them, and what cannot be kept so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.cache import QuantizedKVCache
from tiny_models import Runner, assert_close, build, tokens_of

from mlx_redrafter.cache import packed as packing_module
from mlx_redrafter.cache.layer import Pass
from mlx_redrafter.cache.packed import Packed, PackedSlab, Packing, packed, plain
from mlx_redrafter.cache.recurrent import State
from mlx_redrafter.cache.slabs import Slab
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import attention, latent, load_model

HEADS, SIZE, ROOM = 2, 64, 48
BITS = pytest.mark.parametrize("bits", [8, 4])


def kind_of(bits: int, group: int = 32) -> PackedSlab:
    return PackedSlab(Slab(2 * HEADS, SIZE), Packing(bits, group))


def rows_of(n: int, seed: int = 0) -> mx.array:
    return mx.random.normal((1, 2 * HEADS, n, SIZE), key=mx.random.key(seed))


def same(ours: Any, theirs: Any) -> bool:
    return all(mx.array_equal(a, b).item() for a, b in zip(ours, theirs, strict=True))


@BITS
def test_rows_are_quantised_alone_and_moved_as_they_are(bits: int) -> None:
    """At once, one by one, or written as a tree's nodes and committed: the same to the bit."""
    kind, rows = kind_of(bits), rows_of(6)
    whole = Pass([kind.empty(16, mx.float32)], mx.array([3]))
    seen = whole.extend(0, kind, rows)
    single = [kind.empty(16, mx.float32)]
    for i in range(6):
        one = Pass(single, mx.array([3 + i]))
        one.extend(0, kind, rows[:, :, i : i + 1])
        single = one.caches
    assert same(whole.caches[0], single[0])
    assert seen.shape == (1, 2 * HEADS, 16, SIZE)
    limit = 0.02 if bits == 8 else 0.3
    assert 0 < mx.abs(plain(seen)[:, :, 3:9] - rows).max().item() < limit
    assert not mx.any(plain(seen)[:, :, 9:])  # an empty slot still enters 0 x value
    # Nodes 0, 2 and 5 were accepted, and a pass of one more row follows.
    slots = mx.array([3, 12, 4, 12, 12, 5])
    after = Pass(whole.caches, mx.array([6]), pending=(whole.rows, slots))
    after.extend(0, kind, rows_of(1, 9))
    fresh = Pass([kind.empty(16, mx.float32)], mx.array([3]))
    accepted = mx.concatenate([rows[:, :, i : i + 1] for i in (0, 2, 5)], axis=2)
    fresh.extend(0, kind, mx.concatenate([accepted, rows_of(1, 9)], axis=2))
    assert same((x[:, :, :7] for x in after.caches[0]), (x[:, :, :7] for x in fresh.caches[0]))
    larger = kind.grow(after.caches[0], 24)
    assert kind.capacity(larger) == 24 and kind.grow(larger, 24)[0] is larger[0]


@BITS
def test_unpacking_is_mlx_own(bits: int) -> None:
    parts = mx.quantize(rows_of(9, 2), 64, bits)
    ours = Packed(tuple(parts), Packing(bits)).plain()  # type: ignore[arg-type]
    assert mx.array_equal(ours, mx.dequantize(*parts, group_size=64, bits=bits))


def attended(bits: int, n: int, **more: Any) -> tuple[mx.array, mx.array, Packed]:
    """q (H, n, Dh), a mask (n, S) of a few branches, and packed rows of more slots."""
    kind = kind_of(bits)
    run = Pass([kind.empty(ROOM, mx.float32)], mx.array([0]))
    seen = run.extend(0, kind, rows_of(ROOM - 8, 5))
    mask = mx.arange(ROOM - 4) < 30 + mx.arange(n)[:, None]
    return mx.random.normal((4, n, SIZE), key=mx.random.key(1)), mask, seen


@BITS
@pytest.mark.parametrize("sinks", [None, mx.array([0.3, -1.0, 2.0, 0.0])], ids=["", "sinks"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_products_of_quantised_rows_are_those_of_unpacked_ones(
    monkeypatch: pytest.MonkeyPatch, bits: int, sinks: mx.array | None, softcap: float
) -> None:
    """The form of a GPU, run here; and its rows alone are what they are together."""
    q, mask, seen = attended(bits, 5)
    expected = attention.attend(q, plain(seen), mask, 0.1, softcap, sinks=sinks)
    assert mx.array_equal(attention.attend(q, seen, mask, 0.1, softcap, sinks=sinks), expected)
    monkeypatch.setattr(attention, "fused_kernels", lambda: True)
    products = attention.attend(q, seen, mask, 0.1, softcap, sinks=sinks)
    assert_close(products, expected, 1e-5)
    single = [
        attention.attend(q[:, i : i + 1], seen, mask[i : i + 1], 0.1, softcap, sinks=sinks)
        for i in range(5)
    ]
    assert mx.array_equal(mx.concatenate(single), products)


@BITS
def test_latent_attention_over_quantised_rows(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """Keys and values are one row; the values are its beginning."""
    q, mask, seen = attended(bits, 3)
    one = seen[:, :1]
    expected = latent._attend(q, plain(one), mask, 0.1, 48)
    assert mx.array_equal(latent._attend(q, one, mask, 0.1, 48), expected)
    monkeypatch.setattr(attention, "fused_kernels", lambda: True)
    assert_close(latent._attend(q, one, mask, 0.1, 48), expected, 1e-5)


@BITS
def test_logits_are_those_of_mlx_lm_with_such_a_cache(tmp_path: Path, bits: int) -> None:
    build(tmp_path, "llama", head_dim=32)
    model = load_model(tmp_path)
    model.pack(Packing(bits, 32))
    reference, _ = mlx_lm_utils.load_model(tmp_path)
    cache: Any = [QuantizedKVCache(group_size=32, bits=bits) for _ in reference.layers]
    ours = Runner(model)
    for tokens in (tokens_of(20), *tokens_of(4, seed=2)[:, None]):
        assert_close(ours(tokens), reference(tokens[None], cache=cache)[0], 2e-4)


def test_only_slabs_are_quantised() -> None:
    state = State((1, 4), mx.float32)
    kinds = packed([Slab(4, 64), state], Packing(8))
    assert kinds == [PackedSlab(Slab(4, 64), Packing(8)), state]
    assert packing_module.packed([state], Packing(8)) == [state]


@pytest.mark.parametrize(
    ("given", "words"),
    [((3,), "kv_bits 3 is not possible: use 8 or 4"), ((8, 48), "kv_group_size 48 is not possible"),
     ((16,), "kv_bits 16"), ((True,), "kv_bits"), (("8",), "kv_bits '8' is not a whole number")],
)  # fmt: skip
def test_other_bits_and_groups_are_one_line(given: tuple[Any, ...], words: str) -> None:
    with pytest.raises(OptionError) as caught:
        Packing(*given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "group", "use"),
    [((96,), 64, "give a kv group size of 32"), ((128, 64), 128, "give a kv group size of 64"),
     ((80,), 64, "leave out kv bits")],
)  # fmt: skip
def test_rows_that_do_not_divide_are_one_line(sizes: tuple[int, ...], group: int, use: str) -> None:
    with pytest.raises(OptionError, match=use):
        packed([Slab(2, size) for size in sizes], Packing(8, group))
