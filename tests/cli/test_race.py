"""The race: honest clocks on a device that works ahead, the verdict, and every kind of output."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ByteTokenizer, Oracle, plainly
from rich.console import Console
from test_generate import LENGTH, LETTERS, PROMPT, model_of
from typer.testing import CliRunner

from mlx_redrafter.api import Model, stream_generate
from mlx_redrafter.cli import main as cli
from mlx_redrafter.cli.options import DecodeOptions, ModelOptions
from mlx_redrafter.cli.race import contest as race
from mlx_redrafter.cli.race import screen as race_screen
from mlx_redrafter.cli.race.lanes import Lane, Piece, View, take_turns, views
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.text.answer import GenerationResponse

BIAS = [f"{token}={value:g}" for token, value in LETTERS.items()]


class Device:
    """Works off what was launched, in order, while the host does other things."""

    def __init__(self) -> None:
        self.time, self.busy_until = 0.0, 0.0

    def launch(self, cost: float) -> float:
        self.busy_until = max(self.time, self.busy_until) + cost
        return self.busy_until

    def wait(self, moment: float) -> None:
        self.time = max(self.time, moment)

    def answer(
        self, cost: float, steps: int, drafted: int = 0, prompt: float = 0.0
    ) -> Generator[GenerationResponse, None, None]:
        """Like the engine's: a step is in flight whenever a token is handed out."""
        stats = DraftStats(prefill_seconds=prompt)
        self.wait(self.launch(prompt))
        ahead = self.launch(cost)
        for step in range(steps):
            done, ahead = ahead, self.launch(cost) if step < steps - 1 else 0.0
            self.wait(done)
            for i in range(drafted + 1):
                last = step == steps - 1 and i == drafted
                yield GenerationResponse(
                    "x", 7, i < drafted, 3, 0.0, 0, 0.0, 0.0, "length" if last else None, stats
                )

    def lane(self, name: str, settled: bool = True, **answer: Any) -> Lane:
        def settle() -> None:
            if settled:
                self.wait(self.busy_until)

        return Lane(name, self.answer(**answer), lambda: self.time, settle)


@pytest.mark.parametrize("turn", [0.0, 3.0, math.inf])
def test_a_lane_takes_the_time_that_it_takes_alone(turn: float) -> None:
    device = Device()
    lanes = (
        device.lane("plain", cost=1.0, steps=12, prompt=40.0),
        device.lane("drafted", cost=1.5, steps=4, drafted=2, prompt=5.0),
    )
    take_turns(lanes, turn=turn)
    assert [lane.clock for lane in lanes] == [pytest.approx(12.0), pytest.approx(6.0)]
    assert [seen.speed for seen in views(lanes)] == [pytest.approx(1.0), pytest.approx(2.0)]
    assert [lane.prompt_seconds for lane in lanes] == [40.0, 5.0]


def test_without_waiting_the_clocks_would_lie() -> None:
    device = Device()
    lanes = (
        device.lane("plain", settled=False, cost=1.0, steps=12),
        device.lane("drafted", settled=False, cost=1.5, steps=12),
    )
    take_turns(lanes, turn=0.0)
    assert abs(lanes[0].clock - 12.0) + abs(lanes[1].clock - 18.0) > 2.0


def test_the_one_behind_has_the_turn_and_both_are_shown_at_the_same_time() -> None:
    device, shown = Device(), []
    lanes = (
        device.lane("plain", cost=1.0, steps=30),
        device.lane("drafted", cost=1.75, steps=8, drafted=2),
    )

    def look(seen: Any) -> None:
        shown.append(seen)
        if not any(lane.finished for lane in lanes):
            # A turn, the step that it ended in, and the one then in flight.
            assert abs(lanes[0].clock - lanes[1].clock) <= 2.0 + 2 * 1.75

    take_turns(lanes, look, turn=2.0)
    for plain, drafted in shown[:-1]:  # the times are exact in binary
        assert drafted.seconds == min(plain.seconds, 8 * 1.75)
        assert plain.tokens == plain.seconds // 1.0
        assert drafted.steps == drafted.seconds // 1.75
    assert shown[0] == [View("plain", (), 0, 0.0), View("drafted", (), 0, 0.0)]
    assert [(v.tokens, v.steps) for v in shown[-1]] == [(30, 30), (24, 8)]


