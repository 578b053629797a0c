"""Drafter folders: Apple's layout against plain numpy, ours there and back, and every error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import D, V, engine_of, prompt_of, random_drafter, run
from edits import POINTER, Edit, edit_config, edit_entry, edit_file, edit_weights, edits

from mlx_redrafter.drafters import beam
from mlx_redrafter.drafters.loading import load_drafter, save_drafter
from mlx_redrafter.drafters.recurrent import ReDrafter
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.models import Decoder
from mlx_redrafter.tree.nodes import END
from mlx_redrafter.tree.shape import TreeShape

Weights = dict[str, np.ndarray]
E = 24


def write(folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {name: mx.array(value) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


def apple_folder(folder: Path, rnn: bool, exit_dim: int, blocks: int) -> Weights:
    """A folder as Apple's `save_pretrained` leaves it, with random weights."""
    config = {
        "model_type": "recurrent_drafting_drafter", "architectures": ["Drafter"],
        "vocab_size": V, "hidden_size": D, "exit_dim": exit_dim, "num_draft_layers": blocks,
        "num_lookback_tokens": -1, "rnn": rnn, "emb_norm": True, "torch_dtype": "float32",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {f"lm_head.{blocks}.weight": (V, exit_dim)}
    for i in range(blocks):
        shapes[f"lm_head.{i}.linear.weight"] = (exit_dim, exit_dim)
        shapes[f"lm_head.{i}.linear.bias"] = (exit_dim,)
    if exit_dim != 2 * D:
        shapes |= {"input_proj.weight": (exit_dim, 2 * D), "input_proj.bias": (exit_dim,)}
    if rnn:
        shapes |= {"rnn_u.weight": (D, D), "rnn_u.bias": (D,), "rnn_w.weight": (D, D)}
    rng = np.random.default_rng(blocks)
    weights = {
        name: (rng.standard_normal(shape) * 1.5 / shape[-1] ** 0.5).astype(np.float32)
        for name, shape in shapes.items()
    }
    unused = {"emb_norm.weight": np.ones(D, np.float32)}
    write(folder, config, {**weights, **unused})
    return weights


def apple_forward(
    w: Weights, embedding: np.ndarray, h: np.ndarray, tokens: list[int]
) -> list[np.ndarray]:
    """Logits after every token, as rd/modeling_drafter.py computes them (facts 2.2), float64."""

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    w = {name: value.astype(np.float64) for name, value in w.items()}
    state, out = np.zeros(D), []
    for token in tokens:
        e = embedding[token]
        if "rnn_u.weight" in w:
            state = silu(w["rnn_w.weight"] @ e + w["rnn_u.weight"] @ state + w["rnn_u.bias"])
        else:
            state = e + state
        x = np.concatenate([h, state])
        if "input_proj.weight" in w:
            x = w["input_proj.weight"] @ x + w["input_proj.bias"]
        block = 0
        while f"lm_head.{block}.linear.weight" in w:
            linear = w[f"lm_head.{block}.linear.weight"], w[f"lm_head.{block}.linear.bias"]
            x = x + silu(linear[0] @ x + linear[1])
            block += 1
        out.append(w[f"lm_head.{block}.weight"] @ x)
    return out


def logits_along(drafter: ReDrafter, h: np.ndarray, tokens: list[int]) -> list[np.ndarray]:
    state, fixed = drafter.start(mx.array(h.astype(np.float32)))
    out = []
    for token in tokens:
        logits, state = drafter.step(mx.array([token], mx.int32), state, fixed)
        out.append(np.array(logits[0]))
    return out


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
@pytest.mark.parametrize("exit_dim", [2 * D, E], ids=["full", "projected"])
@pytest.mark.parametrize("rnn", [True, False], ids=["elman", "sum"])
def test_apples_folder_against_numpy(
    target: Decoder, tmp_path: Path, rnn: bool, exit_dim: int, blocks: int
) -> None:
    weights = apple_folder(tmp_path, rnn, exit_dim, blocks)
    drafter = load_drafter(tmp_path, target)
    embedding = np.array(target.model.embed_tokens.weight).astype(np.float64)
    h, tokens = np.random.default_rng(5).standard_normal(D), [3, 96, 3, 50]
    expected = apple_forward(weights, embedding, h, tokens)
    for mine, theirs in zip(logits_along(drafter, h, tokens), expected, strict=True):
        assert np.allclose(mine, theirs, atol=2e-4 * np.abs(theirs).max())


def test_apples_beam_search_against_numpy(target: Decoder, tmp_path: Path) -> None:
    """Facts 2.3: joint log-probabilities, the best W of W x V at every level."""
    weights = apple_folder(tmp_path, True, E, 2)
    embedding = np.array(target.model.embed_tokens.weight).astype(np.float64)
    h, width, depth = np.random.default_rng(6).standard_normal(D), 3, 4
    beams: list[tuple[float, list[int]]] = [(0.0, [8])]
    for _ in range(depth):
        grown = []
        for score, tokens in beams:
            row = apple_forward(weights, embedding, h, tokens)[-1]
            row = row - row.max() - np.log(np.exp(row - row.max()).sum())
            grown += [(score + row[t], [*tokens, t]) for t in range(V)]
        beams = sorted(grown, key=lambda b: -b[0])[:width]
    context, root = mx.array(h.astype(np.float32)), mx.array([8], mx.int32)
    shape = TreeShape(width, depth, 1 + width * depth)
    found = beam.search(load_drafter(tmp_path, target), context, root, shape)
    for i, (score, sequence) in enumerate(beams):
        assert np.isclose(-found[depth].costs[i].item(), score, atol=1e-3)
        assert found[depth].paths[i].tolist() == [*sequence, END]


OURS: dict[str, dict[str, Any]] = {
    "elman": {"cell": "elman"},
    "sum": {"cell": "sum", "exit_dim": 32, "num_draft_layers": 0},
    "gru": {"cell": "gru", "num_draft_layers": 2},
    "context-layers": {"cell": "gru", "context_layers": (0, 2)},
    "reduced-own": {"draft_vocab_size": 40},
    "reduced-target": {"draft_vocab_size": 40, "head": "target", "exit_dim": 96},
    "target-head": {"head": "target", "exit_dim": D},
    "everything": {
        "cell": "gru", "context_layers": (1,), "draft_vocab_size": 64, "head": "target",
        "exit_dim": 64, "num_draft_layers": 2,
    },
}  # fmt: skip


def one_draft(drafter: ReDrafter) -> list[np.ndarray]:
    """Everything a draft step reads: context, logits of two steps, token ids, a selection."""
    rng = np.random.default_rng(7)
    hidden = mx.array(rng.standard_normal((2, D)).astype(np.float32))
    inner = tuple(
        mx.array(rng.standard_normal((2, D)).astype(np.float32)) for _ in drafter.features
    )
    context = drafter.context(mx.concatenate(inner or (hidden,), axis=-1))
    assert context.shape == (2, D)
    state, fixed = drafter.start(context[1])
    first, state = drafter.step(mx.array([3], mx.int32), state, fixed)
    state = mx.concatenate([state, state])
    second, _ = drafter.step(mx.array([4, 90], mx.int32), state, fixed)
    size = drafter.config.output_size
    assert first.shape == (1, size) and second.shape == (2, size)
    ids = drafter.token_ids(mx.arange(size))
    chosen = drafter.vocabulary
    assert ids.tolist() == chosen.tolist()
    return [np.array(x) for x in (context, first, second, ids)]


@pytest.mark.parametrize("config", OURS.values(), ids=OURS)
def test_saved_and_loaded_is_the_same(
    target: Decoder, tmp_path: Path, config: dict[str, Any]
) -> None:
    drafter = random_drafter(target, **config)
    save_drafter(tmp_path, drafter, {"note": "ignored by the reader"})
    loaded = load_drafter(tmp_path, target)
    assert loaded.config == drafter.config
    assert loaded.features == config.get("context_layers", ())
    for mine, theirs in zip(one_draft(drafter), one_draft(loaded), strict=True):
        assert np.array_equal(mine, theirs)
    steps = engine_of(target, loaded, compiled=False)
    prompt = prompt_of(7)
    assert run(steps, prompt, None, TreeShape(), 6) == run(steps, prompt, max_tokens=6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "name", ["elman", "gru", "context-layers", "reduced-own", "reduced-target", "everything"]
)
def test_quantised_and_loaded(target: Decoder, tmp_path: Path, name: str, bits: int) -> None:
    """The loaded drafter computes with the quantised weights, whatever it unpacks them to."""
    config = {"exit_dim": 96, **OURS[name]}
    drafter = random_drafter(target, **config)
    exact = one_draft(drafter)
    nn.quantize(drafter, group_size=32, bits=bits)
    drafter.bind(target)
    block = {"group_size": 32, "bits": bits}
    save_drafter(tmp_path, drafter, {"quantization": block})
    loaded = one_draft(load_drafter(tmp_path, target))
    for packed, mine in zip(one_draft(drafter), loaded, strict=True):
        assert np.allclose(packed, mine, atol=1e-3 * max(1, np.abs(packed).max()))
    assert not np.allclose(loaded[1], exact[1], atol=1e-4)  # it was quantised
    near = np.abs(loaded[1] - exact[1]).mean() / np.abs(exact[1]).mean()
    assert near < (0.6 if bits == 4 else 0.06)


def test_a_projection_whose_halves_share_a_group(target: Decoder) -> None:
    """Hidden 32, groups of 64: the stored projection of [h, s] cannot be cut between words."""
    drafter = random_drafter(target, exit_dim=64 + 64, draft_vocab_size=40)
    nn.quantize(drafter, 64, 8, class_predicate=lambda path, _: path == "input_proj")
    packed = one_draft(drafter.bind(target))
    layer = drafter.input_proj
    whole = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=64, bits=8)
    plain = nn.Linear(2 * D, 128)
    plain.weight, plain.bias = whole, layer.bias
    drafter.input_proj = plain
    for mine, theirs in zip(packed, one_draft(drafter.bind(target)), strict=True):
        assert np.allclose(mine, theirs, atol=1e-4)


