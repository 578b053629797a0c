"""The budget of a decode step, and that what counts it can be wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny_medusa
import tiny_speculators
from conftest import random_drafter, write_target
from typer.testing import CliRunner

from mlx_redrafter.bench.counts import kinds, metal, parts, passes, prompt, report, sizes
from mlx_redrafter.bench.counts.graph import graph, metal_shaped
from mlx_redrafter.cli import main as cli
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters import Drafter, beam
from mlx_redrafter.drafters.loading import save_drafter
from mlx_redrafter.drafters.lookup import Lookup
from mlx_redrafter.drafters.recurrent import ReDrafter, ReDrafterConfig
from mlx_redrafter.models import Decoder, decoder_config, load_model
from mlx_redrafter.tree.shape import DEFAULT, TEXT, TreeShape

CHAIN = TreeShape.chain(4)
# Dispatches of a step to those of a plain step (378), as it is; never to rise.
USUAL_TO_PLAIN, DEFAULT_TO_PLAIN, CHAIN_TO_PLAIN = 1.435, 1.57, 1.285
BESIDE_VERIFY = 160


@pytest.fixture(scope="module")
def built_in() -> tuple[Decoder, ReDrafter]:
    """The built-in model's layers, quantised as on Metal, and the shipped drafter's shape; thin."""
    target = Decoder(
        decoder_config(
            {
                "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
                "num_hidden_layers": 30, "num_attention_heads": 6, "num_key_value_heads": 2,
                "head_dim": 64, "vocab_size": 8192, "rms_norm_eps": 1e-5,
                "max_position_embeddings": 8192, "rope_theta": 10000.0,
                "tie_word_embeddings": True,
            }
        )
    )  # fmt: skip
    for block in target.model.layers:
        block.self_attn.fuse()
        block.mlp.fuse()
    config = ReDrafterConfig(64, 8192, 64, 2, "gru", "context", (2, 15, 29), "own", 7168)
    drafter = ReDrafter(config)
    for model, bits in ((target, 4), (drafter, 6)):
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, 64, bits)
    mx.eval(target.parameters(), drafter.parameters())
    return target, drafter.bind(target)


def sources(target: Decoder, drafter: ReDrafter) -> tuple[Decoder, list[Drafter]]:
    return target, [Lookup(), drafter]


@pytest.fixture(scope="module")
def counted(built_in: tuple[Decoder, ReDrafter]) -> dict[TreeShape, parts.Counts]:
    return {s: parts.count(*sources(*built_in), s) for s in (*report.SHAPES, DEFAULT)}


def test_the_budget_of_dispatches(counted: dict[TreeShape, parts.Counts]) -> None:
    plain = counted[TreeShape.plain()].dispatches
    assert counted[report.USUAL].dispatches <= USUAL_TO_PLAIN * plain
    assert counted[DEFAULT].dispatches <= DEFAULT_TO_PLAIN * plain
    assert counted[CHAIN].dispatches <= CHAIN_TO_PLAIN * plain
    assert counted[DEFAULT].beside_verify <= BESIDE_VERIFY
    for counts in counted.values():
        assert not counts.unknown
        assert counts.widest_sort <= beam.SORT_WIDTH


def test_parts_add_up(counted: dict[TreeShape, parts.Counts]) -> None:
    for counts in counted.values():
        assert sum(p for p, _ in counts.parts.values()) == counts.primitives
        assert sum(d for _, d in counts.parts.values()) == counts.dispatches
        assert sum(counts.by_part.values(), Counter()) - counts.launches == Counter()
        assert counts.parts.keys() <= set(parts.ORDER)
    assert counted[DEFAULT].parts.keys() >= {"draft", "lookup", parts.MOVE, "walk"}
    assert counted[TreeShape.plain()].beside_verify < 10 < counted[CHAIN].beside_verify


def test_a_sampled_step_has_noise_and_no_wide_sort(built_in: tuple[Decoder, ReDrafter]) -> None:
    shape = TreeShape(3, 2, 7)
    greedy, drawn = (
        parts.count(*sources(*built_in), shape, SamplingParams(temp=temp)).dispatches
        for temp in (0, 0.8)
    )
    assert greedy < drawn < greedy + 30, "noise in few kernels"
    params = SamplingParams(temp=0.8, repetition_penalty=1.2)
    counts = parts.count(*sources(*built_in), TreeShape(3, 4, 8), params)
    assert counts.widest_sort <= beam.SORT_WIDTH and not counts.unknown


def test_a_prompt_is_read_without_masks(built_in: tuple[Decoder, ReDrafter]) -> None:
    masked, free = (prompt.count(built_in[0], 64, masked) for masked in (True, False))
    assert free["dispatches"] < masked["dispatches"]
    assert free["mask_bytes"] == 0 and masked["mask_bytes"] == 30 * 6 * 64 * 512
    assert free["by_kind"]["ScaledDotProductAttention"] == 30


def test_filters_share_one_sort(built_in: tuple[Decoder, ReDrafter]) -> None:
    """With halving it was 224 a filter."""
    for shape in (TreeShape.plain(), CHAIN):
        free, filtered = (
            parts.count(*sources(*built_in), shape, params) for params in report.DRAWN.values()
        )
        assert free.dispatches < filtered.dispatches <= free.dispatches + 40
        assert filtered.launches["Sort"] == 1 and not filtered.unknown


X, KV = mx.zeros((4, 6, 8)), mx.zeros((1, 2, 32, 8))
START = mx.array([3])


def written(
    *also: Callable[[mx.array], mx.array],
) -> Callable[[mx.array, mx.array], list[mx.array]]:
    return lambda kv, start: [
        mx.slice_update(kv, mx.exp(kv[:, :, :4]), start, (2,)) if also else
        mx.slice_update(kv, mx.ones((1, 2, 4, 8)), start, (2,)),
        *(f(kv) for f in also),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "inputs", "expected"),
    [
        (lambda x: [mx.exp(x) * 2 + x], (X,), {"Compiled": 1}),
        (lambda x: [mx.concatenate([x, x, x])], (X,), {"Concatenate": 3}),
        (lambda x: [x.reshape(24, 8)[2:].swapaxes(0, 1)[None]], (X,), {}),
        (lambda x: [x.transpose(1, 0, 2).reshape(24, 8)], (X,), {"copy by Reshape": 1}),
        (lambda x: [x[:1].transpose(1, 0, 2).reshape(6, 8)], (X,), {}),
        (lambda x: [mx.argsort(x, -1)], (mx.zeros((2, 2048)),), {"ArgSort": 1}),
        (lambda x: [mx.argsort(x, -1)], (mx.zeros((2, 2049)),),
         {"ArgSort": 1, "merging in ArgSort": 3}),
        (written(), (KV, START), {"DynamicSliceUpdate": 2, "Full": 1}),
        (written(mx.sin), (KV, START), {"DynamicSliceUpdate": 2, "Exp": 1, "Sin": 1,
         "copy of the base of DynamicSliceUpdate": 1}),
        (lambda x: [x.sum()], (mx.zeros((5000,)),), {"Sum": 1, "second pass of Reduce": 1}),
        (lambda x: [mx.fast.rms_norm(x, None, 1e-5)], (X,), {"RMSNorm": 1}),
        (lambda x: [mx.fast.rms_norm(x[..., :4], None, 1e-5)], (X,),
         {"RMSNorm": 1, "copy before RMSNorm": 1}),
        (lambda x: [mx.fast.rope(x[:, :, None], 8, traditional=False, base=1e4, scale=1.0,
                                 offset=mx.array([1, 2, 3, 4]))], (X,), {"RoPE": 1}),
        (lambda x: [mx.fast.rope(x[:, :4, None], 8, traditional=False, base=1e4, scale=1.0,
                                 offset=mx.array([1, 2, 3, 4]))], (X,),
         {"RoPE": 1, "copy before RoPE": 1}),
        (lambda x, kv: [mx.fast.scaled_dot_product_attention(
            x.transpose(1, 0, 2)[None], kv[:, :1], kv[:, 1:], scale=1.0)], (X, KV),
         {"ScaledDotProductAttention": 1}),
        (lambda x, kv: [mx.fast.scaled_dot_product_attention(
            x[:, :4].transpose(1, 0, 2)[None], kv[:, :1], kv[:, 1:], scale=1.0)], (X, KV),
         {"ScaledDotProductAttention": 1, "copy before ScaledDotProductAttention": 1}),
        (lambda x, w: [x @ w.T], (mx.zeros((3, 8)), mx.zeros((5, 8))), {"Matmul": 1}),
        (lambda x, w: [x[:, ::2] @ w[:, :4].T], (mx.zeros((3, 8)), mx.zeros((5, 8))),
         {"Matmul": 1, "copy before Matmul": 1}),
    ],
)  # fmt: skip
def test_dispatches_of_small_graphs(
    function: Callable[..., list[mx.array]], inputs: tuple[mx.array, ...], expected: dict[str, int]
) -> None:
    with metal_shaped():
        found = metal.dispatches(graph(function, *inputs))
    merged: Counter[str] = Counter()
    for kind, number in found.items():
        merged[metal.FUSED if kind.startswith(metal.FUSED) else kind] += number
    assert merged == expected


def test_an_unknown_kind_is_named() -> None:
    drawn = graph(lambda x: [mx.linalg.norm(mx.fft.fft(x))], mx.zeros((8,)))
    assert "FFT" in metal.unknown(drawn)
    assert metal.dispatches(drawn)["FFT"] == 1


def test_quantised_embedding_is_one_kernel() -> None:
    table = nn.QuantizedEmbedding(100, 64)
    mx.eval(table.parameters())
    with metal_shaped():
        found = metal.dispatches(graph(lambda ids: [table(ids)], mx.array([3, 4])))
    assert found == {"Gather": 3, "Dequantize": 1}
    assert sum(metal.dispatches(graph(lambda ids: [table(ids)], mx.array([3]))).values()) > 4


def test_bytes_of_a_step(built_in: tuple[Decoder, ReDrafter]) -> None:
    target, drafter = built_in
    packed = 4 + 32 / 64  # bits per weight: a scale and a bias of 16 bits for 64 weights
    row = 64 * packed / 8
    layer = (64 * 64 * 10 + 64 * 64 * 6 + 3 * 64 * 64) * packed / 8 + 2 * 64 * 2
    whole = 30 * layer + 8192 * row + 64 * 2
    plain = sizes.read(target, None, TreeShape.plain(), 100)
    assert plain == sizes.Read(int(whole + row), 0, 30 * 2 * 2 * 64 * 100 * 2)
    level = (3 * 64 * 64 + 64 * 64 + 2 * 64 * 64 + 7168 * 64) * 6.5 / 8
    level += 2 * (3 * 64 + 2 * 64)  # biases of the cell and of two blocks
    for shape, beams in ((CHAIN, 3), (DEFAULT, 9)):
        found = sizes.read(target, drafter, shape, 100)
        once = (3 * 64 * 64 + 64 * 64 + 3 * 64 * 64) * 6.5 / 8 + 3 * 64 * 2 + 64 * 2
        assert found.target - plain.target == (shape.nodes - 1) * row
        expected = 4 * level + once + row + beams * 3 * 64 * 2
        assert found.drafter == pytest.approx(expected, abs=4 * 64)
    assert sizes.read(target, drafter, DEFAULT.only([TEXT]), 100).drafter == 0


def test_an_8b_model_is_reckoned_without_its_memory() -> None:
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = report.reckoning((TreeShape.plain(), DEFAULT), 1024)
    assert mx.get_peak_memory() - before < 1e6
    assert (
        4.1e9 < found["target_bytes"] < 4.6e9
    )  # 8.0 billion weights less the embedding's, 4.5 bits
    assert found["kv_bytes"] == 32 * 2 * 8 * 128 * 1024 * 2
    assert found["trees"].keys() == {str(DEFAULT)}


def test_every_kind_is_reckoned_without_its_memory() -> None:
    """By hand: Llama-3.1-8B, 32,000 tokens; 4 bits with a scale and a bias for 64 weights."""
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = kinds.costs(kinds.LLAMA_8B, context=1000)
    assert mx.get_peak_memory() - before < 1e6
    byte = 4.5 / 8
    size, inner, rows, heads = 4096, 14336, 32000, 8 * 128
    square, head = size * size * byte, size * rows * byte
    block = (2 * size * (size + 2 * heads) + size * size + 3 * size * inner) * byte
    pairs = 2 * size * 2 * heads * byte
    three = 3 * size // 4
    every = {  # once, a level
        "Medusa, own rows": (0, square + head),
        "Medusa, the model's": (size * 128256 * byte, square),
        "MLP speculator": (0, (three * three + three * rows) * byte),
        "LSTM speculator": (0, 4 * square + head),
        "EAGLE-3": (3 * square + pairs, block + head),
        "EAGLE-1": (
            2 * square + pairs / 2, 2 * square + block - size * (size + 2 * heads) * byte
            + size * 128256 * byte,
        ),
    }  # fmt: skip
    assert found["drafters"].keys() - every.keys() == {"ReDrafter, as trained", "a small model"}
    for name, (once, level) in every.items():
        row = found["drafters"][name]
        # Norms and biases are what is left.
        assert row["once_bytes"] == pytest.approx(once, rel=1e-3, abs=1e4), name
        assert row["level_bytes"] == pytest.approx(level, rel=1e-3), name
    eagle = found["drafters"]["EAGLE-3"]
    slab = 2 * heads * 1000 * 2
    whole = eagle["once_bytes"] + 4 * (eagle["level_bytes"] + slab + size * byte) - pairs
    assert eagle["drafter_bytes"] == pytest.approx(whole, rel=1e-4)


def test_dispatches_of_every_kind() -> None:
    """And each has its own part of the step, also where it keeps rows of its own."""
    found = kinds.dispatches({**kinds.LLAMA_8B, "num_hidden_layers": 3, "vocab_size": 4096})
    plain = found.pop(kinds.PLAIN).dispatches
    assert found.keys() == kinds.KINDS.keys()
    for name, counts in found.items():
        assert counts.parts[parts.DRAFT][1] > 20, name
        assert counts.parts[parts.MOVE][1] == 0, "a chain stands where it belongs"
        assert sum(d for _, d in counts.parts.values()) == counts.dispatches > plain
        assert not counts.unknown and counts.widest_sort <= beam.SORT_WIDTH
    draft = {name: counts.parts[parts.DRAFT][1] for name, counts in found.items()}
    assert draft["Medusa, own rows"] < draft["LSTM speculator"] < draft["EAGLE-3"]
    assert draft["EAGLE-3"] < draft["a small model"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["medusa", "lstm"])
def test_a_step_with_other_drafters_is_counted(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "BASES", {})  # of models of other sizes
    target = load_model(write_target(tmp_path / "target"))
    if kind == "medusa":
        heads = tiny_medusa.heads()
        tiny_medusa.loaded(tmp_path / "drafter", tiny_medusa.medusa_1(heads), target)
    else:
        dialect = tiny_speculators.DIALECTS["arctic-lstm"]
        tiny_speculators.loaded(tmp_path / "drafter", *dialect, target)
    given = ["--model", str(tmp_path / "target"), "--drafter", str(tmp_path / "drafter")]
    result = CliRunner().invoke(cli.app, ["bench", "counts", *given, "--context", "100", "--json"])
    assert result.exit_code == 0, result.output
    plain, _, chain = json.loads(result.stdout)["steps"]
    assert chain["parts"][parts.DRAFT]["dispatches"] > 10
    assert plain["read_bytes"]["drafter"] == 0 < chain["read_bytes"]["drafter"]


def test_a_base_of_other_sizes(tmp_path: Path) -> None:
    def invoke(base: Path | str) -> Any:
        return CliRunner().invoke(cli.app, ["bench", "counts", "--base", str(base), "--json"])

    wrong = invoke("llama-9b")
    assert (
        wrong.exit_code == 1 and "use llama-8b, qwen3-30b-a3b, qwen3.5-9b, or the" in wrong.stderr
    )
    config = {**kinds.LLAMA_8B, "num_hidden_layers": 2, "hidden_size": 512, "vocab_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = invoke(tmp_path)
    assert found.exit_code == 0, found.output
    values = json.loads(found.stdout)
    assert values["drafters"].keys() == kinds.KINDS.keys()
    for row in values["drafters"].values():
        assert row["dispatches"] > values["plain_dispatches"] and row["drafter_bytes"] > 0


THIN = {
    "experts": {
        **kinds.QWEN3_30B_A3B, "num_hidden_layers": 8, "vocab_size": 4096, "hidden_size": 256,
        "num_experts": 16, "num_experts_per_tok": 4,
    },
    "hybrid": {
        **kinds.QWEN35_9B, "num_hidden_layers": 10, "vocab_size": 4096, "hidden_size": 512,
        "full_attention_interval": 2, "linear_num_value_heads": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", THIN)
def test_passes_of_experts_and_hybrids(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted on few layers is what is counted on all; bytes by hand."""
    monkeypatch.setattr(kinds, "BASES", {case: THIN[case]})
    monkeypatch.setattr(passes, "_LAYERS", (4, 6))
    shape, context = TreeShape(1, 0, 4, lookup=3), 100
    one, four = passes.passes(shape, context)[case].values()
    layers = THIN[case]["num_hidden_layers"]
    assert one["dispatches"] == passes._counted(THIN[case], (TreeShape.plain(),), layers)[0]
    byte = 4.5 / 8
    if case == "experts":
        expert = 3 * 256 * 768 * byte
        assert one["weight_bytes"][0] == one["weight_bytes"][1]
        least, most = four["weight_bytes"]
        assert most - least == 8 * (16 - 4) * expert, "4 rows of 4 of 16"
        assert one["kept_bytes"] == four["kept_bytes"] == 8 * 2 * 4 * 128 * context * 2
        return
    assert four["weight_bytes"][0] == four["weight_bytes"][1]
    state = 32 * 128 * 128 * 4 + 3 * (2 * 16 + 32) * 128 * 2
    assert one["kept_bytes"] == 5 * 2 * state + 5 * 2 * 4 * 256 * context * 2
    assert one["dispatches"] < 10 * 26 < four["dispatches"] < 10 * 42