def test_the_first_leads_by_tokens_and_the_other_comes_later() -> None:
    device = Device()
    lanes = (
        device.lane("plain", cost=1.0, steps=30),
        device.lane("d", cost=1.5, steps=10, drafted=2),
    )
    take_turns(lanes, turn=1.0)
    first = views(lanes, lanes[1].clock)
    assert [(v.tokens, v.status) for v in first] == [(15, ""), (30, "finished, 15 tokens ahead")]
    assert views(lanes)[0].status == "finished 15.00 s later"
    assert views(lanes, 14.9)[1].status == ""


def pieces(text: str, drafted: bool = False) -> tuple[Piece, ...]:
    return tuple(Piece(letter, ord(letter), drafted) for letter in text)


def view(text: str, seconds: float = 1.0) -> View:
    return View("way", pieces(text), len(text), seconds)


def test_the_verdict() -> None:
    assert race.verdict(view("abcd"), view("abcd", 0.5), "float32", True) == [
        "Same text: yes, all 4 tokens are identical.",
        "With drafting: 2.00x the speed of plain decoding.",
    ]
    assert (
        "here drafting does not pay" in race.verdict(view("ab"), view("ab", 2.0), "4-bit", False)[1]
    )
    lines = race.verdict(view("one\ntwo"), view("one\nto"), "float32", True)
    assert lines[:3] == [
        "Same text: NO, they part at token 6.",
        "  plain decoding  ...one\\nt >>>wo",
        "  with drafting   ...one\\nt >>>o",
    ]
    assert "mlx-redrafter doctor" in lines[3] and "round" not in lines[3]
    for dtype in ("bfloat16", "float32"):
        assert f"In {dtype} a pass over several tokens may round differently" in "\n".join(
            race.verdict(view("ab"), view("ac"), dtype, False)
        )
    shorter = race.verdict(view("ab"), view("a"), "float32", True)
    assert shorter[0].endswith("at token 2.") and shorter[2].endswith("...a >>> (nothing)")


def screen_of(width: int, height: int, **options: Any) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, **options
    )  # fmt: skip


@pytest.mark.parametrize("size", [(120, 50), (80, 24), (79, 24), (40, 24), (40, 14)])
def test_a_frame_fits_the_terminal_and_shows_the_newest_lines(size: tuple[int, int]) -> None:
    out = screen_of(*size, color_system=None)
    long = " ".join(f"word{n}" for n in range(700)) + "\n\tlast 漢字"
    seen = [View(name, pieces(long), 9, 1.0, "finished, 3 tokens ahead") for name in "ab"]
    lines = [
        "".join(segment.text for segment in line)
        for line in out.render_lines(race_screen.frame(seen, out), pad=False)
    ]
    assert len(lines) < size[1]
    assert all(len(line.rstrip()) <= size[0] for line in lines)
    text = "\n".join(lines)
    side_by_side = size[0] >= race_screen.NARROW
    assert len([line for line in lines if "last 漢字" in line]) == (1 if side_by_side else 2)
    assert text.count("last 漢字") == 2 and "word1 " not in text
    assert text.count("finished, 3 tokens ahead") == 2
    assert text.count("tokens per step") == 2 and "drafted and accepted" in text


def test_accepted_drafts_stand_out_without_colour_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [View("a", (Piece("own", 1, False), Piece("draft\x1b[2J", 2, True)), 1, 1.0)]
    coloured, plain = screen_of(80, 24, color_system="256"), None
    coloured.print(race_screen.frame(seen, coloured))
    monkeypatch.setenv("NO_COLOR", "1")
    plain = screen_of(80, 24, color_system="256")
    plain.print(race_screen.frame(seen, plain))
    assert "\x1b[38;5;166mown\x1b[0m\x1b[1;38;5;32mdraft[2J\x1b[0m" in coloured.file.getvalue()
    assert " own\x1b[1mdraft[2J\x1b[0m" in plain.file.getvalue()


