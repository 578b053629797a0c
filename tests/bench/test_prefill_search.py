"""The offline search of patterns: planted structure, the file, and what can go wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import prefill_reference as reference
import pytest
from conftest import engine_of, prompt_of, run
from tiny_chat import WORDS, write_chat_model
from tiny_models import build
from typer.testing import CliRunner

from mlx_redrafter.bench.prefill.patterns import check_length
from mlx_redrafter.cli import main as cli
from mlx_redrafter.errors import ModelError, OptionError
from mlx_redrafter.models import Decoder
from mlx_redrafter.prefill import search as searching
from mlx_redrafter.prefill.config import HeadPattern, SparsePrefill, read_patterns, write_patterns
from mlx_redrafter.prefill.search import Found, Search, split
from mlx_redrafter.prefill.selectors import Chunk, Columns
from mlx_redrafter.prefill.sparse import SELECTORS
from mlx_redrafter.stats import DraftStats

LENGTH, SIZE, BLOCK = 2048, 128, 32
OPTIONS = SparsePrefill("minference", block=BLOCK, sink=32, local=32, max_density=1.0)
Targets = Callable[[np.random.Generator, int], Any]


def head_that_looks(targets: Targets, per_block: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """q and keys (LENGTH, SIZE) of a head whose query i attends to the keys targets(rng, i).

    Every key, or every block of keys, has a code of its own; a query is the sum of some codes.
    """
    rng = np.random.default_rng(3)
    codes = rng.standard_normal((LENGTH, SIZE)) / SIZE**0.5
    keys = np.repeat(codes[: LENGTH // BLOCK], BLOCK, axis=0) if per_block else codes
    q = np.stack([codes[np.unique(targets(rng, i))].sum(axis=0) for i in range(LENGTH)])
    return (14 * q).astype(np.float32), keys.astype(np.float32)


COLUMNS = np.random.default_rng(0).permutation(1000)[:60]
BLOCKS = np.random.default_rng(1).integers(0, 32, (LENGTH // BLOCK, 3))
HEADS: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "local": head_that_looks(lambda rng, i: np.maximum(0, i - rng.integers(0, 250, 3))),
    "vertical": head_that_looks(lambda rng, i: rng.choice(COLUMNS, 3)),
    "diagonal": head_that_looks(lambda rng, i: np.maximum(0, i - np.array([700, 450]))),
    "blocks": head_that_looks(lambda rng, i: BLOCKS[i // BLOCK], per_block=True),
}


def chunks() -> list[Chunk]:
    """Two late chunks of one layer with the four heads."""
    q, keys = (np.stack(part) for part in zip(*HEADS.values(), strict=True))
    values = np.random.default_rng(2).standard_normal(keys.shape).astype(np.float32)
    slab = reference.slab_of(keys, values, LENGTH)
    return [Chunk(mx.array(q[:, at : at + 256]), slab, at, BLOCK, 1.0) for at in (1280, 1792)]


@pytest.fixture(scope="module")
def searched(target: Decoder) -> Search:
    """Two layers more that nobody measures."""
    found = Search(target.config, OPTIONS, 0.25, 0.75 * LENGTH)
    for chunk in chunks():
        chosen = found(0, chunk)
        assert chosen.pairs(chunk) == chunk.causal_pairs
    return found


def test_planted_structure_gets_the_pattern_that_fits(searched: Search) -> None:
    found = searched.results()[0]
    best = dict(zip(HEADS, found.values(), strict=True))
    assert best["local"].pattern.kind == "stream_llm"
    assert best["vertical"].pattern.kind == best["diagonal"].pattern.kind == "vertical_and_slash"
    assert best["vertical"].pattern.vertical > best["vertical"].pattern.slash
    assert best["diagonal"].pattern.slash > best["diagonal"].pattern.vertical
    assert best["blocks"].pattern.kind == "block_sparse"
    for head in best.values():
        assert head.density <= 0.25
        assert head.recall > 0.85


def test_the_choice_can_fail(searched: Search) -> None:
    """The pattern of another head does far worse: the heads do tell the patterns apart. Only,
    slashes next to the diagonal are a window, and blocks along a slash cover it."""
    alike = {("local", "diagonal"), ("diagonal", "blocks")}
    best = dict(zip(HEADS, searched.results()[0].values(), strict=True))
    for at, name in enumerate(HEADS):
        alone = {f.candidate: f.error for f in searched.fitting(0, at)}
        for other in best.keys() - {name}:
            worse = alone[best[other].candidate] > best[name].error + 0.1
            assert worse == ((name, other) not in alike)


def test_recall_error_and_density_are_those_of_the_consumer(searched: Search) -> None:
    """Against the table of who sees whom, for the rows that are sampled."""
    chunk = chunks()[0]
    pattern = HeadPattern("vertical_and_slash", 60, 150)
    options = SparsePrefill(
        "minference", block=BLOCK, sink=32, local=32, patterns=(dict.fromkeys(range(4), pattern),)
    )
    chosen = SELECTORS["minference"](options)(0, chunk)
    assert isinstance(chosen, Columns)
    dense = searching.Dense.of(chunk)
    ranks = searching.minference.ranks(chunk, 64)
    recall, error, density = np.array(searched._measure(pattern, chunk, ranks, dense))
    counts = np.array(chosen.counts).sum(axis=0) * BLOCK + chunk.own_pairs / 4
    assert np.allclose(density, counts / (chunk.causal_pairs / 4), atol=1e-5)
    rows = [j * BLOCK + r for j in range(8) for r in range(3, BLOCK, 4)]
    table = np.zeros((4, 256, chunk.length), bool)
    for j, seen in enumerate(chosen.seen):
        table[:, j * BLOCK : (j + 1) * BLOCK, : seen.shape[1]] = np.array(seen)[:, None]
    for row in range(256):
        own = (chunk.offset + row) // BLOCK * BLOCK
        table[:, row, own : chunk.offset + row + 1] = True
    causal = np.tril(np.ones((256, chunk.length), bool), chunk.offset)[None].repeat(4, axis=0)
    q, keys = np.array(chunk.q), np.array(chunk.keys)
    values = np.array(chunk.slab)[0, 4:, : chunk.length]
    sparse, full = (reference.attention(q, keys, values, t, 1.0, 0.0) for t in (table, causal))
    sparse, full = (x.reshape(256, 4, SIZE)[rows] for x in (sparse, full))
    expected = np.linalg.norm(sparse - full, axis=2) / np.linalg.norm(full, axis=2)
    assert np.allclose(error, expected.mean(axis=0), atol=1e-3)
    mass = np.array(searching.minference.probabilities(chunk, mx.array(rows)))
    assert np.allclose(recall, (mass * table[:, rows]).sum(axis=2).mean(axis=1), atol=1e-4)


@pytest.mark.parametrize(("asked", "given"), [(3, 6), (1, 2), (1000, 63)])
def test_a_number_of_blocks_is_obeyed(asked: int, given: int) -> None:
    """In 64 tokens; what a file says beyond upstream's 100 means 100, here more than there are."""
    chunk = chunks()[1]
    chosen = searching.minference.top_blocks(chunk, [HeadPattern("block_sparse", asked, 1)] * 4)
    assert chosen is not None
    last = chunk.past_blocks[-1]
    assert np.array(chosen)[:, -1, :last].sum(axis=1).tolist() == 4 * [given]


