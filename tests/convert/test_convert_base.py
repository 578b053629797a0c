"""Base models in Hugging Face layout, of every supported type, become what mlx-lm would write."""

from __future__ import annotations

import contextlib
import gc
import json

import fake_torch
import mlx.core as mx
import pytest
from expert_cases import apart
from mlx_lm.convert import convert as mlx_lm_convert
from mlx_lm.utils import load_model as load_mlx_lm
from tiny_models import CASES, build

from mlx_redrafter.convert import writer
from mlx_redrafter.convert.base import convert_base, plan_base
from mlx_redrafter.convert.checkpoint import open_checkpoint
from mlx_redrafter.convert.writer import output_folder
from mlx_redrafter.errors import ConvertError
from mlx_redrafter.hub import builtin
from mlx_redrafter.models import load_model

# Those with recurrent layers are left to mlx-lm: tests/models/test_delta.py.
TYPES = {config["model_type"]: case for case, config in reversed(CASES.items())}


def weights_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= mx.load(str(file))
    return found


def source_of(tmp_path, case, stored=mx.float32, **changes):
    folder = tmp_path / "original"
    folder.mkdir()
    build(folder, case, stored, **changes)
    return folder


def write_shards(folder, config, weights, count=3, torch=False):
    """What transformers' save_pretrained leaves: numbered files and an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = ("pytorch_model", "bin") if torch else ("model", "safetensors")
    where = {}
    names = list(weights)
    for i in range(count):
        file = f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}"
        part = {name: weights[name] for name in names[i::count]}
        if torch:
            fake_torch.save(folder / file, part)
        else:
            mx.save_safetensors(str(folder / file), part, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def hf_form(config, weights):
    """Weights in mlx-lm's names -> a checkpoint as people have it, with what has to go."""
    kind, extra = config["model_type"], {}
    if kind == "gemma3":
        weights = {f"model.{n}".replace("model.model.", "model."): w for n, w in weights.items()}
        weights = {
            n.replace("language_model.model", "language_model"): w for n, w in weights.items()
        }
        extra = {n: mx.ones((2, 2)) for n in ("model.vision_tower.a", "multi_modal_projector.b")}
    elif kind in ("llama", "mistral", "olmo2", "qwen2", "smollm3"):
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones((8,))}
    return {**weights, **extra}, set(extra)


def run(source, out, bits=None, group_size=64, dtype=None, progress=lambda done, total: None):
    with output_folder(out, source) as folder:
        checkpoint = open_checkpoint(source)
        plan = plan_base(checkpoint)
        convert_base(
            plan, checkpoint, folder, bits=bits, group_size=group_size, dtype=dtype,
            progress=progress,
        )  # fmt: skip
        return plan.mappings(checkpoint.shape)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert mx.array_equal(value, expected[name]), name


