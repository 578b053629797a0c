"""mlx_lm's own modules over a draft tree: every type that it has, against its single steps.

The few types of `QUICK`, one of each class, are looked at every time; all of them are slow.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
from adapter_cases import LIMIT, TYPES, ancestors_of, figures, module_of
from conftest import SHAPES, engine_of, prompt_of, run
from mlx.utils import tree_flatten, tree_reduce
from tiny_models import build

from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.cache.lineage import parents_of, windows_of
from mlx_redrafter.cache.recurrent import TapedState
from mlx_redrafter.errors import ModelError, OptionError
from mlx_redrafter.models import AdaptedModel, Decoder, load_model, patches, registry
from mlx_redrafter.models.running import Running
from mlx_redrafter.prefill.config import SparsePrefill

QUICK = (
    "llama", "qwen3_moe", "gpt_oss", "gemma4_text", "deepseek_v3", "qwen3_next", "kimi_linear",
    "mamba2", "lfm2", "gpt2",
)  # fmt: skip
CANNOT_BE_BUILT = {"olmo": "mlx_lm wants another package for it"}
ON_METAL = {} if mx.metal.is_available() else {"bitnet", "muse_spark"}  # kernels without another


@pytest.fixture(autouse=True, scope="module")
def uncompiled() -> Iterator[None]:
    """mlx_lm's small compiled functions cost seconds of a C++ compiler for every type."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("kind", QUICK)
def test_a_tree_is_what_single_steps_are(kind: str) -> None:
    assert max(figures(TYPES[kind])) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", sorted(TYPES.keys() - {*QUICK, *ON_METAL} - registry.DECLINED.keys())
)
def test_every_type(kind: str) -> None:
    assert max(figures(TYPES[kind])) < LIMIT


@pytest.mark.parametrize("kind", ["qwen3_next", "kimi_linear", "mamba2"])
def test_the_closed_forms_too(kind: str) -> None:
    found = figures(TYPES[kind], closed=True)
    assert max(found) < LIMIT
    assert max(found) > 0, "they add in another order: these are the steps"


def test_every_type_of_mlx_lm_is_looked_at() -> None:
    assert {*TYPES, *CANNOT_BE_BUILT} >= {*registry.mlx_lm_types()}
    assert {*TYPES} >= registry.DECLINED.keys()


def test_parents_and_windows_of_random_trees() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        parents = [-1] + [int(rng.integers(0, i)) for i in range(1, 9)]
        found = parents_of(ancestors_of(parents)[0])
        assert found.tolist() == parents
        for node, row in enumerate(windows_of(found, 3).tolist()):
            path, at = [], node
            while at >= 0:
                path.insert(0, at + 3)
                at = parents[at]
            assert row == [0, 1, 2, *path][-4:]


def test_a_state_that_nothing_was_accepted_of_stays() -> None:
    cache = TapedState((1, 2, 3, 4), mx.float32)
    kept = mx.random.normal((1, 2, 3, 4))
    waiting = cache.nothing(kept, 5)
    after = cache.commit(kept, waiting, mx.full((5,), 99), mx.array([7]))
    assert np.array_equal(after, kept)


def test_patches_are_gone_behind_a_pass_and_behind_an_error() -> None:
    """And another thread never sees them."""
    module = module_of(TYPES["qwen3_next"])
    model = AdaptedModel(module, TYPES["qwen3_next"])
    before = [getattr(place.owner, place.name) for place in model._places]
    elsewhere = []

    def look(run: Running, stock: object) -> object:
        def call(*args: object, **options: object) -> None:
            rotated = lambda: elsewhere.append(nn.RoPE(4)(mx.zeros((1, 1, 4))))  # noqa: E731
            thread = threading.Thread(target=rotated)
            thread.start()
            thread.join()
            raise RuntimeError("a fault within a pass")

        return call

    model._places.append(patches.Place(mx.fast, "rope", look))
    pass_ = Pass([], mx.array([0]), mx.array([[True]]))
    running = Running([], pass_, mx.array([0]), mx.array([[True]]), mx.array([0]))
    with pytest.raises(RuntimeError, match="a fault"), patches.patched(running, model._places):
        mx.fast.rope(mx.zeros((1, 1, 4)), 4)
    model._places.pop()
    assert [getattr(place.owner, place.name) for place in model._places] == before
    assert elsewhere[0].shape == (1, 1, 4)