def test_what_runs_as_mlx_lm_s_module_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2"}))
    result = CliRunner().invoke(cli.app, ["bench", "counts", "--model", str(tmp_path)])
    assert result.exit_code == 1
    assert "'mamba2' runs as mlx_lm's own module, whose steps are not counted" in result.stderr
    assert "--base llama-8b or" in result.stderr


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "BASES", {})

    def invoke(arguments: list[str]) -> Any:
        return CliRunner().invoke(cli.app, ["bench", "counts", *arguments])

    folder = write_target(tmp_path / "target", hidden_size=64, head_dim=32)
    alone = invoke(["--model", str(folder)])
    assert alone.exit_code == 1 and "give one with --drafter" in alone.stderr
    drafter = random_drafter(load_model(folder), cell="gru", exit_dim=64)
    save_drafter(folder / "drafter", drafter)
    given = ["--model", str(folder), "--context", "100"]
    result = invoke([*given, "--json", "--shape", "2,2,4"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [s["shape"] for s in found["steps"]] == [
        "plain", str(report.USUAL), "chain of 4", "beam 2x2, 4 nodes",
    ]  # fmt: skip
    for step in found["steps"]:
        assert step["syncs_per_step"] == 1 and step["traces"] == 1
        assert step["measured_launch_ms"] > 0
        assert sum(p["dispatches"] for p in step["parts"].values()) == step["dispatches"]
    table = invoke(given).stdout
    assert "Metal dispatches, estimated" in table and "measured here" in table
    for wrong in (["--shape", "3"], ["--shape", "3,4,x"], ["--bits", "7"]):
        refused = invoke([*given, *wrong])
        assert refused.exit_code == 1 and refused.stderr.startswith("error: "), wrong