def test_ctrl_c_leaves_the_terminal_with_its_cursor() -> None:
    out = screen_of(80, 24)
    with pytest.raises(KeyboardInterrupt), race_screen.screen(out) as show:
        show([view("abc")])
        raise KeyboardInterrupt
    written = out.file.getvalue()
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l") >= 0
    assert written.endswith("\n\x1b[?25h") or written.endswith("\x1b[?25h\n")


def test_what_cannot_be_a_race_is_refused_before_loading(tmp_path: Path) -> None:
    nowhere = tmp_path / "none" / "race.svg"
    for source, options, picture, message in (
        (ModelOptions(no_draft=True), DecodeOptions(), None, "leave out --no-draft"),
        (ModelOptions(), DecodeOptions(nodes=1), None, "nothing is drafted"),
        (ModelOptions(), DecodeOptions(), nowhere, "there is no folder"),
    ):
        with pytest.raises(OptionError, match=message):
            race.check(source, options, picture)
    race.check(ModelOptions(), DecodeOptions(nodes=4), tmp_path / "race.svg")


@pytest.fixture(scope="module")
def model(byte_target: Decoder) -> Model:
    ids = ByteTokenizer().encode(PROMPT)
    answer = plainly(byte_target, ids, LENGTH, SamplingParams(logit_bias=LETTERS))
    return model_of(byte_target, Oracle(byte_target, [ids + answer], (0, 0, 1, 0, 0, 9)))