def layer_outputs(target: Decoder) -> list[np.ndarray]:
    """Of the first and the last layer, and the final hidden states, over nine tokens."""
    slots, at = mx.arange(128, dtype=mx.int32), mx.arange(9, dtype=mx.int32)
    run = Pass(new_caches(target.caches, 128, target.dtype), mx.array([0], mx.int32))
    layers = (0, target.config.num_layers - 1)
    hidden, outputs = target(at, at, slots <= at[:, None], slots, run, layers)
    return [np.array(x) for x in (hidden, *outputs)]


def test_what_a_class_has_of_its_parent_is_so_again() -> None:
    class Parent:
        def name(self) -> str:
            return "parent"

    class Child(Parent):
        pass

    def other(run: Running, stock: Any) -> Any:
        return lambda self: f"other {stock(self)}"

    places = [patches.Place(cls, "name", other) for cls in (Parent, Child)]
    with patches.patched(cast(Running, None), places):
        assert Parent().name() == "other parent"
    assert Parent().name() == Child().name() == "parent"
    assert "name" not in vars(Child)


@pytest.mark.parametrize("case", ["llama", "gemma2", "smollm3"])
def test_a_native_type_through_the_adapter_says_the_same(case: str, tmp_path: Path) -> None:
    build(tmp_path, case)
    native, other = load_model(tmp_path), load_model(tmp_path, native=False)
    assert isinstance(other, AdaptedModel)
    assert not isinstance(native, AdaptedModel)
    prompt = prompt_of(20)
    texts = [
        run(engine_of(t, None, compiled=False), prompt, None, None, 20) for t in (native, other)
    ]
    assert texts[0] == texts[1]
    hidden = mx.random.normal((3, native.config.hidden_size))
    ids = mx.array([3, 1, 4])
    product = hidden @ native.head_rows(ids).T
    for ours, theirs in (
        (other.logits(hidden), native.logits(hidden)), (other.embed(ids), native.embed(ids)),
        (other.head_rows(ids), native.head_rows(ids)),
        (other.scaled(product), native.scaled(product)),
        (other.norm(hidden), native.model.norm(hidden)),
    ):  # fmt: skip
        assert np.allclose(np.array(ours), np.array(theirs), atol=1e-5)
    read = [layer_outputs(target) for target in (native, other)]
    for ours, theirs in zip(*read, strict=True):
        assert np.allclose(ours, theirs, atol=1e-5)
    size = sum(value.nbytes for _, value in tree_flatten(other.parameters()))
    assert (
        tree_reduce(lambda n, x: n + x.nbytes if isinstance(x, mx.array) else n, other, 0) == size
    )
    for name in ("hidden_size", "vocab_size", "num_layers", "num_heads", "num_kv_heads", "tied"):
        assert getattr(other.config, name) == getattr(native.config, name), name


def test_sparse_reading_is_declined_in_a_line(tmp_path: Path) -> None:
    build(tmp_path, "llama")
    target = load_model(tmp_path, native=False)
    engine = engine_of(target, None, compiled=False)
    sparse = SparsePrefill("a_shape", min_context=64)
    with pytest.raises(OptionError, match="needed: --sparse-prefill off"):
        run(engine, prompt_of(400), None, SHAPES["chain"], 5, sparse_prefill=sparse)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("lama", ["'lama'", "does not have it either", "llama"]),
        ("plamo3", ["'plamo3'", "window", "mlx_lm.generate"]),
        ("phi3small", ["'phi3small'", "blocks"]),
    ],
)
def test_what_nothing_runs_is_said_in_a_line(kind: str, words: list[str], tmp_path: Path) -> None:
    config = build(tmp_path, "llama")
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(ModelError) as error:
        load_model(tmp_path)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
