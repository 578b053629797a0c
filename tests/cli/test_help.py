"""--help of every command: in groups, in sentences, at once."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import mlx_redrafter
from mlx_redrafter.cli import main as cli


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_version_and_help(runner: CliRunner) -> None:
    result = runner.invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"mlx-redrafter {mlx_redrafter.__version__}\n")
    for command in ("generate", "chat", "info", "doctor", "demo"):
        assert runner.invoke(cli.app, [command, "--help"]).exit_code == 0


def test_help_loads_no_mlx() -> None:
    code = (
        "import sys\n"
        "from mlx_redrafter.cli.main import main\n"
        "sys.argv = ['mlx-redrafter', 'generate', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit:\n    sys.exit('mlx.core' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def every_command() -> dict[str, Any]:
    """All commands by name, with those whose options a file of their own reads."""
    from mlx_redrafter.cli import convert, train
    from mlx_redrafter.cli.bench import prefill as prefill_bench
    from mlx_redrafter.cli.bench import speed as bench

    root = typer.main.get_command(cli.app)
    found = dict(root.commands)  # type: ignore[attr-defined]
    for name, module in {
        "bench": bench, "convert": convert, "prefill-bench": prefill_bench, "train": train,
    }.items():  # fmt: skip
        found[name] = typer.main.get_command(module.app)
    return found


def test_every_option_says_what_it_does_in_a_sentence() -> None:
    silent = [
        f"{name} {option.opts[0]}: {option.help}"
        for name, command in every_command().items()
        for option in command.params
        if not (option.help or "").endswith(".")
    ]
    assert silent == []


def test_help_groups_the_commands_and_leads_with_what_is_wanted(runner: CliRunner) -> None:
    text = runner.invoke(cli.app, ["--help"]).stdout
    wanted = ["Use a model", "chat", "generate", "Prepare a", "train", "Measure", "bench"]
    places = [text.index(word) for word in wanted]
    assert places == sorted(places)
    assert set(cli.ORDER) == set(every_command())
    text = runner.invoke(cli.app, ["generate", "--help"]).stdout
    places = [text.index(w) for w in ("--model", "--max-tokens", "Sampling", "Drafting", "--debug")]
    assert places == sorted(places)


def test_help_on_a_mac_does_not_name_the_blas() -> None:
    code = (
        "import sys, typer, mlx_redrafter\n"
        "before, sys.platform = sys.platform, 'darwin'\n"
        "import mlx_redrafter.cli.options\n"
        "sys.platform = before\n"
        "from mlx_redrafter.cli.main import app\n"
        "app(['generate', '--help'])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--model" in run.stdout and "blas" not in run.stdout.lower()