# --- errors -----------------------------------------------------------------------------------


@pytest.fixture
def folder(target: Decoder, tmp_path: Path) -> Path:
    """A good drafter with a context layer and a draft vocabulary, to be broken by a test."""
    config = {"context_layers": (0, 2), "draft_vocab_size": 40, "exit_dim": E}
    save_drafter(tmp_path, random_drafter(target, **config))
    return tmp_path


WEIGHTS = "model.safetensors"
BROKEN: dict[str, tuple[Edit, str]] = {
    "hidden size": (edit_config(hidden_size=64), "hidden size 64.*32"),
    "vocabulary": (edit_config(vocab_size=98), "vocabulary size 98.*97"),
    "layer beyond": (edit_config(context_layers=[0, 3]), "layer 3"),
    "layer negative": (edit_config(context_layers=[-1, 2]), "layer -1"),
    "layers no list": (edit_config(context_layers=2), "context_layers"),
    "a base model": (edit_config(model_type="llama"), "'llama' is not a drafter"),
    "no model type": (edit_config(model_type=None), "is not a drafter"),
    "no exit_dim": (edit_config(exit_dim=None), "exit_dim"),
    "zero size": (edit_config(exit_dim=0), "impossible"),
    "huge size": (edit_config(exit_dim=10**12), "exit_dim 1000000000000 is an impossible size"),
    "blocks without end": (edit_config(num_draft_layers=10**9), "impossible size"),
    "size as text": (edit_config(exit_dim="24"), "impossible|exit_dim"),
    "blocks as text": (edit_config(num_draft_layers="1"), "impossible|num_draft_layers"),
    "blocks negative": (edit_config(num_draft_layers=-1), "impossible"),
    "unknown cell": (edit_config(cell="lstm"), "'lstm'"),
    "unknown head": (edit_config(head="shared"), "'shared'"),
    "quantisation without bits": (
        edits(
            edit_weights(lambda w: w.update({"rnn_w.scales": mx.zeros((32, 1))})),
            edit_config(quantization={"group_size": 32}),
        ),
        "quantization|bits",
    ),
    "other width": (edit_config(exit_dim=48), "input_proj|lm_head"),
    "other cell": (edit_config(cell="gru"), "rnn_"),
    "fewer blocks": (edit_config(num_draft_layers=0), "lm_head"),
    "more blocks": (edit_config(num_draft_layers=2), "lm_head"),
    "missing": (edit_weights(lambda w: w.pop("rnn_u.bias")), "lacks.*rnn_u.bias"),
    "unknown": (edit_weights(lambda w: w.update(extra=mx.zeros((2,)))), "extra"),
    "wrong shape": (
        edit_weights(lambda w: w.update({"rnn_w.weight": mx.zeros((8, 8))})),
        r"rnn_w.weight \(8, 8\) instead of \(32, 32\)",
    ),
    "NaN": (edit_entry("rnn_w.weight", np.nan), "NaN.*rnn_w.weight"),
    "infinity": (edit_entry("context_proj.weight", np.inf), "infinity.*context_proj"),
    "truncated": (edit_file(WEIGHTS, lambda b: b[:-100]), "truncated"),
    "not safetensors": (edit_file(WEIGHTS, lambda b: b"PK" * 40), "not a safetensors"),
    "in LFS": (edit_file(WEIGHTS, lambda b: POINTER), "Git LFS pointer"),
    "no weights": (edit_file(WEIGHTS, lambda b: None), "safetensors"),
    "no config": (edit_file("config.json", lambda b: None), "config.json"),
    "broken config": (edit_file("config.json", lambda b: b"{"), "config.json"),
    "config of a list": (edit_file("config.json", lambda b: b"[]"), "config.json"),
    "ids too large": (edit_entry("draft_vocab", V), "draft vocabulary|beyond"),
    "ids negative": (edit_entry("draft_vocab", -1), "draft vocabulary|beyond"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_can_be_wrong_with_a_folder(target: Decoder, folder: Path, case: str) -> None:
    load_drafter(folder, target)  # good before it is broken
    spoil, said = BROKEN[case]
    spoil(folder)
    with pytest.raises(DrafterError, match=said) as caught:
        load_drafter(folder, target)
    assert "\n" not in str(caught.value)


def test_no_folder(target: Decoder, tmp_path: Path) -> None:
    with pytest.raises(DrafterError, match="nothing"):
        load_drafter(tmp_path / "nothing", target)


def test_unused_keys_and_tensors_are_ignored(target: Decoder, tmp_path: Path) -> None:
    apple_folder(tmp_path, True, E, 1)
    exact = one_draft(load_drafter(tmp_path, target))
    edit_config(another=[1, 2], num_lookback_tokens=3)(tmp_path)
    edit_config(quantization={"group_size": 32, "bits": 4})(tmp_path)  # nothing is packed
    for mine, theirs in zip(one_draft(load_drafter(tmp_path, target)), exact, strict=True):
        assert np.array_equal(mine, theirs)


def test_half_precision_is_read(target: Decoder, tmp_path: Path) -> None:
    apple_folder(tmp_path, True, E, 1)
    exact = one_draft(load_drafter(tmp_path, target))

    def halve(weights: dict[str, mx.array]) -> None:
        weights.update({name: value.astype(mx.bfloat16) for name, value in weights.items()})

    edit_weights(halve)(tmp_path)
    halved = one_draft(load_drafter(tmp_path, target))
    assert halved[1].dtype == np.float32
    assert np.abs(halved[1] - exact[1]).mean() < 0.05 * np.abs(exact[1]).mean()