@pytest.mark.parametrize("torch", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_sharded_checkpoints_of_every_type(tmp_path, monkeypatch, kind, torch):
    original = source_of(tmp_path, TYPES[kind], mx.bfloat16)
    config = json.loads((original / "config.json").read_text())
    weights = weights_of(original)
    stored, superfluous = hf_form(config, weights)
    source = write_shards(tmp_path / "source", config, stored, torch=torch)
    if torch:
        fake_torch.install(monkeypatch)
    seen = []
    mapping = run(source, tmp_path / "out", progress=lambda *step: seen.append(step))
    assert_same(weights_of(tmp_path / "out"), weights)
    load_mlx_lm(tmp_path / "out")
    assert load_model(tmp_path / "out").config == load_model(original).config
    assert {m.source for m in mapping} == stored.keys()
    assert {m.source for m in mapping if not m.target} == superfluous
    assert seen[0][0] == 0 and seen[-1] == (len(weights), len(weights))
    checkpoint = open_checkpoint(source)
    assert mapping == plan_base(checkpoint).mappings(checkpoint.shape)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_single_files(tmp_path, monkeypatch, name):
    fake_torch.install(monkeypatch)
    source = source_of(tmp_path, "qwen3")
    weights = weights_of(source)
    if name.endswith(".bin"):
        (source / "model.safetensors").unlink()
        fake_torch.save(source / name, weights)
    run(source, tmp_path / "out")
    assert_same(weights_of(tmp_path / "out"), weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3"


def add_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<u>": 1}, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a", "unk_token": "<u>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", CASES)
def test_quantised_to_the_bit_as_mlx_lm_would(tmp_path, case, bits):
    # Granite asks for groups of 64 in two places; elsewhere 96 columns stay unquantised then.
    granite = case == "granite"
    size = {"intermediate_size": 128} if granite else {}
    source = source_of(tmp_path, case, torch_dtype="float16", eos_token_id=5, **size)
    add_tokenizer(source)
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    group_size = 64 if granite or bits == 8 else 32
    with contextlib.redirect_stdout(None):
        mlx_lm_convert(
            str(source), str(tmp_path / "theirs"), quantize=True, q_bits=bits,
            q_group_size=group_size,
        )  # fmt: skip
    run(source, tmp_path / "ours", bits, group_size)
    theirs, ours = weights_of(tmp_path / "theirs"), weights_of(tmp_path / "ours")
    assert any(name.endswith(".scales") for name in ours)
    assert_same(ours, theirs)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "ours" / name).read_text()) == json.loads(
            (tmp_path / "theirs" / name).read_text()
        )
    load_model(tmp_path / "ours")


@pytest.mark.parametrize("bits", [None, 4])
def test_experts_are_stacked(tmp_path, bits):
    """One by one in shards, as Hugging Face has them, and in any order."""
    original = source_of(tmp_path, "qwen3_moe", mx.bfloat16)
    weights = weights_of(original)
    config = json.loads((original / "config.json").read_text())
    source = write_shards(tmp_path / "source", config, apart(weights, {}))
    run(source, tmp_path / "ours", bits, 32)
    run(original, tmp_path / "theirs", bits, 32)
    assert_same(weights_of(tmp_path / "ours"), weights_of(tmp_path / "theirs"))
    lacking = apart(weights, {})
    del lacking["model.layers.0.mlp.experts.2.up_proj.weight"]
    with pytest.raises(ConvertError, match=r"lacks experts of .*up_proj"):
        run(write_shards(tmp_path / "lacking", config, lacking), tmp_path / "none")


def test_layouts_that_mlx_lm_converts_are_named(tmp_path):
    original = source_of(tmp_path, "gpt_oss")
    weights = weights_of(original)
    config = json.loads((original / "config.json").read_text())
    for name in [n for n in weights if ".experts.up_proj" in n]:
        del weights[name]
    with pytest.raises(ConvertError, match=r"run `mlx_lm.convert --hf-path"):
        run(write_shards(tmp_path / "source", config, weights), tmp_path / "out")


