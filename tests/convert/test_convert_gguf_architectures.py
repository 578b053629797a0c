"""A GGUF file of every architecture is the model that llama.cpp's converter made it of."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from gguf_architectures import CASES, gguf_like, made
from gguf_files import run, weights_of
from mlx_lm.utils import load_model as load_mlx_lm
from tiny_gguf import F32, I32, STRING, U32
from tiny_models import Runner, tokens_of

from mlx_redrafter.convert.gguf import GgufPlan
from mlx_redrafter.errors import ConvertError
from mlx_redrafter.hub.gguf.architectures import ARCHITECTURES
from mlx_redrafter.models import SUPPORTED, load_model


@pytest.mark.parametrize("case", CASES)
def test_an_architecture(tmp_path, case):
    folder = made(tmp_path, case)
    run(gguf_like(tmp_path / "x.gguf", folder, case), tmp_path / "out")
    expected, found = weights_of(folder), weights_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Norms are stored as weight + 1 by some, decays as -exp(A_log): that rounds.
        assert found[name].shape == value.shape
        error = mx.abs(found[name] - value).max().item()
        assert error <= (3e-7 if name.endswith(("norm.weight", "A_log")) else 0.0), name
    tokens = tokens_of(12)
    theirs = [load_mlx_lm(f)[0](tokens[None]) for f in (folder, tmp_path / "out")]
    assert mx.abs(theirs[0]).max() > 0.1
    assert mx.abs(theirs[0] - theirs[1]).max() <= 1e-5 * mx.abs(theirs[0]).max()
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind in SUPPORTED:
        ours = [Runner(load_model(f))(tokens) for f in (folder, tmp_path / "out")]
        assert mx.abs(ours[0] - ours[1]).max() <= 1e-5 * mx.abs(ours[0]).max()


def test_every_architecture_is_tested():
    assert {arch for arch, _, _ in CASES.values()} == ARCHITECTURES.keys() - {"qwen3vlmoe"}


def test_a_layer_that_drafts_is_left_out(tmp_path):
    folder = made(tmp_path, "glm4_moe")
    path = tmp_path / "x.gguf"
    more = {
        "glm4moe.block_count": (U32, 3),
        "glm4moe.nextn_predict_layers": (U32, 1),
        "blk.2.nextn.eh_proj.weight": ("F32", (64, 128), bytes(4 * 64 * 128)),
        "blk.2.attn_q.weight": ("F32", (64, 64), bytes(4 * 64 * 64)),
    }
    mapping = run(gguf_like(path, folder, "glm4_moe", **more), tmp_path / "out")
    assert weights_of(tmp_path / "out").keys() == weights_of(folder).keys()
    notes = [m.note for m in mapping if not m.target]
    assert notes == ["of a layer that drafts"] * 2


def test_keys_that_nobody_reads_are_left_out(tmp_path):
    """Gemma 4's last layers read those of earlier ones; files have theirs too."""
    folder = made(tmp_path, "gemma4_text")
    more = {"blk.5.attn_k.weight": ("F32", (64, 64), bytes(4 * 64 * 64))}
    mapping = run(gguf_like(tmp_path / "x.gguf", folder, "gemma4_text", **more), tmp_path / "out")
    assert weights_of(tmp_path / "out").keys() == weights_of(folder).keys()
    notes = {m.source: m.note for m in mapping if not m.target}
    assert notes["blk.5.attn_k.weight"] == "of a layer that reads an earlier one's"


@pytest.mark.parametrize(("kind", "dtype"), [("F16", mx.float16), ("BF16", mx.bfloat16)])
def test_numbers_of_16_bits_stay_what_they_are(tmp_path, kind, dtype):
    """In the file's type, though its routers have 32."""
    folder = made(tmp_path, "gpt_oss")
    run(gguf_like(tmp_path / "x.gguf", folder, "gpt_oss", kind), tmp_path / "out")
    found = weights_of(tmp_path / "out")
    for name, value in weights_of(folder).items():
        assert mx.array_equal(found[name], value.astype(dtype)), name


def test_gemma_does_not_fit_float16(tmp_path):
    """Its activations: a real one in float16 gives other tokens."""
    folder = made(tmp_path, "gemma3_text")
    plan = GgufPlan(gguf_like(tmp_path / "x.gguf", folder, "gemma3_text", "Q8_0"))
    assert plan.dtype == mx.bfloat16
    assert (
        GgufPlan(gguf_like(tmp_path / "x.gguf", folder, "gemma3_text", "F16")).dtype == plan.dtype
    )


REFUSED = {
    "another scaling": (
        "qwen3", {"qwen3.rope.scaling.type": (STRING, "longrope")}, "rope scaling 'longrope'",
    ),
    "a scaling that mlx_lm does not read": (
        "qwen3_moe",
        {
            "qwen3moe.rope.scaling.type": (STRING, "yarn"),
            "qwen3moe.rope.scaling.factor": (F32, 4.0),
            "qwen3moe.rope.scaling.original_context_length": (U32, 64),
        },
        "stretches its positions .yarn., which a model of type qwen3_moe cannot",
    ),
    "a missing tensor": ("qwen3", {"blk.0.attn_q_norm.weight": None}, "lacks model.layers.0.self"),
    "a tensor of another shape": (
        "gemma3_text",
        {"blk.0.attn_q.weight": ("F32", (32, 64), bytes(4 * 32 * 64))},
        "q_proj.weight .32, 64. instead of .64, 64.",
    ),
    "a key that nothing reads": (
        "qwen3", {"qwen3.attention.clamp_kqv": (F32, 8.0)}, "attention.clamp_kqv is '8.0', which",
    ),
    "a soft cap that Gemma 3 has not": (
        "gemma3_text", {"gemma3.final_logit_softcapping": (F32, 30.0)}, "final_logit_softcapping",
    ),
    "other scores of experts": (
        "gpt_oss", {"gpt-oss.expert_gating_func": (U32, 1)}, "another function of its experts",
    ),
    "DeepSeek 2": ("deepseek_v3", {"deepseek2.expert_gating_func": (U32, 1)}, "not DeepSeek V3's"),
    "keys and values as one": (
        "deepseek_v3", {"deepseek2.attention.key_length_mla": None}, "stored as one",
    ),
    "another factor of long texts": (
        "phi3-longrope", {"phi3.rope.scaling.attn_factor": (F32, 1.0)}, "attn_factor is 1; needed",
    ),
    "long factors alone": (
        "phi3-longrope", {"rope_factors_short.weight": None}, "without rope_factors_short.weight",
    ),
    "a size that nothing has": (
        "deepseek_v3", {"deepseek2.expert_shared_count": (I32, -1)}, "sizes that no deepseek_v3",
    ),
    "heads of nothing": ("phi", {"phi2.embedding_length": (U32, 3)}, "4 heads of 3 entries"),
    "windows everywhere": (
        "gemma4_text", {"gemma4.attention.sliding_window_pattern": (U32, 1)}, "in all layers, or",
    ),
    "sizes in no order": (
        "gemma4_text", {"gemma4.feed_forward_length": (U32, [96, 96, 64, 96, 96, 96])},
        "inner sizes in no known order",
    ),
    "windows in no order": (
        "gemma3_text",
        {"gemma3.attention.sliding_window_pattern": (7, [True, False, False, True, True, True])},
        "windows in no fixed order",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, name):
    case, changed, message = REFUSED[name]
    path = gguf_like(tmp_path / "x.gguf", made(tmp_path, case), case, **changed)
    with pytest.raises(ConvertError, match=message) as caught:
        GgufPlan(path)
    assert "\n" not in str(caught.value)
