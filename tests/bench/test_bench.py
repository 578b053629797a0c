"""The bench on tiny models: what is counted, compared and written. No timing is judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest
from conftest import ByteTokenizer, engine_of, plainly, prompt_of, random_drafter, run, write_target
from typer.testing import CliRunner

from mlx_redrafter.api import Model
from mlx_redrafter.bench.speed import compare, document, perfect, plots, sweep, ways
from mlx_redrafter.bench.speed import run as measuring
from mlx_redrafter.cli import main as cli
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters.loading import save_drafter
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation.prompts import COPY, DEV, prompt_file, read_prompts
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

LENGTH = 36


class Tokenizer(ByteTokenizer):
    has_chat_template = False


def model_of(target: Decoder, folder: Path) -> Model:
    drafter = random_drafter(target)
    return Model.of("tiny", folder, target, drafter, compiled=False)


@pytest.fixture(scope="module")
def tiny_model(target: Decoder, target_folder: Path) -> Model:
    return model_of(target, target_folder)


@pytest.fixture(scope="module")
def turns(tiny_model: Model, mlx_lm_model: nn.Module) -> list[compare.Turn]:
    """Two prompts, two rounds, two temperatures, every kind of way."""
    others = [
        ways.mlx_lm(mlx_lm_model, LENGTH, 0),
        ways.automatic(tiny_model, LENGTH, 0),
        ways.ours(tiny_model, TreeShape.chain(2), LENGTH, 0),
    ]
    comparison = compare.Comparison(tiny_model, others, LENGTH, 2, (0.0, 0.9), perfect=True)
    prompts = [("chat", prompt_of(9, seed=1)), ("code", prompt_of(20, seed=2))]
    return list(comparison.turns(prompts))


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("3x4/8", TreeShape(3, 4, 8)),
        ("1x4", TreeShape.chain(4)),
        ("2x3", TreeShape(2, 3, 7)),
        ("lookup7", TreeShape(1, 0, 8, lookup=7)),
        ("3x4/8+lookup7", TreeShape(3, 4, 8, lookup=7)),
    ],
)
def test_a_shape_is_read(text: str, shape: TreeShape) -> None:
    assert ways.parse_shape(text) == shape


@pytest.mark.parametrize(
    "text", ["", "3", "3y4", "3x4/", "3x4lookup7", "+lookup7", "3x4+", "9x9/999"]
)
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        ways.parse_shape(text)


@pytest.mark.slow
def test_a_turn_holds_every_way_and_a_pass_of_every_size(turns: list[compare.Turn]) -> None:
    assert [t.timings[0]["turn"] for t in turns] == list(range(2 * 2 * 2))
    greedy = [f"perfect, {n} nodes" for n in (4, 8, 16)]
    usual = ["plain", "mlx_lm", "automatic", "chain of 2"]
    for turn in turns:
        names = [t["way"] for t in turn.timings]
        assert names == usual + greedy * (turn.timings[0]["temp"] == 0)
        sizes = {1, 3, 4, 8, 16} if turn.timings[0]["temp"] == 0 else {1, 3}
        measured = [p["nodes"] for p in turn.passes]  # the policy's sizes are the machine's
        assert sizes <= set(measured) and measured == sorted(set(measured))
        assert all(p["seconds"] > 0 for p in turn.passes)


def test_the_first_step_is_not_timed_and_the_text_is_plain_text(turns: list[compare.Turn]) -> None:
    for timing in (t for turn in turns for t in turn.timings):
        steps = sum(timing["histogram"].values())
        total = sum((int(k) + 1) * n for k, n in timing["histogram"].items())
        assert (timing["steps"], total) == (steps - 1, LENGTH)
        assert 0 < timing["tokens"] < LENGTH
        sampled_elsewhere = timing["way"] == "mlx_lm" and timing["temp"] > 0
        assert timing["same"] is (None if sampled_elsewhere else True)


def test_the_perfect_drafter_fills_every_pass(turns: list[compare.Turn]) -> None:
    found = {t["way"]: t for turn in turns for t in turn.timings if "perfect" in t["way"]}
    for nodes in ways.PERFECT:
        full, rest = divmod(LENGTH, nodes)
        expected = {str(nodes - 1): full} | ({str(rest - 1): 1} if rest else {})
        assert found[f"perfect, {nodes} nodes"]["histogram"] == dict(sorted(
            expected.items(), key=lambda item: int(item[0])
        ))  # fmt: skip


@pytest.mark.parametrize("temp", [0.0, 0.9])
def test_replay_drafts_what_it_was_told(target: Decoder, temp: float) -> None:
    prompt, params = prompt_of(7, seed=3), SamplingParams(temp=temp, seed=5)
    answer = plainly(target, prompt, 24, params)
    wrong = [(t + 1) % target.config.vocab_size for t in answer]
    accepted = []
    for known in (answer, wrong):
        drafter, stats = perfect.Replay(target, prompt, known), DraftStats()
        engine = engine_of(target, drafter, compiled=False)
        assert run(engine, prompt, params, TreeShape.chain(3), 24, stats=stats) == answer
        accepted.append(stats.accepted)
    assert accepted[0] == 18  # 6 steps of 3 drafts
    assert accepted[1] < 6


def test_mlx_lm_with_itself_as_draft_model_accepts_everything(
    target: Decoder, mlx_lm_model: nn.Module
) -> None:
    prompt = prompt_of(6, seed=4)
    found = ways.mlx_lm_draft(mlx_lm_model, mlx_lm_model, 3, 16, 0).decode(prompt, 0.0)
    assert found.tokens == plainly(target, prompt, 16)
    assert found.stats.histogram == {3: 4}
    assert (found.first, found.timed) == (4, 12)


def test_an_answer_of_one_step_is_an_error(tiny_model: Model) -> None:
    comparison = compare.Comparison(tiny_model, [], 1, 1)
    with pytest.raises(OptionError, match="--max-tokens"):
        list(comparison.turns([("chat", prompt_of(5))]))


def test_the_grid_holds_each_tree_once_and_what_was_asked_for() -> None:
    grid = sweep.grid()
    assert len(grid) == len(set(grid))
    assert {s.depth for s in grid if s.width == 1} == {1, 2, 3, 4}
    wide = [s for s in grid if s.width > 1]
    assert ({s.width for s in wide}, {s.nodes for s in wide}) == ({2, 3, 4}, {3, 5, 8, 12})
    assert {s.depth for s in wide} == {2, 3, 4}
    assert all(s.lookup == min(7, s.nodes - 1) for s in grid)


def test_a_sweep_goes_in_blocks_with_plain_in_each(tiny_model: Model, tmp_path: Path) -> None:
    shapes = [TreeShape.chain(n) for n in range(1, 6)] + [TreeShape(2, 2, 4), TreeShape(2, 2, 5)]
    usual = ways.automatic(tiny_model, 20, 0)
    comparison = compare.Comparison(tiny_model, [], 20, 1)
    prompts = [("chat", prompt_of(9, seed=1)), ("code", prompt_of(8, seed=2))]
    result = document.Document(document.SWEEP, {})
    blocks = list(sweep.turns(comparison, shapes, usual, prompts))
    for turn in blocks:
        assert [t["way"] for t in turn.timings[:2]] == ["plain", "automatic"]
        result.add(turn)
    assert [b.timings[0]["prompt"] for b in blocks] == [0, 0, 1, 1]
    result.compute()
    found = sweep.cells(result.summary)
    assert set(found) == {(1, n) for n in range(1, 6)} | {(2, 2)}
    rows = {r["way"]: r["times_plain"] for r in result.summary if r["group"] == "all"}
    assert found[2, 2]["times_plain"] == max(rows["beam 2x2, 4 nodes"], rows["beam 2x2, 5 nodes"])
    files = plots.write_all(result, tmp_path)
    assert [f.name for f in files] == ["heatmap.png", "cost.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)


def test_the_prompts_to_copy_from() -> None:
    prompts = read_prompts(COPY)
    assert [p.group for p in prompts] == ["copy"] * 10
    assert all(130 <= len(p.text.split()) <= 230 and "\n\n" in p.text for p in prompts)
    assert [prompt_file(n) for n in ("copy", "dev", "x.jsonl")] == [COPY, DEV, Path("x.jsonl")]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The arguments of a run of a tiny model; `load` is told to give it."""
    folder = write_target(tmp_path / "model", vocab_size=ByteTokenizer.vocab_size)
    seen: dict[str, Any] = {}

    def load(name: str, drafter: str, *, dtype: Any) -> tuple[Model, Tokenizer]:
        seen["dtype"] = dtype
        return model_of(load_model(folder, dtype), folder), Tokenizer()

    monkeypatch.setattr(measuring, "load", load)
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": p, "category": c} for p, c in (("One", "chat"), ("Two", "code"))]
    file.write_text("\n".join(map(json.dumps, rows)))
    line = ["bench", "speed", "--prompts", str(file), "--max-tokens", "12", "--rounds", "1"]
    yield [*line, "--no-perfect"]


