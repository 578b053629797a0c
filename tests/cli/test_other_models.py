"""generate, chat and race with models that have no drafter or no template, or that think first."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import SUMMARY, FakeModel, FakeTokenizer, install
from typer.testing import CliRunner

from mlx_redrafter.cli import chat, remarks
from mlx_redrafter.cli import main as cli
from mlx_redrafter.cli.conversation import Conversation
from mlx_redrafter.cli.options import DecodeOptions
from mlx_redrafter.drafters import published

ASKED = "[user]Capital?[assistant]"


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    return install(monkeypatch, FakeModel())


def test_a_model_without_a_template_continues_the_text_and_says_so(
    runner: CliRunner, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTokenizer, "has_chat_template", False)
    result = runner.invoke(cli.app, ["generate", "-q", "Once upon"])
    assert model.prompts == ["Once upon"]
    note = "note: fake has no chat template, so it continues the text as it stands"
    assert result.stderr == note + "\n"
    result = runner.invoke(cli.app, ["generate", "-q", "--system-prompt", "Hi", "Once upon"])
    assert result.stderr == note + ", without the system prompt\n"
    result = runner.invoke(cli.app, ["generate", "-q", "--no-thinking", "Once upon"])
    assert result.stderr.startswith("error: this model has no chat template")


def test_a_template_that_refuses_the_system_prompt_is_one_line(
    runner: CliRunner, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTokenizer, "takes_system", False)
    result = runner.invoke(cli.app, ["generate", "--system-prompt", "Hi", "Capital?"])
    assert result.exit_code == 1
    assert result.stderr == (
        "error: this model's chat template refuses the messages (System role not supported): "
        "leave out the system prompt, or do without it (generate --raw)\n"
    )


def test_variables_and_the_switch_for_thinking_reach_the_template(
    runner: CliRunner, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTokenizer, "knows", ("enable_thinking", "mood"))
    monkeypatch.setattr(
        "mlx_redrafter.cli.race.contest.run",
        lambda _, __, ids, *___, **____: model.calls.append({"prompt": "".join(map(chr, ids))}),
    )
    config = ["--chat-template-config", '{"mood": "calm"}']
    for command in (["generate", "-q"], ["race"]):
        for more, written in [
            ([], "[mood=calm]"),
            (["--no-thinking"], "[enable_thinking=False][mood=calm]"),
            (["--thinking"], "[enable_thinking=True][mood=calm]"),
        ]:
            model.calls.clear()
            runner.invoke(cli.app, [*command, "Capital?", *config, *more])
            assert model.prompts == [ASKED + written]
    lines = "Capital?\n/set thinking off\nAnd now?\n/set thinking\n/set thinking default\nSo?\n"
    model.calls.clear()
    result = runner.invoke(cli.app, ["chat", "-q", *config], input=lines)
    assert [prompt.count("enable_thinking=False") for prompt in model.prompts] == [0, 1, 0]
    assert result.stderr.splitlines() == [
        "thinking = off", "error: /set thinking needs a value; it is off", "thinking = default",
    ]  # fmt: skip


def test_a_template_without_the_switch_for_thinking_is_one_line(
    runner: CliRunner, model: FakeModel
) -> None:
    said = "this model's chat template has no switch for thinking (enable_thinking or thinking): "
    for arguments in (["generate", "Hi"], ["chat"], ["race", "Hi"]):
        result = runner.invoke(cli.app, [*arguments, "--no-thinking"])
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"error: {said}")
        assert len(result.stderr.splitlines()) == 1
    result = runner.invoke(cli.app, ["chat", "-q"], input="/set thinking off\n/set thinking\n")
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.endswith("it is default\n")


def test_a_model_that_thinks_has_room_for_its_thought(
    runner: CliRunner, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTokenizer, "think_start", "<think>")
    monkeypatch.setattr(FakeTokenizer, "think_end", "</think>")
    for context, given, longest in [
        (1000, [], 512), (4000, [], 2000), (40000, [], 4096), (40000, ["--max-tokens", "9"], 9),
    ]:  # fmt: skip
        model.target.config.max_positions = context
        runner.invoke(cli.app, ["generate", "Capital?", *given])
        assert model.calls[-1]["max_tokens"] == longest
    model.ends, model.answers = "length", [["<think>hm"]]
    result = runner.invoke(cli.app, ["generate", "-q", "--max-tokens", "1", "Capital?"])
    assert (result.exit_code, result.stdout) == (0, "<think>hm\n")
    assert result.stderr == (
        "the answer ended inside a thought, at the limit of 1 tokens: --max-tokens allows more\n"
    )


def test_a_model_without_a_trained_drafter_says_so_once_and_what_to_run(
    runner: CliRunner, model: FakeModel
) -> None:
    model.drafter = model.drafter_folder = None
    model.name = "my model"
    said = (
        "no trained drafter for my model was found, so drafts come from the text itself; to train "
        "one: mlx-redrafter train -m 'my model', to use one: --drafter FOLDER-OR-ID\n"
    )
    result = runner.invoke(cli.app, ["generate", "Capital?"])
    assert (result.stdout, result.stderr) == ("Paris.\n", said + SUMMARY)
    result = runner.invoke(cli.app, ["chat"], input="One?\nTwo?\n")
    assert (result.stdout, result.stderr) == ("Paris.\nParis.\n", said + SUMMARY * 2)
    for arguments in (["generate", "-q", "Hi"], ["generate", "--json", "Hi"], ["chat", "-q"]):
        assert runner.invoke(cli.app, arguments, input="Hi\n").stderr == ""
    model.name = "mlx-community/Llama-3.1-8B-Instruct-4bit"  # others have published some for it
    head = f"--drafter {published.recommended(model.name).id}; "  # type: ignore[union-attr]
    assert head in runner.invoke(cli.app, ["chat"], input="One?\nTwo?\n").stderr.splitlines()[0]
    model.drafting = False  # --no-draft
    assert runner.invoke(cli.app, ["generate", "Capital?"]).stderr == SUMMARY


@pytest.mark.parametrize(
    ("drafter", "draft", "tree", "said"),
    [
        ("mine", True, {}, "drafting is on: from mine and the text itself"),
        ("mine", True, {"lookup": 0}, "drafting is on: from mine"),
        ("mine", True, {"beam_length": 0}, "drafting is on: from the text itself"),
        ("mine", False, {"lookup": 0}, "drafting is off; /drafter on drafts from mine"),
        ("mine", True, {"nodes": 1}, "drafting is on, but the options leave nothing to draft from"),
        (
            None,
            True,
            {},
            "drafting is on: from the text itself (no trained drafter is loaded)",
        ),
        (
            None,
            False,
            {},
            "drafting is off; /drafter on drafts from the text itself "
            "(no trained drafter is loaded)",
        ),
        (
            None,
            True,
            {"lookup": 0},
            "drafting is on, but the options leave nothing to draft from "
            "(no trained drafter is loaded)",
        ),
    ],
)
def test_the_chat_says_what_drafts_and_switches_it(
    drafter: str | None, draft: bool, tree: dict[str, int], said: str
) -> None:
    talk = Conversation(
        FakeTokenizer(), DecodeOptions(**tree), context=1000, drafter=drafter, draft=draft
    )
    assert talk.command("/drafter").text == said
    switch = "off" if draft else "on"
    assert talk.command(f"/drafter {switch}").text.startswith(f"drafting is {switch}")
    assert talk.arguments()["draft"] is not draft
    assert talk.command(f"/drafter {'on' if draft else 'off'}").text == said
    assert talk.arguments()["draft"] is draft


def test_an_answer_that_ends_in_a_thought_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeTokenizer, "think_start", "<think>")
    monkeypatch.setattr(FakeTokenizer, "think_end", "</think>")
    model = FakeModel(answers=[["<think>", "Let me"], ["<think>a</think>", "b"]], ends="length")
    install(monkeypatch, model)
    talking = chat.Chat(model, model.tokenizer, DecodeOptions(max_tokens=2), interactive=True)
    talking.say("Hi")
    assert "inside a thought, at the limit of 2 tokens: /set max_tokens" in capsys.readouterr().err
    talking.say("Hi")
    assert "inside a thought" not in capsys.readouterr().err


def test_a_chat_with_a_base_model_continues_the_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeTokenizer, "has_chat_template", False)
    model = install(monkeypatch, FakeModel(answers=[[" upon", " a time"], [" cat."]]))
    result = CliRunner().invoke(cli.app, ["chat", "-q"], input="Once\nThe\n")
    assert (result.exit_code, result.stdout) == (0, " upon a time\n cat.\n")
    assert model.prompts == ["Once", "Once upon a time\nThe"]
    assert result.stderr == (
        "note: fake has no chat template, so it continues the text as it stands\n"
    )


def test_a_chat_goes_on_after_a_template_that_fails(
    runner: CliRunner, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTokenizer, "takes_system", False)
    lines = "One?\n/system Be brief.\nTwo?\n/stats\n"
    result = runner.invoke(cli.app, ["chat", "-q"], input=lines)
    assert (result.exit_code, result.stdout) == (1, "Paris.\n")
    said = result.stderr.splitlines()
    assert said[1].startswith("error: this model's chat template refuses the messages (System role")
    assert said[2] == "last answer"


def test_a_kept_drafter_goes_by_its_day(tmp_path: Path) -> None:
    folder = tmp_path / "20261126-231631-run"
    folder.mkdir()
    assert remarks.drafter_name(folder) == "20261126-231631-run"
    (folder / "kept.json").write_text('{"trained": "2026-11-26T23:16:31"}')
    assert remarks.drafter_name(folder) == "the drafter trained on 2026-11-26"
