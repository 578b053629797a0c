"""Our own Gated DeltaNet against mlx_lm, over trees, in sessions and as models are stored."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
from adapter_cases import LIMIT, figures, module_of, native_of
from conftest import RANKS, SHAPES, Oracle, engine_of, plainly, prompt_of, run
from delta_cases import DELTA_CASES, published
from expert_cases import apart
from mlx_lm import utils as mlx_lm_utils
from prefill_cases import SMALL, read_by
from tiny_models import Runner, assert_close, save

from mlx_redrafter.budget import chunks
from mlx_redrafter.cache import lineage
from mlx_redrafter.cache.recurrent import LastRows, State, TapedState
from mlx_redrafter.cache.session import Session
from mlx_redrafter.convert.base import plan_base
from mlx_redrafter.convert.checkpoint import open_checkpoint
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import ConvertError, ModelError, OptionError
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.models.batched import BatchedTarget, Request
from mlx_redrafter.models.weights import parameters
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.sparse import check_able
from mlx_redrafter.stats import DraftStats

SAMPLED = SamplingParams(temp=0.9, seed=4)
N = 24


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """mlx_lm's small compiled functions cost seconds of a C++ compiler."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def native(case: str, closed: bool = False) -> Decoder:
    raw = DELTA_CASES[case]
    return native_of(module_of(raw, lively=True), raw, closed)


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5"])
def target(request: pytest.FixtureRequest) -> Decoder:
    return native(str(request.param))


@pytest.mark.parametrize("case", DELTA_CASES)
def test_a_tree_is_what_mlx_lm_s_single_steps_are(case: str) -> None:
    assert max(figures(DELTA_CASES[case], native=True)) < LIMIT


def test_in_closed_form_too() -> None:
    found = figures(DELTA_CASES["qwen3_5"], closed=True, native=True)
    assert max(found) < LIMIT
    assert max(found) > 0, "it adds in another order: these are the steps"


@pytest.mark.parametrize("shape", ["chain", "beam-3x4-8", "lookup"])
def test_drafted_text_is_plain_text(target: Decoder, shape: str) -> None:
    prompt = prompt_of(20)
    for params in (None, SAMPLED):
        answer, stats = plainly(target, prompt, N, params), DraftStats()
        assert len(set(answer)) > 5, "a model that says one word shows nothing"
        engine = engine_of(target, Oracle(target, [prompt + answer], RANKS), compiled=False)
        assert run(engine, prompt, params, SHAPES[shape], N, stats=stats) == answer
        assert stats.accepted > 5 or shape == "lookup"


def test_a_session_is_cut_and_grows_again(target: Decoder) -> None:
    prompt = prompt_of(30, seed=1)
    answer = plainly(target, prompt)
    engine = engine_of(target, Oracle(target, [prompt + answer], RANKS), compiled=False)
    session = Session()
    assert run(engine, prompt, None, SHAPES["beam-3x4-8"], N, session) == answer
    for again in ([*session.tokens, 7, 8], [*prompt[:29], 1, 2, 3], [*prompt, *answer[:5], 9]):
        assert run(engine, again, None, SHAPES["chain"], 9, session) == plainly(target, again, 9)


def forgetful(patch: pytest.MonkeyPatch) -> None:
    """No state takes in what was accepted."""
    for kind in (State, TapedState, LastRows):
        patch.setattr(kind, "commit", lambda self, kept, *_: kept)


def of_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    """Every node goes on from the one before it in the tree."""
    patch.setattr(lineage, "parents_of", lambda a: mx.arange(-1, len(a) - 1))


def without_windows(patch: pytest.MonkeyPatch) -> None:
    """The convolution reads rows in the order of the tree."""
    patch.setattr(lineage, "windows_of", lambda parents, k: mx.arange(k + 1) + parents[:, None])