def test_a_run_writes_figures_and_plots(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(cli.app, [*command, "-o", str(out), "--shape", "1x2"])
    assert result.exit_code == 0, result.output
    assert "Speed, greedy" in result.stdout and "Speed, temperature 0.8" in result.stdout
    assert {f.name for f in out.iterdir()} == {
        "bench.json", "speedup.png", "acceptance.png", "cost.png",
    }  # fmt: skip
    found = document.read(out)
    assert found.complete
    known = found.conditions
    assert (known["dtype"], known["bits"], known["prompts"]) == ("float32", 32, 2)
    assert len(known["prompt_sha256"]) == 64 and known["temps"] == [0.0, 0.8]
    again = CliRunner().invoke(cli.app, ["bench", "speed", "--plot-only", str(out)])
    assert again.stdout == result.stdout


def test_a_stopped_run_keeps_and_shows_what_it_has(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = compare.Comparison._turn

    def stops(self: compare.Comparison, *arguments: Any) -> compare.Turn:
        if self.turn == 1:
            raise KeyboardInterrupt
        return turn(self, *arguments)

    monkeypatch.setattr(compare.Comparison, "_turn", stops)
    out = tmp_path / "out"
    result = CliRunner().invoke(cli.app, [*command, "-o", str(out)])
    assert result.exit_code == 130
    assert "incomplete" in result.stderr and "Speed, greedy" in result.stdout
    found = document.read(out)
    assert not found.complete and len(found.timings) == 3 and found.summary


def test_json_and_the_dtype(command: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*command, "--json", "--temp", "0", "--dtype", "float16"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["conditions"]["dtype"] == "float16" and found["conditions"]["bits"] == 16
    assert {row["way"] for row in found["summary"]} == {"plain", "mlx_lm", "automatic"}


def test_another_drafter_is_measured_in_the_same_turns(command: list[str], tmp_path: Path) -> None:
    other = random_drafter(load_model(tmp_path / "model"), seed=2, cell="gru")
    save_drafter(tmp_path / "other", other)
    given = ["--json", "--shape", "1x2", "--shape", "lookup3", "--against", str(tmp_path / "other")]
    result = CliRunner().invoke(cli.app, [*command, *given])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["conditions"]["against"] == "other"
    rows = {row["way"]: row for row in found["summary"] if row["temp"] == 0}
    assert rows.keys() >= {"automatic", "automatic, other", "chain of 2", "chain of 2, other"}
    assert "lookup of 3, other" not in rows, "lookup alone needs no drafter"
    assert all(rows[f"{way}, other"]["same"] == 1 for way in ("automatic", "chain of 2"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--sweep", "--against", "nowhere"], "leave out --sweep"),
        (["--max-tokens", "1"], "--max-tokens 1"),
        (["--shape", "wide"], "not a tree shape"),
        (["--sweep", "--divergence"], "give one of them"),
        (["--sweep", "--temp", "0", "--temp", "1"], "give --temp once"),
        (["--divergence", "--temp", "1"], "leave out --temp"),
        (["--prompts", "nowhere.jsonl"], "not a prompt file"),
        (["--plot-only", "nowhere"], "cannot be read"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.app, ["bench", "speed", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and message in result.stderr


# --- sparse prefill -----------------------------------------------------------------------------

READ = SparsePrefill("xattention", block=16, stride=4, min_context=32, dense_tail=16, sink=16,
                     local=16, max_density=1.0, tau=0.5)  # fmt: skip


def test_all_of_our_ways_read_the_prompt_sparsely(tiny_model: Model) -> None:
    others = [
        ways.automatic(tiny_model, LENGTH, 0, READ),
        ways.ours(tiny_model, TreeShape.chain(2), LENGTH, 0, sparse=READ),
    ]
    comparison = compare.Comparison(tiny_model, others, LENGTH, 1, perfect=True, sparse=READ)
    (turn,) = comparison.turns([("long", prompt_of(300, seed=5))])
    assert {t["way"] for t in turn.timings} >= {"plain", "automatic", "chain of 2"}
    assert all(t["same"] and t["prefill_density"] < 0.9 for t in turn.timings)
    for nodes in ways.PERFECT:
        (found,) = (t for t in turn.timings if t["way"] == f"perfect, {nodes} nodes")
        assert found["histogram"][str(nodes - 1)] == LENGTH // nodes, "it knows its place"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--sparse-prefill", "xattention"], "the longest prompt has"),
        (["--sparse-prefill", "xattention", "--divergence"], "leave out --sparse-prefill"),
        (["--sparse-prefill-config", "x.json"], "needs --sparse-prefill minference"),
        (["--sparse-prefill", "xattention", "--sparse-prefill-tau", "2"], "tau 2.0"),
    ],
)
def test_sparse_options_that_make_no_sense_are_refused_in_one_line(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, given: list[str], said: str
) -> None:
    monkeypatch.setattr(measuring, "load", lambda *_, **__: (tiny_model, Tokenizer()))
    result = CliRunner().invoke(cli.app, ["bench", "speed", "--count", "1", *given])
    assert result.exit_code == 1 and said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_sparse_prefill_is_among_the_conditions(command: list[str], tmp_path: Path) -> None:
    rows = [{"prompt": "abc " * 120, "category": "x"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    given = ["--sparse-prefill", "xattention", "--sparse-prefill-min-context", "128"]
    result = CliRunner().invoke(cli.app, [*command, "-o", str(out), "--temp", "0", *given])
    assert result.exit_code == 0, result.output
    assert "sparsely by our ways, densely by mlx_lm: mode xattention" in result.stderr
    known = document.read(out).conditions["sparse_prefill"]
    assert known == {
        "mode": "xattention", "min_context": 128, "tau": 0.9, "config": None,
        "tag": SparsePrefill("xattention", min_context=128).tag,
    }  # fmt: skip
    dense = CliRunner().invoke(cli.app, [*command, "--temp", "0", "--json"])
    assert json.loads(dense.stdout)["conditions"]["sparse_prefill"] is None


def test_a_category_that_is_no_text_is_said(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "category": {"a": 1}}\n')
    with pytest.raises(OptionError, match=r"is not a prompt file \(the category {'a': 1} is no"):
        read_prompts(file)
    file.write_text("\n")
    with pytest.raises(OptionError, match="holds no prompts"):
        read_prompts(file)
