"""Chat templates of other people: what fails is one line, and what they know is found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_chat import TEMPLATE, WORDS, refusal, words, write_tokenizer

import mlx_redrafter
from mlx_redrafter.text.template import (
    has_template,
    opens_thought,
    prompt_ids,
    render,
    render_text,
    thinking_switch,
    thinks,
)
from mlx_redrafter.text.tokenizer import load_tokenizer
from mlx_redrafter.training.prompts import user_header

HI = [{"role": "user", "content": "da de"}]
SYSTEM = [{"role": "system", "content": "ba be"}, *HI]
TEXT = "{{ messages[-1]['content'] }}"
RAW = "do without it (generate --raw)"
THINK = "{{ '<think>' if 0 }}{{ '</think>' if 0 }}"  # the marks, which the vocabulary lacks


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """A function from a template to a tokenizer with it."""

    def load(template: Any) -> Any:
        write_tokenizer(tmp_path, template)
        return load_tokenizer(tmp_path)

    return load


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TEXT + "{{ 1 / 0 }}", "fails (ZeroDivisionError: division by zero)"),
        (TEXT + "{{ 'a' + 1 }}", "fails (TypeError: can only concatenate str"),
        (TEXT + "{{ missing.name }}", "fails ('missing' is undefined)"),
        (TEXT + "{{ messages[9]['role'] }}", "fails (list object has no element 9)"),
        (TEXT + "{% for t in tools %}{% endfor %}", "fails (TypeError: 'NoneType' object is not"),
        ("{% for m in messages %}" + TEXT, "fails (Unexpected end of template."),
        ("{% if %}", "fails (Expected an expression"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails (RecursionError: maximum"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "fails (OverflowError: Range too big"),
        ("{{ messages.append(1) }}", "fails (access to attribute 'append' of"),
        ("{% include 'other' %}", "fails (TypeError: no loader for this environment specified)"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages (roles must alter"),
    ],
)
def test_a_template_that_fails_is_one_line(tokenizer: Any, template: str, reason: str) -> None:
    loaded = tokenizer(template)
    for messages in (HI, SYSTEM):
        message = refusal(lambda messages=messages: render(loaded, messages))
        assert message.startswith(f"this model's chat template {reason}")
        advice = RAW if reason.startswith("refuses") else f"mend it, or {RAW}"
        assert message.endswith(f"): {advice}") and "\n" not in message
    assert refusal(lambda: user_header(loaded)).startswith(f"this model's chat template {reason}")


def test_half_a_surrogate_pair_is_no_text(tokenizer: Any) -> None:
    loaded = tokenizer("{{ '\\ud800' }}" + TEXT)
    for use in (render, render_text, lambda loaded, _: user_header(loaded)):
        message = refusal(lambda use=use: use(loaded, HI))
        assert message.startswith("this model's chat template fails (") and message.endswith(RAW)


def test_the_system_prompt_is_to_be_left_out_only_where_that_helps(tokenizer: Any) -> None:
    loaded = tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + TEXT
    )
    assert refusal(lambda: render(loaded, SYSTEM)) == (
        f"this model's chat template refuses the messages (no system): leave out the system "
        f"prompt, or {RAW}"
    )
    assert words(*render(loaded, HI)) == "da de"
    assert mlx_redrafter.render(loaded, HI) == render(loaded, HI)


@pytest.mark.parametrize("template", ["{{ '' }}", "   "])
def test_an_empty_prompt_is_refused(tokenizer: Any, template: str) -> None:
    assert "writes an empty prompt" in refusal(lambda: render(tokenizer(template), HI))


def named(*names: str) -> list[dict[str, str]]:
    return [{"name": name, "template": f"{name} {TEXT}"} for name in names]


@pytest.mark.parametrize(
    ("names", "config", "first"),
    [
        (("default", "bo"), {}, "default"),
        (("default", "tool_use"), {}, "default"),
        (("default", "tool_use"), {"tools": [{"type": "function"}]}, "tool_use"),
        (("bo",), {}, "bo"),
        (("bo", "be"), {"chat_template": "be"}, "be"),
        (("bo", "tool_use"), {"chat_template": "bo"}, "bo"),
    ],
)
def test_one_of_several_named_templates(
    tokenizer: Any, names: tuple[str, ...], config: dict[str, Any], first: str
) -> None:
    assert render_text(tokenizer(named(*names)), HI, config) == f"{first} da de"


@pytest.mark.parametrize("names", [("bo", "tool_use"), ("be", "bo"), ("tool_use",)])
def test_named_templates_without_a_default_are_named(
    tokenizer: Any, names: tuple[str, ...]
) -> None:
    assert refusal(lambda: render(tokenizer(named(*names)), HI)) == (
        f"this model has named chat templates ({', '.join(names)}) and none is the default: "
        f'choose one with --chat-template-config \'{{"chat_template": "{names[0]}"}}\''
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for p in messages[-1]['content'] %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
        "{% endfor %}",
        "{{ messages[-1]['content'][0]['text'] }}",
        "{{ messages[-1]['content'][0].text.strip() }}",
    ],
    ids=["loop over parts", "first part", "fails on text"],
)
def test_a_template_that_wants_parts_gets_them(tokenizer: Any, template: str) -> None:
    assert words(*render(tokenizer(template), HI)) == "da de"
    assert render_text(tokenizer(template), HI) == "da de"


@pytest.mark.parametrize("template", [None, "", []])
def test_a_base_model_continues_the_text(tokenizer: Any, template: Any) -> None:
    loaded = tokenizer(template)
    assert not has_template(loaded) and not thinks(loaded)
    assert refusal(lambda: render(loaded, HI)).startswith("this model has no chat template")
    said = [*SYSTEM, {"role": "assistant", "content": " di"}, {"role": "user", "content": "do"}]
    assert words(*prompt_ids(loaded, said)) == "da de di do"


def test_messages_that_are_none_are_refused(tokenizer: Any) -> None:
    loaded = tokenizer(TEMPLATE)
    for messages in ([], ["hello"], [{"content": "da"}]):
        assert "messages are dicts" in refusal(lambda given=messages: render(loaded, given))


@pytest.mark.parametrize(
    ("template", "switch"),
    [
        ("{% if enable_thinking is defined and not enable_thinking %}ba{% endif %}",
         "enable_thinking"),
        ("{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
         "{{ 'ba' if thinking else 'be' }}", "thinking"),
        ("{{ 'ba' if enable_thinking | default(true) else 'be' }}", "enable_thinking"),
        ("{% if thinking is defined and thinking is false %}ba{% endif %}", "thinking"),
        ("{{ messages[-1].thinking }}thinking enable_thinking", None),
        ("{% set thinking = true %}{{ 'ba' if thinking }}", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_switch_for_thinking_is_the_variable_that_changes_the_prompt(
    tokenizer: Any, template: str, switch: str | None
) -> None:
    loaded = tokenizer(TEXT + template)
    if switch is None:
        assert "has no switch for thinking" in refusal(lambda: thinking_switch(loaded, False))
        return
    on, off = (thinking_switch(loaded, value) for value in (True, False))
    assert (on, off) == ({switch: True}, {switch: False})
    assert render_text(loaded, HI, on) != render_text(loaded, HI, off)


def test_a_thought_that_the_prompt_opens_or_closes(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tokenizer(
        TEXT + THINK + "{% if enable_thinking is defined and not enable_thinking %} fo{% else %} fi"
        "{% endif %}"
    )
    monkeypatch.setattr("mlx_redrafter.text.template._MARKERS", (("fi", "fo"),))
    for on in (True, False):
        config = {"enable_thinking": on}
        assert opens_thought(loaded, render(loaded, HI, config)) is on
        assert thinks(loaded, config) is on
    assert opens_thought(loaded, "ba fi\n") and not opens_thought(loaded, "fi ba")
    assert not opens_thought(loaded, [WORDS.index("ba")])
