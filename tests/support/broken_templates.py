"""Chat templates that fail: while they are read, while they are rendered, or by their result."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from broken_commands import BENCH, FEW, TRAIN
from broken_world import Broken, copy_of

SAY = "{{ messages[0]['content'] }}"
TEMPLATES: list[Any] = [
    "", " ", "no variable at all", None, 5, True, 1.5, [], {}, [None], [3], {"default": 3},
    {"default": SAY}, {"other": SAY}, [SAY], [{"name": "default"}], [{"template": SAY}],
    [{"name": "rag", "template": SAY}, {"name": "tool_use", "template": SAY}],
    [{"name": "default", "template": 5}], [{"name": 3, "template": SAY}],
    "{% for m in messages %}" + SAY,
    "{% endfor %}", "{{", "{{ }}", "{%", "{% if %}", "{# never closed", "{% unknown_tag %}",
    "{{ messages | no_such_filter }}", "{{ messages is no_such_test }}",
    "{{ no_such_function() }}", "{{ no_such.attribute }}", "{{ messages[9]['content'] }}",
    "{{ messages['x']['y'] }}", "{% for t in tools %}{{ t }}{% endfor %}" + SAY,
    "{{ tools | length }}", "{% for d in documents %}{{ d }}{% endfor %}" + SAY,
    "{{ 'a' + 1 }}", "{{ 1 / 0 }}", "{{ [] | first }}", "{{ [1][5] }}", "{{ none.upper() }}",
    "{{ raise_exception('no, not ever.') }}", "{{ raise_exception('') }}",
    "{{ raise_exception() }}",
    "{{ raise_exception('two\nlines\nTraceback') }}", "{{ raise_exception(messages) }}",
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + SAY,
    "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}",
    "{% macro m(a) %}{{ m(a) }}{% endmacro %}{{ m(1) }}",
    "{% for i in range(10 ** 7) %}{% break %}{% endfor %}" + SAY,
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}" + SAY,
    "{{ messages.clear() }}", "{{ messages | tojson }}" + "{" * 3, "{{ strftime_now(3) }}" + SAY,
    "{{ strftime_now('%Q%') }}" + SAY, "{{ strftime_now('\ud800') }}" + SAY, "\ud800" + SAY,
    "\0" + SAY, "{{ 'x' * 3 }}", "<|unheard_of|>" + SAY + "<|nor_this|>",
    "{% set x = namespace(a=1) %}{{ x.b.c }}", "{{ (1, 2) | join(3) | int(base='x') }}",
    "{{ messages | map(attribute='content') | sum }}", "{{ '%d' | format('x') }}",
    "{{ messages | sort }}", "{{ messages | groupby('x') | list | first | first | length }}",
    "{% filter upper %}" + SAY, "{% call x() %}{% endcall %}", "{{ caller() }}",
    "{{ self.block() }}",
    "{% if add_generation_prompt == 'x' %}", "{{ messages[-1].content.split(3) }}",
    "{% for m in messages %}{{ m.content.items() }}{% endfor %}", "{{ bos_token + 3 }}",
    "{{ eos_token.nothing.here }}", "{% generation %}" + SAY, "{% continue %}", "{% break %}",
]  # fmt: skip
LINES = [
    f"generate hi -m model --no-draft {FEW}",
    f"generate hi -m model -d drafter --json {FEW}",
    f"generate hi -m model --no-draft --system-prompt short {FEW}",
    f"chat -m model --no-draft {FEW}",
    f"chat -m model -d drafter --system-prompt short {FEW}",
    f"race hi -m model -d drafter {FEW}",
    f"demo hi -m model -d drafter {FEW}",
    "info model -d drafter",
    f"acceptance -m model -d drafter --count 1 {FEW}",
    BENCH,
    f"train prompts -m model {TRAIN}",
    f"train prompts -m model {TRAIN} --prompts prompts.jsonl",
    "convert model --out new",
]
CHAT = b"one\n/stats\n/system short\ntwo\n/clear\nthree\n/retry\n/save talk.json\n/exit\n"


def broken_template(random: random.Random, world: Path, folder: Path, template: Any) -> Broken:
    """One command on a model with that template, kept in one of the places where it may lie."""
    copy_of(world, folder, ["model", "drafter", "prompts.jsonl"])
    given = random.choice(LINES).split()
    model, place = folder / "model", "tokenizer_config.json"
    config = json.loads((model / place).read_text())
    config.pop("chat_template", None)
    if isinstance(template, str) and template.isascii() and random.random() < 0.3:
        place = "chat_template.jinja"
        (model / place).write_text(template)
        for file in model.glob("*.jinja"):
            file.write_text(template)
    else:
        config["chat_template"] = template
        for file in model.glob("chat_template*"):
            file.unlink()
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    broken = Broken(random, folder, given, what=f"{place}: {template!r}"[:300])
    broken.keeps = ("run2",) if given[0] == "train" else ()
    broken.stdin = CHAT if given[0] == "chat" else b""
    return broken
