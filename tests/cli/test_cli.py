"""The command line, to the letter, on a model that says what it is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import SUMMARY, FakeModel, install
from typer.testing import CliRunner

import mlx_redrafter
from mlx_redrafter.cli import main as cli
from mlx_redrafter.cli import remarks
from mlx_redrafter.cli.options import DecodeOptions, parse_logit_bias
from mlx_redrafter.errors import HubError, OptionError
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.stats import DraftStats, PrefillStats
from mlx_redrafter.tree.shape import TreeShape

DEFAULTS = {
    "max_tokens": 512,
    "temp": 0.0,
    "top_p": 0.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": None,
    "repetition_context_size": 20,
    "presence_penalty": None,
    "presence_context_size": 20,
    "frequency_penalty": None,
    "frequency_context_size": 20,
    "logit_bias": {},
    "seed": 0,
    "stop": (),
    "prefill_step_size": None,
    "tree": None,
    "sparse_prefill": None,
}
ASKED = "[user]Capital?[assistant]"


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    return install(monkeypatch, FakeModel())


def options_of(call: dict[str, object]) -> dict[str, object]:
    return {k: v for k, v in call.items() if k not in ("prompt", "prompt_progress_callback")}


def test_generate_prints_the_text_alone_and_statistics_on_stderr(
    runner: CliRunner, model: FakeModel
) -> None:
    result = runner.invoke(cli.app, ["generate", "Capital?"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Paris.\n", SUMMARY)
    assert model.prompts == [ASKED]
    assert options_of(model.calls[0]) == DEFAULTS
    usual = {"revision": None, "kv_bits": None, "kv_group_size": 64, "exact": False}
    assert model.loaded == [("smollm2-135m", "auto", usual)]


@pytest.mark.parametrize("arguments", [["-"], []])
def test_generate_reads_a_pipe(runner: CliRunner, model: FakeModel, arguments: list[str]) -> None:
    result = runner.invoke(cli.app, ["generate", "-q", *arguments], input="Capital?\n")
    assert (result.exit_code, result.output) == (0, "Paris.\n")
    assert model.prompts == [ASKED]


def test_generate_verbose_adds_what_drafting_did(runner: CliRunner, model: FakeModel) -> None:
    result = runner.invoke(cli.app, ["generate", "-v", "Capital?"])
    assert result.stderr == SUMMARY + (
        "  prompt read       0 tokens\n"
        "  steps             2 (passes of the model), 3 tokens\n"
        "  tokens per step   1.50\n"
        "  drafts checked    8, accepted 1 (12.5%)\n"
        "  steps by accepted 0:1 1:1\n"
        "  accepted by depth 50%\n"
        "  steps by shape    -\n"
        "  seconds           prefill 0.00 · draft_verify 0.00 · host 0.00\n"
    )


def test_statistics_say_what_sparse_prefill_did() -> None:
    stats = DraftStats(sparse_prefill=PrefillStats("trianglemix", chunks=4, sparse_chunks=1))
    assert stats.sparse_prefill is not None
    stats.sparse_prefill.dense("short context", pairs=30, layers=6)
    stats.sparse_prefill.dense("lower layer", pairs=40)
    stats.sparse_prefill.sparse(scored=10, pairs=40)
    assert remarks.details(stats).splitlines()[1] == (
        "  sparse prefill    trianglemix: 1 of 4 chunks, in their sparse layers 25% of the "
        "attention; dense layer passes: short context 6, lower layer 1"
    )
    total = DraftStats()
    total.add(stats)
    total.add(stats)
    assert total.as_dict()["sparse_prefill"] == {
        "mode": "trianglemix",
        "chunks": 8,
        "sparse_chunks": 2,
        "sparse_layers": 2,
        "declined": {"short context": 12, "lower layer": 2},
        "density": 0.25,
        "whole_density": round((10 + 220) / (40 + 220), 4),
    }


def test_generate_json_is_one_object_and_nothing_else(runner: CliRunner, model: FakeModel) -> None:
    model.drafter_folder = Path("some") / "drafter"
    result = runner.invoke(cli.app, ["generate", "--json", "--seed", "7", "Capital?"])
    assert (result.exit_code, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert answer.pop("device") in ("cpu", "gpu")
    assert answer.pop("stats")["histogram"] == {"0": 1, "1": 1}
    assert answer == {
        "text": "Paris.",
        "tokens": [100, 101, 102],
        "finish_reason": "stop",
        "prompt_tokens": 4,
        "prompt_tps": 100.0,
        "generation_tps": 20.0,
        "peak_memory_gb": 0.0,
        "model": "fake",
        "drafter": os.path.join("some", "drafter"),
        "seed": 7,
    }


def test_every_option_reaches_the_generation(runner: CliRunner, model: FakeModel) -> None:
    line = (
        "generate -m org/name -d beside --revision main --max-tokens 9 --temp 0.7 --top-p 0.9"
        " --top-k 40 --min-p 0.05 --repetition-penalty 1.1 --repetition-context-size 30"
        " --presence-penalty 0.2 --presence-context-size 31 --frequency-penalty 0.3"
        " --frequency-context-size 32 --logit-bias 42=-5 --logit-bias 7=1.5 --seed 3 --stop END"
        " --stop FIN --system-prompt Hi --beam-width 4 --beam-length 5 --nodes 16"
        " --lookup 3 --prefill-step-size 64 --sparse-prefill xattention"
        " --sparse-prefill-min-context 4096 --sparse-prefill-tau 0.8 --kv-bits 8 --kv-group-size 32"
        " --exact Capital?"
    )
    result = runner.invoke(cli.app, line.split())
    assert result.exit_code == 0, result.output
    asked = {"revision": "main", "kv_bits": 8, "kv_group_size": 32, "exact": True}
    assert model.loaded == [("org/name", "beside", asked)]
    assert model.prompts == ["[system]Hi[user]Capital?[assistant]"]
    assert options_of(model.calls[0]) == {
        "max_tokens": 9,
        "temp": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "repetition_context_size": 30,
        "presence_penalty": 0.2,
        "presence_context_size": 31,
        "frequency_penalty": 0.3,
        "frequency_context_size": 32,
        "logit_bias": {42: -5.0, 7: 1.5},
        "seed": 3,
        "stop": ("END", "FIN"),
        "prefill_step_size": 64,
        "tree": TreeShape(width=4, depth=5, nodes=16, lookup=3),
        "sparse_prefill": SparsePrefill("xattention", tau=0.8, min_context=4096),
    }


def test_a_prediction_is_a_file(runner: CliRunner, model: FakeModel, tmp_path: Path) -> None:
    file = tmp_path / "old.py"
    file.write_text("print(1)\n")
    result = runner.invoke(cli.app, ["generate", "--prediction", str(file), "Capital?"])
    assert (result.exit_code, model.calls[0]["prediction"]) == (0, "print(1)\n")
    file.write_bytes(b"\xff")
    for given, why in ((file, "it is not UTF-8 text"), (tmp_path, "Is a directory")):
        result = runner.invoke(cli.app, ["generate", "--prediction", str(given), "Capital?"])
        assert result.exit_code == 1
        assert result.stderr == f"error: --prediction {given} cannot be read ({why})\n"
    assert len(model.loaded) == 1


def test_no_draft_loads_no_drafter_and_raw_uses_no_template(
    runner: CliRunner, model: FakeModel
) -> None:
    result = runner.invoke(cli.app, ["generate", "--no-draft", "--raw", "Once upon"])
    assert result.exit_code == 0
    assert model.loaded[0][1] is None
    assert model.prompts == ["Once upon"]
    for more in (
        ["--system-prompt", "Hi"],
        ["--no-thinking"],
        ["--chat-template-config", '{"a": 1}'],
    ):
        result = runner.invoke(cli.app, ["generate", "--raw", "Once upon", *more])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: --raw uses no chat template: leave out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temp", "-1"], "temp -1.0 is not possible: use 0 to 100"),
        (["--top-p", "2"], "top_p 2.0 is not possible: use 0 to 1"),
        (["--top-k", "-1"], "top_k -1 is not possible"),
        (["--min-p", "nan"], "min_p nan is not possible"),
        (["--seed", "-1"], "seed -1 is not possible"),
        (["--max-tokens", "0"], "max_tokens 0 is not possible: use 1 or more"),
        (["--prefill-step-size", "0"], "prefill_step_size 0 is not possible: use 1 or more"),
        (["--sparse-prefill-tau", "0"], "sparse prefill: tau 0.0 is not possible: use a number"),
        (["--sparse-prefill-config", "x.json"], "--sparse-prefill-config needs --sparse-prefill"),
        (
            ["--sparse-prefill", "minference", "--sparse-prefill-config", "x.json"],
            "x.json cannot be read (No such file or directory)",
        ),
        (["--beam-width", "0"], "beam width 0 is not possible"),
        (["--beam-length", "0", "--lookup", "0"], "beam length 0 is not possible"),
        (["--nodes", "99"], "99 nodes are not possible"),
        (["--chat-template-config", "{"], "--chat-template-config { is not a JSON object: give"),
        (["--chat-template-config", "[1]"], "--chat-template-config [1] is not a JSON object"),
        (["--logit-bias", "42"], "--logit-bias 42: needs TOKEN_ID=VALUE"),
        (["--logit-bias", "x=1"], "--logit-bias x=1: needs TOKEN_ID=VALUE"),
    ],
)
def test_impossible_values_are_one_line_before_anything_is_loaded(
    runner: CliRunner, model: FakeModel, arguments: list[str], message: str
) -> None:
    for command in (["generate", "Capital?"], ["chat"]):
        result = runner.invoke(cli.app, [*command, *arguments])
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: {message}")
        assert len(result.stderr.splitlines()) == 1
        assert (result.stdout, model.loaded) == ("", [])


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt_is_an_error(runner: CliRunner, model: FakeModel, text: str) -> None:
    for result in (
        runner.invoke(cli.app, ["generate", text]),
        runner.invoke(cli.app, ["generate"], input=text),
    ):
        assert result.exit_code == 1
        assert result.stderr == (
            "error: the prompt is empty: give it as an argument, or pipe it in\n"
        )


@pytest.mark.parametrize(
    "arguments",
    [["generate", "--temp", "warm", "x"], ["generate", "--sparse-prefill", "x", "x"], ["nonsense"]],
)
def test_wrong_usage_exits_with_2(
    runner: CliRunner, model: FakeModel, arguments: list[str]
) -> None:
    assert runner.invoke(cli.app, arguments).exit_code == 2


def test_an_error_is_one_line_and_debug_shows_its_traceback(
    runner: CliRunner, model: FakeModel
) -> None:
    model.error = HubError("no such model:\n  give another")
    result = runner.invoke(cli.app, ["generate", "Capital?"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: no such model: give another\n"
    result = runner.invoke(cli.app, ["generate", "--debug", "Capital?"])
    assert result.exception is model.error


def test_ctrl_c_exits_with_130(runner: CliRunner, model: FakeModel) -> None:
    def interrupt(index: int) -> None:
        if index == 1:
            raise KeyboardInterrupt

    model.before_piece = interrupt
    result = runner.invoke(cli.app, ["generate", "Capital?"])
    assert (result.exit_code, result.stdout, result.stderr) == (130, "Par\n", "")


def test_a_closed_pipe_is_quiet() -> None:
    code = (
        "import sys; sys.argv = ['mlx-redrafter', 'generate', 'x']\n"
        "import pytest, fakes\n"
        "from mlx_redrafter.cli.main import main\n"
        "fakes.install(pytest.MonkeyPatch(), fakes.FakeModel(answers=[['word '] * 20000]))\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1] / "support",
        env={**os.environ, "PYTHONPATH": str(Path(mlx_redrafter.__file__).parent.parent)},
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(4) == b"word"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 128 + signal.SIGPIPE


def test_a_warning_of_the_library_is_one_line(runner: CliRunner, model: FakeModel) -> None:
    import warnings

    model.before_piece = lambda index: warnings.warn("no g++", stacklevel=2) if not index else None
    result = runner.invoke(cli.app, ["generate", "-q", "Capital?"])
    assert (result.stdout, result.stderr) == ("Paris.\n", "warning: no g++\n")


def test_the_tree_is_left_to_the_program_until_an_option_names_it() -> None:
    assert DecodeOptions().tree() is None
    assert DecodeOptions(beam_width=4).tree() == TreeShape(width=4, lookup=7)
    assert DecodeOptions(beam_width=1, lookup=0).tree() == TreeShape.chain(4)
    assert DecodeOptions(beam_length=2).tree() == TreeShape(depth=2, lookup=7)
    assert DecodeOptions(beam_length=2, lookup=0).tree() == TreeShape(depth=2, nodes=7)
    assert DecodeOptions(beam_length=0).tree() == TreeShape(1, 0, 8, lookup=7)
    assert DecodeOptions(nodes=1).tree() == TreeShape.plain()
    with pytest.raises(OptionError):
        DecodeOptions(nodes=0).tree()


def test_logit_bias_is_read_from_its_text() -> None:
    assert parse_logit_bias(None) == {}
    assert parse_logit_bias(["42=-5", "1=0.5"]) == {42: -5.0, 1: 0.5}


def test_near_ties_are_asked_for_where_bits_may_differ(
    runner: CliRunner, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever shows the statistics: they cost a little."""
    for same, option, asked in [(True, "-v", False), (False, "-v", True), (False, "-q", False)]:
        model.engine.same_bits = same
        assert runner.invoke(cli.app, ["generate", option, "Capital?"]).exit_code == 0
        assert model.calls[-1].get("margins", False) == asked