@pytest.mark.parametrize("mutate", [forgetful, of_the_neighbour, without_windows])
def test_mutations_are_caught(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, prompt = native("qwen3_5"), prompt_of(20)
    answer = plainly(target, prompt, 40)
    drafter = Oracle(target, [prompt + answer], RANKS)
    mutate(monkeypatch)
    engine = engine_of(target, drafter, compiled=False)
    assert run(engine, prompt, None, SHAPES["beam-3x4-8"], 40) != answer


def logits_of(folder: Path) -> mx.array:
    return Runner(load_model(folder))(mx.array(prompt_of(9)))


@pytest.mark.parametrize("case", DELTA_CASES)
def test_models_as_they_are_published(case: str, tmp_path: Path) -> None:
    module, raw = module_of(DELTA_CASES[case], lively=True), DELTA_CASES[case]
    weights = parameters(module)
    save(tmp_path, raw, weights)
    expected = logits_of(tmp_path)
    stored = published(weights, moe=case == "qwen3_5_moe")
    save(tmp_path, raw, apart(stored, {}) if case == "qwen3_next" else stored)
    assert_close(logits_of(tmp_path), expected, 1e-4)
    mlx_lm = mlx_lm_utils.load_model(tmp_path)[0](mx.array([prompt_of(9)]))[0]
    assert_close(mlx_lm, expected, 1e-4)
    with pytest.raises(ConvertError, match=r"run `mlx_lm.convert --hf-path .* runs as it is"):
        plan_base(open_checkpoint(tmp_path))


def test_packed_weights_of_two_precisions(tmp_path: Path) -> None:
    """The small projections stay as they are, as some publish them: two joined ones are left."""
    raw = copy.deepcopy(DELTA_CASES["qwen3_next"])
    module = module_of(raw, lively=True)
    nn.quantize(
        module,
        32,
        8,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and "_ba" not in path,
    )
    raw["quantization"] = {"group_size": 32, "bits": 8}
    raw["quantization"] |= {f"model.layers.{i}.linear_attn.in_proj_ba": False for i in range(3)}
    save(tmp_path, raw, parameters(module))
    model = load_model(tmp_path)
    mixer = model.model.layers[0].linear_attn
    assert {"in_proj_qkvz", "in_proj_ba"} <= mixer.keys() and "in_proj_z" not in mixer
    prompt = mx.array(prompt_of(20))
    assert_close(Runner(model)(prompt), module(prompt[None])[0], 1e-4)


def test_what_does_not_fit_is_said_in_a_line(tmp_path: Path) -> None:
    raw = copy.deepcopy(DELTA_CASES["qwen3_5"])
    weights = parameters(module_of(raw))
    raw["text_config"]["num_attention_heads"] = 7
    raw["text_config"]["num_key_value_heads"] = 7
    save(tmp_path, raw, weights)
    with pytest.raises(ModelError, match=r"q_proj.weight of shape .* does not fit config.json"):
        load_model(tmp_path)
    raw["text_config"]["linear_num_key_heads"] = 3
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="3 heads of keys and 4 of values; needed: a multiple"):
        load_model(tmp_path)


def test_several_sequences_in_a_pass(target: Decoder) -> None:
    """Padding changes neither a state nor what a convolution reads."""
    prompts = [prompt_of(n, seed=n) for n in (4, 17, 9)]
    batched = BatchedTarget(target, (0, 3))
    batched._pass = batched._run
    answers = batched.write([Request(p, 0.0, 1) for p in prompts], 8, ())
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == plainly(target, prompt, 8)
    read = batched.read([(p, a.tokens) for p, a in zip(prompts, answers, strict=True)])
    for ours, answer in zip(read, answers, strict=True):
        assert np.allclose(ours, answer.features, atol=2e-3)


def test_attention_layers_read_a_prompt_sparsely(target: Decoder) -> None:
    """With every key as densely, with fewer not; the recurrent layers read all of it."""
    prompt = prompt_of(7 * 16 + 1)  # the last token too
    expected, _, _ = read_by(target, prompt)
    for local, same in ((512, True), (16, False)):
        options = SparsePrefill("a_shape", **{**SMALL, "local": local})
        hidden, session, stats = read_by(target, prompt, options)
        assert stats is not None and stats.sparse_layers == stats.sparse_chunks == 2
        assert bool(mx.abs(hidden - expected).max().item() < 1e-4) == same
        assert session.stand == len(prompt) - 1
    with pytest.raises(OptionError, match="has recurrent layers"):
        check_able(target.config)


def test_a_chunk_is_timed_alone(target: Decoder) -> None:
    """And not with all that is before it, where a state cannot be cut."""
    once = chunks._reading(target, 8, 40)
    for _ in range(2):
        once()
        session = inspect.getclosurevars(once).nonlocals["session"]
        assert (len(session.tokens), session.stand) == (40, 40)