@pytest.fixture
def invoke(model: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command on the tiny model; `replaced` takes the place of stream_generate."""

    def command(*arguments: str, model: Model = model, replaced: Any = None) -> Any:
        # By name: the package exports a function that is called as this module is.
        api = importlib.import_module("mlx_redrafter.api")
        monkeypatch.setattr(api, "load", lambda *_, **__: (model, ByteTokenizer()))
        monkeypatch.setattr(api, "stream_generate", replaced or stream_generate)
        bias = [part for item in BIAS for part in ("--logit-bias", item)]
        line = ["race", "--raw", PROMPT, "--max-tokens", str(LENGTH), *bias, *arguments]
        return CliRunner().invoke(cli.app, line)

    return command


def altered(*arguments: Any, draft: bool, **options: Any) -> Iterator[GenerationResponse]:
    """Another fifth token where it drafts."""
    stream = stream_generate(*arguments, draft=draft, **options)
    for i, response in enumerate(stream):
        yield replace(response, token=0, text="?") if draft and i == 4 else response


def test_a_pipe_gets_the_table_and_the_verdict(invoke: Callable[..., Any]) -> None:
    result = invoke()
    assert result.exit_code == 0, result.stderr
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["tokens", "seconds", "tokens/s", "tokens", "per", "step"]
    assert lines[1].split()[:3] == ["plain", "decoding", str(LENGTH)]
    assert lines[1].endswith("1.00") and float(lines[2].split()[-1]) > 1.5
    assert lines[4] == f"Same text: yes, all {LENGTH} tokens are identical."
    assert re.fullmatch(r"With drafting: \d+\.\d\dx the speed of plain decoding.*", lines[5])
    assert "Warming up" in result.stderr and "dtype float32" in result.stderr


def test_json_is_one_object_with_all_figures(invoke: Callable[..., Any], model: Model) -> None:
    found = json.loads(invoke("--json", "--seed", "3", "--nodes", "5").stdout)
    assert found["same"] is True and found["first_difference"] is None
    plain, drafted = found["plain"], found["drafted"]
    assert plain["text"] == drafted["text"] and len(plain["text"]) == LENGTH
    assert (plain["tokens"], plain["steps"], plain["accepted"]) == (LENGTH, LENGTH, 0)
    assert drafted["tokens"] == drafted["steps"] + drafted["accepted"] == LENGTH
    assert found["ratio"] == pytest.approx(
        drafted["tokens_per_second"] / plain["tokens_per_second"], rel=0.01
    )
    assert (found["seed"], found["tree"]) == (3, "beam 3x4, 5 nodes, lookup 4")
    assert {"model", "dtype", "drafter", "chip", "device", "mlx", "blas"} <= found.keys()


def test_other_tokens_in_float32_are_exit_code_1(
    invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_redrafter.runtime.blas.rows_alone", lambda: True)
    result = invoke(replaced=altered)
    assert result.exit_code == 1
    assert "Same text: NO, they part at token 5." in result.stdout
    assert ">>>?" in result.stdout and "doctor" in result.stdout
    found = json.loads(invoke("--json", replaced=altered).stdout)
    assert (found["same"], found["first_difference"]["token"]) == (False, 5)
    monkeypatch.setattr("mlx_redrafter.runtime.blas.rows_alone", lambda: False)
    result = invoke(replaced=altered)
    assert result.exit_code == 0 and "In float32 a pass over several tokens" in result.stdout
    monkeypatch.setattr("mlx_redrafter.runtime.blas.rows_alone", lambda: True)
    monkeypatch.setattr(race, "dtype_of", lambda target: "bfloat16")
    result = invoke(replaced=altered)
    assert result.exit_code == 0 and "may round differently" in result.stdout


def test_every_piece_keeps_the_kind_of_the_token_that_released_it(model: Model) -> None:
    options: Any = {"max_tokens": LENGTH, "logit_bias": LETTERS}
    told = list(stream_generate(model, ByteTokenizer(), PROMPT, **options))  # type: ignore[arg-type]
    lane = Lane("way", stream_generate(model, ByteTokenizer(), PROMPT, **options))  # type: ignore[arg-type]
    take_turns([lane])
    assert lane.pieces == [Piece(r.text, r.token, r.from_draft) for r in told]
    assert any(p.drafted for p in lane.pieces) and not all(p.drafted for p in lane.pieces)
    assert all(not step.pieces[-1].drafted for step in lane.steps)
    assert len(lane.steps) == told[-1].stats.steps


def test_a_model_without_a_drafter_drafts_from_the_text(
    invoke: Callable[..., Any], model: Model
) -> None:
    alone = model_of(model.target, None)
    assert json.loads(invoke("--json", model=alone).stdout)["tree"] == "automatic"
    fixed = invoke("--json", "--lookup", "5", "--nodes", "6", model=alone)
    assert json.loads(fixed.stdout)["tree"] == "lookup of 5"
    result = invoke("--lookup", "0", model=alone)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: there is no drafter for tiny and --lookup 0")
    assert len(result.stderr.splitlines()) == 1


def test_ctrl_c_is_130(invoke: Callable[..., Any]) -> None:
    count = itertools.count()

    def interrupted(*arguments: Any, **options: Any) -> Iterator[GenerationResponse]:
        for response in stream_generate(*arguments, **options):
            if next(count) == 2 * race.WARM_UP_TOKENS + 3:
                raise KeyboardInterrupt
            yield response

    result = invoke(replaced=interrupted)
    assert (result.exit_code, result.stdout) == (130, "")


def test_a_terminal_gets_the_frame_and_no_table(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = screen_of(80, 24, color_system="256", highlight=False)
    monkeypatch.setattr(race, "Console", lambda **_: out)
    options = DecodeOptions(max_tokens=LENGTH, logit_bias=BIAS)
    code = race.run(model, ByteTokenizer(), PROMPT, options, question="Once\nagain?")
    written = out.file.getvalue()
    assert code == 0 and written.startswith("> Once again?")
    assert "╭─" in written and "Same text: yes" in written and "tokens/s  tokens per" not in written


def test_a_picture_is_the_moment_of_the_first_finish(
    invoke: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "race.svg"
    assert invoke("--save-svg", str(path)).exit_code == 0
    svg = path.read_text().replace("&#160;", " ")
    assert svg.startswith("<svg") and "@font-face" not in svg
    assert "finished" in svg and "Same text: yes" in svg and "chip" in svg
    assert svg.count("s later") == 0
    assert "error: --save-svg" in invoke("--save-svg", str(tmp_path)).stderr
