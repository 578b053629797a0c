"""How a GGUF file stretches its positions: every key is read, or the file is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf_files import gguf_of, run
from tiny_gguf import BOOL, F32, STRING, U32, metadata, write_gguf
from tiny_models import build

from mlx_redrafter.convert.gguf import GgufPlan
from mlx_redrafter.errors import ConvertError
from mlx_redrafter.models import load_model

CONTEXT = 8192  # of the tiny file
LINEAR = {"type": "linear", "rope_type": "linear", "factor": 4.0}
YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": CONTEXT,
}
TYPE, FACTOR, OLD = "scaling.type", "scaling.factor", "scale_linear"
ORIGINAL = "scaling.original_context_length"
FAST, SLOW = "scaling.yarn_beta_fast", "scaling.yarn_beta_slow"


def written(tmp_path, keys):
    kinds = {str: STRING, float: F32, bool: BOOL, int: U32}
    changed = {f"llama.rope.{key}": (kinds[type(value)], value) for key, value in keys.items()}
    write_gguf(tmp_path / "x.gguf", metadata(**changed))
    return tmp_path / "x.gguf"


READ = {
    "nothing": ({}, CONTEXT, None),
    "linear": ({TYPE: "linear", FACTOR: 4.0}, CONTEXT, LINEAR),
    "linear, from a shorter context": (
        {TYPE: "linear", FACTOR: 4.0, ORIGINAL: 2048}, 2048, LINEAR,
    ),
    "the old key": ({OLD: 4.0}, CONTEXT, LINEAR),
    "the old key beside the new one": ({OLD: 4.0, FACTOR: 4.0}, CONTEXT, LINEAR),
    "the old key says nothing": ({OLD: 1.0, FACTOR: 4.0}, CONTEXT, LINEAR),
    "a factor without a type": ({FACTOR: 4.0}, CONTEXT, LINEAR),
    "a whole factor": ({TYPE: "linear", FACTOR: 4}, CONTEXT, LINEAR),
    "yarn without its original length": ({TYPE: "yarn", FACTOR: 4.0}, CONTEXT, YARN),
    "yarn": (
        {TYPE: "yarn", FACTOR: 4.0, ORIGINAL: 2048}, CONTEXT,
        {**YARN, "original_max_position_embeddings": 2048},
    ),
    "yarn with the old factor": ({TYPE: "yarn", OLD: 4.0}, CONTEXT, YARN),
    "yarn with its bounds": (
        {TYPE: "yarn", FACTOR: 4.0, FAST: 16.0, SLOW: 2.0}, CONTEXT,
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
    "yarn with usual extras": (
        {TYPE: "yarn", FACTOR: 4.0, FAST: 32.0, "scaling.yarn_ext_factor": 1.0,
         "scaling.attn_factor": 1.0, "scaling.yarn_log_multiplier": 0.0}, CONTEXT, YARN,
    ),
    "none": ({TYPE: "none"}, CONTEXT, None),
    "a factor of one": ({TYPE: "yarn", FACTOR: 1.0, ORIGINAL: 2048}, CONTEXT, None),
    "a factor of zero is none": ({FACTOR: 0.0, OLD: 0.0}, CONTEXT, None),
    "what changes nothing": (
        {"scaling.finetuned": True, ORIGINAL: CONTEXT, "scale": 1.0}, CONTEXT, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_scaling_keys_that_are_read(tmp_path, name):
    keys, length, scaling = READ[name]
    run(written(tmp_path, keys), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_scaling"]) == (length, scaling)
    load_model(tmp_path / "out")


LIMITS = {
    "nothing": CONTEXT,
    "linear": 4 * CONTEXT,
    "linear, from a shorter context": CONTEXT,
    "the old key": 4 * CONTEXT,
    "yarn without its original length": 4 * CONTEXT,
    "yarn": CONTEXT,
    "a factor of one": CONTEXT,
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_context_follows(tmp_path, name):
    run(written(tmp_path, READ[name][0]), tmp_path / "out")
    assert load_model(tmp_path / "out").config.max_positions == LIMITS[name]


REFUSED = {
    "linear without a factor": ({TYPE: "linear"}, "scaling 'linear' without a factor"),
    "yarn without a factor": ({TYPE: "yarn", ORIGINAL: 2048}, "scaling 'yarn' without a factor"),
    "another type": ({TYPE: "longrope", FACTOR: 2.0}, "scaling 'longrope'; needed: linear or yarn"),
    "another type without a factor": ({TYPE: "dynamic"}, "scaling 'dynamic'"),
    "an original length alone": ({ORIGINAL: 2048}, "original context length of 2048 without"),
    "a factor and none": ({TYPE: "none", FACTOR: 4.0}, "factor of 4, and scaling 'none'"),
    "two factors": ({OLD: 2.0, FACTOR: 4.0}, "two scaling factors, 4 and 2"),
    "a factor below one": ({FACTOR: 0.5}, "factor of 0.5; needed: 1 or more"),
    "a negative factor": ({OLD: -4.0}, "factor of -4; needed"),
    "no number": ({FACTOR: float("nan")}, "scaling.factor is nan; needed: a finite number"),
    "text": ({FACTOR: "four"}, "scaling.factor is 'four'; needed: a finite number"),
    "bounds of yarn alone": ({FAST: 16.0}, "bounds of a yarn scaling without its type"),
    "an attention factor": ({TYPE: "yarn", FACTOR: 4.0, "scaling.attn_factor": 1.2}, "attn_factor"),
    "no extrapolation": (
        {TYPE: "yarn", FACTOR: 4.0, "scaling.yarn_ext_factor": 0.0},
        "yarn_ext_factor is 0.0, which is not read",
    ),
    "an early draft's key": ({"scale": 4.0}, "rope.scale is 4.0, which is not read"),
    "an unknown key": ({"scaling.alpha": 1000.0}, "rope.scaling.alpha is 1000.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_scaling_keys_that_are_refused(tmp_path, name):
    keys, message = REFUSED[name]
    with pytest.raises(ConvertError, match=message) as caught:
        GgufPlan(written(tmp_path, keys))
    assert "\n" not in str(caught.value)


ONES = {"rope_freqs.weight": ("F32", (8,), np.ones(8, "<f4").tobytes())}
EIGHT = {"rope_freqs.weight": ("F32", (8,), np.full(8, 8, "<f4").tobytes())}


@pytest.mark.parametrize(
    ("factors", "keys", "expected"),
    [
        (ONES, {}, None),
        (EIGHT, {}, "factors of its own .rope_freqs.weight., which are not Llama 3's"),
        (ONES, {FACTOR: (F32, 4.0)}, "both rope_freqs.weight and a scaling factor of 4"),
        (ONES, {OLD: (F32, 4.0)}, "both rope_freqs.weight and a scaling factor of 4"),
        (ONES, {TYPE: (STRING, "yarn")}, "scaling 'yarn' without a factor"),
    ],
)
def test_factors_of_every_frequency(tmp_path, factors, keys, expected):
    folder = tmp_path / "model"
    folder.mkdir()
    build(folder, "llama")
    keys = {f"llama.rope.{key}": value for key, value in keys.items()}
    path = gguf_of(tmp_path / "x.gguf", folder, "F32", **factors, **keys)
    if expected is None:
        assert GgufPlan(path).config["rope_scaling"] is None
        return
    with pytest.raises(ConvertError, match=expected):
        GgufPlan(path)


def test_llama_3_factors_from_another_first_length(tmp_path):
    """The original length that the file names is the one its factors are reckoned with."""
    folder = tmp_path / "model"
    folder.mkdir()
    build(folder, "llama", rope_theta=500000.0)
    inverse = []
    for i in range(8):
        turns = 256 / (2 * np.pi * 500000.0 ** (i / 8))
        share = np.clip((turns - 1) / 3, 0, 1)
        inverse.append((1 - share) / 8 + share)
    stored = np.array(1 / np.array(inverse), "<f4")
    factors = {"rope_freqs.weight": ("F32", (8,), stored.tobytes())}
    path = gguf_of(
        tmp_path / "x.gguf", folder, "F32", **factors, **{f"llama.rope.{ORIGINAL}": (U32, 256)}
    )
    scaling = GgufPlan(path).config["rope_scaling"]
    assert (scaling["factor"], scaling["original_max_position_embeddings"]) == (8.0, 256)
    with pytest.raises(ConvertError, match="which are not Llama 3's"):
        GgufPlan(gguf_of(tmp_path / "y.gguf", folder, "F32", **factors))