def test_the_stored_dtype_is_kept_and_another_one_is_recorded(tmp_path):
    source = source_of(tmp_path, "qwen2", mx.bfloat16, torch_dtype="bfloat16")
    run(source, tmp_path / "same")
    assert {w.dtype for w in weights_of(tmp_path / "same").values()} == {mx.bfloat16}
    run(source, tmp_path / "other", dtype=mx.float32)
    expected = {n: w.astype(mx.float32) for n, w in weights_of(source).items()}
    assert_same(weights_of(tmp_path / "other"), expected)
    assert json.loads((tmp_path / "other" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("stored", "said", "asked", "expected"),
    [
        (mx.float32, None, None, mx.bfloat16),
        (mx.float32, "float32", None, mx.bfloat16),
        (mx.float32, "bfloat16", None, mx.bfloat16),
        (mx.float16, None, None, mx.float16),
        (mx.float16, "float32", None, mx.float16),
        (mx.float32, None, mx.float16, mx.float16),
        (mx.float32, "bfloat16", mx.float32, mx.float32),
    ],
)
def test_scales_have_16_bits_unless_more_are_asked_for(tmp_path, stored, said, asked, expected):
    source = source_of(tmp_path, "llama", stored, **({"torch_dtype": said} if said else {}))
    run(source, tmp_path / "out", bits=4, group_size=32, dtype=asked)
    found = weights_of(tmp_path / "out")
    assert {value.dtype for value in found.values()} == {mx.uint32, expected}
    plain = weights_of(source)["model.layers.0.mlp.up_proj.weight"].astype(expected)
    for part, value in zip(("weight", "scales", "biases"), mx.quantize(plain, 32, 4), strict=True):
        assert mx.array_equal(found[f"model.layers.0.mlp.up_proj.{part}"], value)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("torch_dtype") == (str(expected).rpartition(".")[2] if said else None)


def test_one_matrix_of_16_bits_decides_for_all(tmp_path):
    source = source_of(tmp_path, "llama")
    weights = weights_of(source)
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(mx.float16)
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    run(source, tmp_path / "out", bits=4, group_size=32)
    kinds = {value.dtype for value in weights_of(tmp_path / "out").values()}
    assert kinds == {mx.uint32, mx.float16}


def test_rows_that_no_group_fits_are_refused(tmp_path):
    source = source_of(tmp_path, "llama", hidden_size=64, intermediate_size=96)
    with pytest.raises(ConvertError, match="multiple of 128, so none can be quantised"):
        run(source, tmp_path / "out", bits=4, group_size=128)


def test_fused_projections_are_cut(tmp_path):
    source = source_of(tmp_path, "llama-untied-biases")
    weights = weights_of(source)
    fused = dict(weights)
    for layer in ("model.layers.0.", "model.layers.1."):
        for last in ("weight", "bias"):
            for whole, parts in (
                ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
                ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
            ):
                block = whole.split(".")[0]
                rows = [fused.pop(f"{layer}{block}.{part}.{last}") for part in parts]
                fused[f"{layer}{whole}.{last}"] = mx.concatenate(rows)
    config = json.loads((source / "config.json").read_text())
    mapping = run(write_shards(tmp_path / "fused", config, fused), tmp_path / "out")
    assert_same(weights_of(tmp_path / "out"), weights)
    cut = [m for m in mapping if m.source == "model.layers.1.self_attn.qkv_proj.weight"]
    assert [(m.target.split(".")[-2], m.shape, m.note) for m in cut] == [
        ("q_proj", (64, 64), "rows 0 to 63"),
        ("k_proj", (32, 64), "rows 64 to 95"),
        ("v_proj", (32, 64), "rows 96 to 127"),
    ]


def test_a_tied_head_is_dropped_and_an_untied_one_kept(tmp_path):
    source = source_of(tmp_path, "llama")
    config = json.loads((source / "config.json").read_text())
    weights = weights_of(source)
    stored = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    mapping = run(write_shards(tmp_path / "tied", config, stored), tmp_path / "out")
    assert_same(weights_of(tmp_path / "out"), weights)
    assert [(m.source, m.note) for m in mapping if not m.target] == [
        ("lm_head.weight", "tied to the embedding")
    ]
    # transformers takes a Llama's head as untied where config.json is silent, mlx-lm as tied.
    del config["tie_word_embeddings"]
    stored["lm_head.weight"] = 2 * stored["lm_head.weight"]
    run(write_shards(tmp_path / "silent", config, stored), tmp_path / "untied")
    assert_same(weights_of(tmp_path / "untied"), stored)
    assert load_model(tmp_path / "untied").config.tied is False


def damaged(tmp_path, case="llama", drop=(), add=None, **changes):
    source = source_of(tmp_path, case)
    config = {**json.loads((source / "config.json").read_text()), **changes}
    weights = {n: w for n, w in weights_of(source).items() if n not in drop}
    return write_shards(tmp_path / "source", config, {**weights, **(add or {})})


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"
SCALES = GATE.replace("weight", "scales")
QWEIGHT, ONES = GATE.replace("weight", "qweight"), mx.ones((96, 8), mx.uint32)
BROKEN = {
    "missing": ({"drop": [NORM]}, f"lacks {NORM}"),
    "left-over": (
        {"add": {"model.layers.0.extra.weight": mx.ones((2,))}},
        "extra.weight left over",
    ),
    "shape": ({"add": {GATE: mx.ones((95, 64))}}, r"gate_proj.weight \(95, 64\) instead of \(96"),
    "integers": ({"add": {GATE: mx.ones((96, 64), mx.int8)}}, "quantised by another program"),
    "gptq": (
        {"add": {QWEIGHT: ONES}, "quantization_config": {"quant_method": "gptq"}},
        "quantised by 'gptq'",
    ),
    "mlx": ({"add": {GATE: ONES, SCALES: mx.ones((96, 1))}}, "a quantised MLX model already"),
    "type": ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    "twice": ({"add": {f"language_model.{NORM}": mx.ones((64,))}}, "under two names"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, name):
    changes, message = BROKEN[name]
    source = damaged(tmp_path, **changes)
    for attempt in (
        lambda: plan_base(open_checkpoint(source)),
        lambda: run(source, tmp_path / "out"),
    ):
        with pytest.raises(ConvertError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original", "source"]


def test_an_impossible_group_size_is_one_line(tmp_path):
    source = source_of(tmp_path, "granite")  # 96 columns that granite wants in groups of 64
    with pytest.raises(ConvertError, match="choose another --q-group-size") as caught:
        run(source, tmp_path / "out", bits=4, group_size=32)
    assert "\n" not in str(caught.value)


def test_files_beside_the_weights(tmp_path):
    source = source_of(tmp_path, "olmo2")
    add_tokenizer(source)
    content = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 7}
    (source / "tokenizer_config.json").write_text(json.dumps(content))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    for name in ("LICENSE.txt", "generation_config.json", "modeling_olmo.py", "training_args.bin"):
        (source / name).write_text("{}")
    run(source, tmp_path / "out")
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert files == {
        "LICENSE.txt", "additional_chat_templates/tools.jinja", "chat_template.jinja",
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    # transformers would rebuild GPT2Tokenizer with GPT-2's splitter instead of the stored one.
    copied = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert copied == {**content, "tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("torch", [False, True], ids=["safetensors", "bin"])
def test_only_what_waits_to_be_written_is_in_memory(tmp_path, monkeypatch, torch, bits):
    original = source_of(
        tmp_path, "llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=6
    )
    config = json.loads((original / "config.json").read_text())
    source = write_shards(tmp_path / "source", config, weights_of(original), 4, torch)
    if torch:
        fake_torch.install(monkeypatch)
    waiting, largest, total = 4_000_000, 1024 * 512 * 4, 60_000_000
    monkeypatch.setattr(writer, "_PENDING_BYTES", waiting)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run(source, tmp_path / "out", bits)
    assert mx.get_peak_memory() - before < waiting + 4 * largest < total / 4


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("torch", [False, True], ids=["safetensors", "bin"])
def test_the_built_in_model_from_shards(tmp_path, monkeypatch, torch):
    from mlx_redrafter import generate, load

    original = builtin.ensure("cpu")
    weights = weights_of(original)
    config = json.loads((original / "config.json").read_text())
    source = write_shards(tmp_path / "source", config, weights, torch=torch)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (source / name).symlink_to(original / name)
    if torch:
        fake_torch.install(monkeypatch)
    run(source, tmp_path / "out")
    assert_same(weights_of(tmp_path / "out"), weights)
    monkeypatch.undo()
    texts = []
    for folder in (original, tmp_path / "out"):
        model, tokenizer = load(str(folder), drafter=None)
        texts.append(generate(model, tokenizer, "The capital of France is", max_tokens=24))
    assert texts[0] == texts[1] and len(texts[0]) > 20
