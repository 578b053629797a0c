"""`bench prefill` on tiny models: what is kept, the controls, the files. No time is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import prefill_reference as reference
import pytest
from conftest import ByteTokenizer
from prefill_cases import random_case
from typer.testing import CliRunner

from mlx_redrafter.api import Model
from mlx_redrafter.bench.prefill import controls, layer, material, quality, report, run, whole
from mlx_redrafter.bench.prefill.recall import blocks_seen, kept, sample, seen
from mlx_redrafter.cli import main as cli
from mlx_redrafter.cli import net
from mlx_redrafter.models import Decoder
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.selectors import Blocks, Chunk, Columns
from mlx_redrafter.prefill.sparse import SparseAttention, attend_to
from mlx_redrafter.prefill.xattention import everything
from mlx_redrafter.stats import PrefillStats

BLOCK = 16


def chunk_of(seed: int, offset: int = 64, n: int = 48) -> tuple[Chunk, tuple[np.ndarray, ...]]:
    arrays = random_case(seed, offset=offset, n=n)
    slab = reference.slab_of(*arrays[1:], offset + n)
    return Chunk(mx.array(arrays[0]), slab, offset, BLOCK, 0.7), arrays


def probabilities(q: np.ndarray, keys: np.ndarray, offset: int, scale: float) -> np.ndarray:
    """(H, n, T), dense and causal, by definition."""
    scores = q @ np.repeat(keys, len(q) // len(keys), axis=0).swapaxes(1, 2) * scale
    future = np.arange(keys.shape[1]) > np.arange(offset, offset + q.shape[1])[:, None]
    mass = np.exp(np.where(future, -np.inf, scores))
    return mass / mass.sum(axis=2, keepdims=True)


def test_dense_keeps_everything() -> None:
    chunk, _ = chunk_of(1)
    dense = sample(chunk, 1, rows=16)
    recall, error = kept(dense, seen(everything(chunk), chunk, 1))
    assert np.abs(np.array(recall) - 1).max() < 1e-6
    assert np.array(error).max() < 1e-5


def test_recall_and_error_are_those_of_numpy() -> None:
    chunk, (q, keys, values) = chunk_of(2)
    weights = probabilities(q, keys, 64, 0.7)
    ids = [[0, 3], [2, 4], [1, 5]]
    chosen = Blocks([mx.array([i, i], mx.int32) for i in ids])
    for j in range(3):
        rows = np.arange(4, BLOCK, 8) + j * BLOCK  # two of them
        table = reference.of_blocks(ids, 64, 48, BLOCK)[rows]
        recall, error = kept(sample(chunk, j, rows=2), seen(chosen, chunk, j))
        wanted = (weights[:, rows] * table).sum(axis=2)
        assert np.allclose(np.array(recall), wanted, atol=1e-5)
        whole_out = weights[:, rows] @ np.repeat(values, 2, axis=0)
        sparse = np.array(attend_to(chosen, chunk)).reshape(48, 4, -1)[rows]
        sparse = sparse.transpose(1, 0, 2)
        distance = np.linalg.norm(whole_out - sparse, axis=2) / np.linalg.norm(whole_out, axis=2)
        assert np.allclose(np.array(error), distance, atol=1e-5)


def test_single_keys_are_counted_without_their_padding() -> None:
    chunk, (q, keys, _) = chunk_of(3)
    flags = np.zeros((4, 64), bool)
    flags[0, :3] = flags[2, 5:30] = True
    rest = [mx.zeros((4, 64 + j * BLOCK), mx.bool_) for j in (1, 2)]
    chosen = Columns([mx.array(flags), *rest], [[3, 0, 25, 0], [0] * 4, [0] * 4])
    own = 4 * BLOCK * (BLOCK + 1) // 2
    assert controls.pairs(chosen, chunk, 0) == 28 * BLOCK + own < chosen.pairs(chunk)
    assert controls.block_count(chosen, chunk, 0) == 1
    recall, _ = kept(sample(chunk, 0, rows=16), seen(chosen, chunk, 0))
    weights = probabilities(q, keys, 64, 0.7)[:, :BLOCK]
    wanted = weights[..., 64:80].sum(axis=2) + (weights[..., :64] * flags[:, None]).sum(axis=2)
    assert np.allclose(np.array(recall), wanted, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_controls_have_the_density_they_are_given(count: int) -> None:
    chunk, _ = chunk_of(4)
    dense = sample(chunk, 2, rows=16)
    for name in controls.CONTROLS:
        ids = np.array(controls.control(name, dense, count, seed=5))
        assert ids.shape == (2, count)
        assert all(len(set(row)) == count and set(row) <= set(range(6)) for row in ids)
        visible = np.array(blocks_seen(mx.array(ids, mx.int32), 6, chunk))
        assert (visible.sum(axis=1) == (count + 1) * BLOCK).all()
    chosen = Blocks([mx.zeros((2, 0), mx.int32)] * 2 + [mx.array(ids, mx.int32)])
    assert controls.block_count(chosen, chunk, 2) == count
    assert controls.pairs(everything(chunk), chunk, 2) == controls.causal_pairs(chunk, 2)


def test_no_choice_of_as_many_blocks_keeps_more_than_the_oracle() -> None:
    means: dict[str, list[float]] = {name: [] for name in controls.CONTROLS}
    for seed in range(10):
        chunk, _ = chunk_of(seed)
        dense = sample(chunk, 1, rows=8)
        for name in controls.CONTROLS:
            ids = controls.control(name, dense, 2, seed)
            recall, _ = kept(dense, blocks_seen(ids, 5, chunk))
            means[name].append(float(recall.mean()))
    best = np.array(means[controls.ORACLE])
    assert (best >= np.array(means[controls.RANDOM]) - 1e-6).all()
    assert (best >= np.array(means[controls.LOCAL]) - 1e-6).all()
    assert best.mean() > np.mean(means[controls.RANDOM]) + 0.01


@pytest.fixture(scope="module")
def probe(byte_target: Decoder) -> quality.Probe:
    prompt = material.tokens(ByteTokenizer(), None, 1025)  # type: ignore[arg-type]
    methods = [
        quality.Method("trianglemix", SparsePrefill("trianglemix", local=128, sink=128), True),
        quality.Method(
            "xattention", SparsePrefill("xattention", tau=0.5, local=128, start_layer=0), True
        ),
        quality.Method("minference", SparsePrefill("minference"), True),
    ]
    probe = quality.Probe(byte_target.config, methods, 512)
    whole.probed(byte_target, prompt, probe)
    return probe


def test_a_probe_reads_densely(byte_target: Decoder) -> None:
    prompt = material.tokens(ByteTokenizer(), None, 1025)  # type: ignore[arg-type]
    options = SparsePrefill("a_shape", min_context=0, max_density=1)
    sparse = SparseAttention(options, byte_target.config)
    probe = quality.Probe(byte_target.config, [], 0)
    hidden = []
    for attention in (None, probe, sparse):
        session = whole.new_session(byte_target, len(prompt))
        found = whole.read(byte_target, prompt, session, 512, sparse=attention).hidden
        hidden.append(np.array(found))
    assert np.abs(hidden[0] - hidden[1]).max() < 1e-4 < np.abs(hidden[0] - hidden[2]).max()
    assert probe.seconds > 0 and probe.looks == []


def test_every_method_is_seen_in_its_layers_beside_its_controls(probe: quality.Probe) -> None:
    rows = {row["method"]: row for row in quality.rows(probe.looks, probe.methods)}
    layers = probe.config.num_layers
    assert [r["layer"] for r in rows["xattention"]["layers"]] == [*range(layers)]
    assert [r["layer"] for r in rows["trianglemix"]["layers"]] == [*range(layers // 2, layers)]
    for row in (rows["trianglemix"], rows["xattention"]):
        assert 0 < row["recall_p5"] <= row["recall"] < 1 and row["error"] > 0
        for name in controls.CONTROLS:
            assert row[name]["density"] == row["density"]
            assert row[name]["recall"] <= row["oracle"]["recall"]
        assert row["recall"] <= row["oracle"]["recall"]
    assert rows["minference"]["recall"] == 1 and rows["minference"]["sparse"] == 0


def test_expectation_is_amdahls() -> None:
    assert whole.expected(10, 0.6, 0.5) == pytest.approx(7)
    stats = PrefillStats("a_shape")
    stats.sparse(25, 100)
    turn = [whole.Reading("dense", 8.0, 8.0, None), whole.Reading("a_shape", 4.0, 2.0, stats)]
    dense, sparse = whole.rows([turn, turn], share=0.5)
    assert dense["seconds"] == 8 and sparse["times_dense"] == 2
    assert sparse["times_dense_processor"] == 4
    assert sparse["predicted_seconds"] == 5 and sparse["density"] == 0.25


@pytest.fixture
def tiny(byte_target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.of("tiny", tmp_path, byte_target, drafting=False)
    monkeypatch.setattr(run, "load", lambda *_: (model, ByteTokenizer()))


def bench(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "prefill", *map(str, arguments)])


def test_the_command_compares_writes_and_draws(tiny: None, tmp_path: Path) -> None:
    file, plot = tmp_path / "out.json", tmp_path / "out.png"
    result = bench(
        "--lengths", "1024,512", "--quality", "--json", file, "--plot", plot,
        "--modes", "trianglemix,xattention",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    for word in ("1024 tokens, sparse from token 256 on", "expected", "recall", "oracle", "tau"):
        assert word in result.stdout
    assert plot.stat().st_size > 5000
    found = json.loads(file.read_text())
    assert found["complete"] and found["kind"] == "prefill"
    for name in ("machine", "mlx", "blas", "dtype", "threads", "model", "text", "sparse_prefill"):
        assert name in found["conditions"]
    assert [row["length"] for row in found["lengths"]] == [512, 1024]
    row = found["lengths"][1]
    assert 0 < row["attention_share"] < 1
    assert [way["way"] for way in row["ways"]] == ["dense", "trianglemix", "xattention"]
    for name in ("seconds", "times_dense", "predicted_seconds", "density", "whole_density"):
        assert name in row["ways"][1]
    assert len(row["quality"]) == 2 and len(row["sweep"]) == 18


def test_one_layer_is_timed_against_both_dense_paths(tiny: None, tmp_path: Path) -> None:
    file = tmp_path / "layer.json"
    result = bench("--layer", "--prefix", 4096, "--rounds", 2, "--json", file)
    assert result.exit_code == 0, result.stderr
    assert "behind 4096 tokens" in result.stdout and "repeated" in result.stdout
    ways = {way["way"]: way for way in json.loads(file.read_text())["layer"]["ways"]}
    assert {layer.PROGRAM, layer.FUSED, "trianglemix", "xattention, capped"} <= ways.keys()
    assert ways["trianglemix"]["density"] < 0.25 and ways["trianglemix"]["times_pairs"] > 4
    assert ways[layer.PROGRAM]["times_own"] == 1 and ways["xattention"]["rounds"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "1000"], "multiples of 128"),
        (["--lengths", "long"], "--lengths long"),
        (["--lengths", ","], "nothing to measure"),
        (["--lengths", "4096"], "context of 2048 tokens"),
        (["--modes", "fast"], "--modes fast"),
        (["--modes", "off"], "--modes off"),
        (["--rounds", "0"], "--rounds 0"),
        (["--layer", "--prefix", "100"], "--prefix 100"),
        (["--plot", "nowhere/p.png"], "cannot be written"),
        (["--plot", "p.txt"], "ends in .png"),
        (["--json", "nowhere/p.json"], "cannot be written"),
        (["--lengths", "512", "--text", "nowhere.txt"], "cannot be read"),
    ],
)
def test_wrong_options_are_one_line(tiny: None, arguments: list[str], message: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_text_that_is_too_short_is_said(tiny: None, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("a few words")
    result = bench("--text", file, "--lengths", "512")
    assert result.exit_code == 1 and "513 are needed" in result.stderr


def test_a_run_that_is_stopped_shows_what_it_has(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = whole.in_turn

    def stopped(target: Any, prompt: Any, *rest: Any) -> Any:
        if len(prompt) > 600:
            raise KeyboardInterrupt
        return real(target, prompt, *rest)

    monkeypatch.setattr(whole, "in_turn", stopped)
    file = tmp_path / "out.json"
    result = bench("--lengths", "512,1024", "--modes", "a_shape", "--quality", "--json", file)
    assert result.exit_code == net.INTERRUPTED and "incomplete" in result.stderr
    found = json.loads(file.read_text())
    first, second = found["lengths"]
    assert not found["complete"] and len(first["ways"]) == 2
    assert second["ways"] == [] and second["quality"][0]["recall"] > 0  # looked at before


def test_quality_alone(tiny: None, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    more = ("--modes", "xattention", "--quality", "--rounds", 0, "--json", file)
    result = bench("--lengths", "1024", *more, "--plot", tmp_path / "none.png")
    assert result.exit_code == 0 and "seconds" not in result.stdout
    assert json.loads(file.read_text())["lengths"][0]["ways"] == []
    assert not (tmp_path / "none.png").exists()


def test_help_promises_nothing_that_was_not_measured() -> None:
    result = bench("--help")
    assert result.exit_code == 0 and "--lengths" in result.stdout
    assert "Metal" not in result.stdout and "10x" not in result.stdout


def test_layers_ahead_must_beat_both() -> None:
    def one(own: float, random: float, local: float) -> dict[str, Any]:
        return {"recall": own, "random": {"recall": random}, "local": {"recall": local}}

    layers = [one(0.9, 0.5, 0.6), one(0.9, 0.5, 0.9), one(0.7, 0.8, 0.6)]
    assert report._ahead({"layers": layers}) == "1/3"
