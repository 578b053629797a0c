"""--help of every command: on one screen where it can be, in sentences, at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import mlx_redrafter
from mlx_redrafter.cli import main as cli

VISIBLE = (
    "chat", "generate", "serve", "demo", "race", "info", "drafters", "train", "convert", "shard",
    "doctor", "bench",
)  # fmt: skip
MEASUREMENTS = (
    "speed", "parallel", "acceptance", "budget", "hosts", "prefill", "patterns", "needles",
    "exactness", "counts",
)  # fmt: skip


def shown(*arguments: str) -> str:
    """The page on a terminal of 80 columns."""
    result = CliRunner().invoke(cli.app, [*arguments, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    return result.stdout


def every_command() -> Iterator[tuple[list[str], Any, Any]]:
    """Path, command and context of all of them, groups too."""
    root = typer.main.get_command(cli.app)
    waiting: list[tuple[list[str], Any, Any]] = [([], root, None)]
    for path, command, parent in waiting:
        context = typer.Context(command, info_name=(path or ["root"])[-1], parent=parent)
        yield path, command, context
        if hasattr(command, "list_commands"):
            waiting += [
                ([*path, name], command.get_command(context, name), context)
                for name in command.list_commands(context)
            ]


def test_the_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"mlx-redrafter {mlx_redrafter.__version__}\n")


def test_which_commands_there_are() -> None:
    paths = [" ".join(path) for path, _, _ in every_command()]
    assert tuple(path for path in paths if path and " " not in path) == VISIBLE
    assert tuple(path[6:] for path in paths if path.startswith("bench ")) == MEASUREMENTS


def test_help_fits_a_screen() -> None:
    assert len(shown().splitlines()) <= 25
    assert len(shown("generate").splitlines()) <= 66


def test_help_leads_with_what_is_wanted() -> None:
    wanted = ["Use a model", "chat", "generate", "Prepare and", "train", "bench", "--debug"]
    places = [shown().index(word) for word in wanted]
    assert places == sorted(places)
    text = shown("generate")
    places = [text.index(w) for w in ("--model", "--max-tokens", "Sampling", "Drafting", "--debug")]
    assert places == sorted(places)


def test_every_command_has_a_page_with_its_options_in_sentences() -> None:
    for path, command, context in every_command():
        page = shown(*path)
        assert page.startswith(f"Usage: root {' '.join(path)}".rstrip())
        for option in command.get_params(context):
            assert (option.help or "").endswith("."), (path, option.opts)
            assert option.opts[0] in page or option.metavar in page, (path, option.opts)


def test_no_page_names_what_is_an_environment_variable_or_left_to_the_api() -> None:
    text = "".join(shown(*path) for path, _, _ in every_command() if path[:1] != ["train"])
    assert "blas" not in text.lower() and "--candidates" not in text
    for given in (["--blas", "reference"], ["--candidates", "beams"]):
        result = CliRunner().invoke(cli.app, ["generate", "x", *given], prog_name="root")
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: no such option: {given[0]} ")


def test_defaults_and_types_are_shown_in_one_way() -> None:
    text = shown("generate")
    for line in (
        "  --seed N                        Same seed, same text, drafted or not. [0]\n",
        "  --temp X                        0 takes the likeliest token; more varies. [0]\n",
        "  --thinking, --no-thinking       Think first, or not. [as the template has it]\n",
        "  --sparse-prefill-min-context N  Read this many tokens densely first. [32768]\n",
        "(org/name). [smollm2-135m]\n",
    ):
        assert line in text
    text = shown("bench", "speed")
    assert "  --dtype <float32|bfloat16|float16>\n" + " " * 34 + "Type of the weights" in text


HELP_AND_MODULES = """
import json, sys
from mlx_redrafter.cli.main import main
sys.argv = ["mlx-redrafter", *json.loads({!r}), "--help"]
try:
    main()
except SystemExit as left:
    heavy = {{"mlx.core", "mlx_lm", "mlx_redrafter.api", "torch", "transformers"}}
    ours = [name for name in sys.modules if name.startswith("mlx_redrafter.cli.")]
    print(json.dumps([left.code, sorted(heavy & sys.modules.keys()), ours]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "path",
    [[], *([name] for name in VISIBLE), *(["bench", name] for name in MEASUREMENTS)],
    ids=" ".join,
)
def test_help_imports_the_named_command_alone_and_no_mlx(path: list[str]) -> None:
    code = HELP_AND_MODULES.format(json.dumps(path))
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    status, heavy, ours = json.loads(run.stderr)
    assert (status, heavy) == (0, [])
    files = {"race": "race.command", "bench": "bench.command"}
    commands = {f"mlx_redrafter.cli.{files.get(name, name)}" for name in VISIBLE}
    commands |= {f"mlx_redrafter.cli.bench.{name}" for name in MEASUREMENTS}
    named = {f"mlx_redrafter.cli.{files.get(name, name)}" for name in path[:1]}
    named |= {f"mlx_redrafter.cli.bench.{name}" for name in path[1:]}
    assert commands & set(ours) == named


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["tune"], "tune is now: mlx-redrafter bench budget"),
        (["tune", "--help"], "tune is now: mlx-redrafter bench budget"),
        (["--debug", "acceptance", "--count", "3"],
         "acceptance is now: mlx-redrafter bench acceptance"),
        (["prefill-bench", "-m", "x"], "prefill-bench is now: mlx-redrafter bench prefill"),
        (["prefill-search", "x", "--out", "y"],
         "prefill-search is now: mlx-redrafter bench patterns"),
        (["bench", "--count", "9"], "bench --count is now: mlx-redrafter bench speed --count"),
        (["bench", "--debug", "-o", "x"], "bench -o is now: mlx-redrafter bench speed -o"),
    ],
)  # fmt: skip
def test_old_names_answer_with_the_new_one(given: list[str], line: str) -> None:
    result = CliRunner().invoke(cli.app, given)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {line}\n")
    assert given[0] not in shown() or given[0] in ("bench", "--debug")


def test_bench_alone_lists_what_can_be_measured() -> None:
    result = CliRunner().invoke(cli.app, ["bench"])
    assert all(f"  {name}" in result.stdout for name in MEASUREMENTS)