def test_a_layer_that_is_not_measured_has_its_window(searched: Search) -> None:
    assert searched.results()[1] == {h: Found(HeadPattern("stream_llm", 0, 0)) for h in range(4)}


def test_attention_that_is_not_finite_is_said(target: Decoder) -> None:
    found = Search(target.config, OPTIONS, 0.25, 0.75 * LENGTH)
    chunk = chunks()[0]
    found(0, replace(chunk, q=chunk.q * mx.nan))
    with pytest.raises(ModelError, match="layer 0 has no finite attention"):
        found.results()


def test_the_file_round_trips_and_the_engine_takes_it(
    searched: Search, target: Decoder, tmp_path: Path
) -> None:
    file = tmp_path / "patterns.json"
    patterns, scores = split(searched.results())
    write_patterns(file, patterns, scores)
    layers, heads = target.config.num_layers, target.config.num_heads
    assert read_patterns(file, layers, heads) == patterns
    written = json.loads(file.read_text())
    assert written[0]["1"][3] == pytest.approx(searched.results()[0][1].recall, abs=1e-4)
    options = SparsePrefill(
        "minference", patterns=read_patterns(file), block=32, sink=32, local=32, min_context=128,
        max_density=1.0,
    )  # fmt: skip
    stats = DraftStats()
    engine = engine_of(target, None, compiled=False)
    run(engine, prompt_of(700), max_tokens=2, stats=stats, sparse_prefill=options)
    assert stats.sparse_prefill is not None
    assert stats.sparse_prefill.sparse_layers > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model with room for 2048 tokens."""
    return write_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(WORDS[3:], 3000)
    file.write_text(" ".join(words))
    return file


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "patterns", *map(str, arguments)])


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_writes_patterns_and_a_picture(
    folder: Path, text: Path, tmp_path: Path, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "SIZES", (0.25, 1.0))
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    result = invoke(
        folder, "--out", out, "--text", text, "--length", 2048, "--density", 0.6, "--plot", plot,
        *["--json"] * as_json,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    patterns = read_patterns(out, layers=3, heads=4)
    assert all(sorted(layer) == [0, 1, 2, 3] for layer in patterns)
    assert plot.read_bytes()[:4] == b"\x89PNG"
    if as_json:
        facts = json.loads(result.stdout)
        assert sum(row["best_of"] for row in facts["candidates"]) == facts["best"]["heads"] == 12
        assert 0 < facts["best"]["recall"] <= 1
    else:
        assert "the best of each head" in result.stdout
        assert "--sparse-prefill minference --sparse-prefill-config" in result.stderr


def test_layers_with_a_window_get_a_pattern_that_is_never_used(text: Path, tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model")
    tokenizer = {p.name: p.read_text() for p in folder.glob("tokenizer*.json")}
    config = json.loads((folder / "config.json").read_text())
    build(folder, "llama-window", vocab_size=config["vocab_size"], max_position_embeddings=2048)
    for name, content in tokenizer.items():
        (folder / name).write_text(content)
    out = tmp_path / "out.json"
    result = invoke(
        folder, "--out", out, "--text", text, "--length", 2048, "--density", 0.6, "--plot",
        tmp_path / "plot.svg",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (
        "1 of 2 layers have a sliding window and stay dense: their patterns are not used"
        in result.stderr
    )
    layers = json.loads(out.read_text())
    assert layers[0] == {str(head): ["stream_llm", 0, 3, 1.0] for head in range(4)}
    assert {pattern[3] for pattern in layers[1].values()} != {1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", 4096], "beyond the model's context of 2048 tokens: use 2048 or less"),
        (["--length", 1024], "always kept are more than 60% of the attention there; use 1707 or"),
        (["--length", 2048, "--text", "short"], "the text has 3 tokens and --length is 2048: give"),
        (["--text", "none.txt"], "none.txt cannot be read (No such file or directory)"),
        (["--text", "latin"], "latin is not UTF-8 text: convert it first (iconv)"),
        (
            ["--out", "nowhere/out.json"],
            "cannot be written: give a file in a folder that you can write",
        ),
        (["--plot", "plot.txt"], "the plot cannot be written to plot.txt"),
        (["--density", 1.5], "--density 1.5 is not possible: use a number between 0 and 1"),
    ],
)
def test_what_is_wrong_is_one_line(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[Any], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("short").write_text("ba be bi")
    Path("latin").write_bytes(b"caf\xe9")
    given = {
        "--out": "out.json",
        "--density": 0.6,
        **dict(zip(*[iter(arguments)] * 2, strict=True)),
    }
    result = invoke(folder, *(word for pair in given.items() for word in pair))
    assert result.exit_code == 1
    assert message in result.stderr.replace("\n", " ")
    assert result.stderr.count("\n") == 1
    assert not Path("out.json").exists()


@pytest.mark.parametrize("density", [1e-9, 1e-320, 5e-324])
def test_a_density_of_almost_nothing_needs_a_longer_text(density: float) -> None:
    with pytest.raises(OptionError, match=r"--length 3072 is not possible.* use [0-9]+ or more"):
        check_length(3072, density, 4096, SimpleNamespace(max_positions=8192, not_attention=""))  # type: ignore[arg-type]
