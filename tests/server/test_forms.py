"""What an answer may be, in every dialect: schemas, patterns, and calls that are demanded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import httpx  # isort: skip
import openai
import pytest
from halves import half_slow
from jsonschema import Draft202012Validator
from mlx_lm.tool_parsers import json_tools, mistral, qwen3_coder
from pydantic import BaseModel
from scripted_engine import Running, ScriptedEngine, running
from tiny_json import write_json_model

from mlx_redrafter import generate, load
from mlx_redrafter.api import Model
from mlx_redrafter.errors import OptionError
from mlx_redrafter.server.engine import ModelEngine
from mlx_redrafter.server.forced_calls import calls
from mlx_redrafter.server.tools import FORMATS, ToolFormat

HI: Any = [{"role": "user", "content": "Which are red?"}]
COLOURS: dict[str, Any] = {
    "type": "object",
    "properties": {"red": {"type": "integer"}, "as": {"enum": ["green", "blue"]}},
    "required": ["red", "as"],
}
FORM = {"type": "json_schema", "json_schema": {"name": "colours", "schema": COLOURS}}
FEW = {"type": "integer", "minimum": 1, "maximum": 9}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 4},
        "days": {"$ref": "#/$defs/few"},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days", "unit"],
    "$defs": {"few": FEW},
}
SUM = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"get_weather": WEATHER, "sum": SUM}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}
    for name, parameters in NAMED.items()
]
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]
ANTHROPIC = [{"name": name, "input_schema": parameters} for name, parameters in NAMED.items()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    model, tokenizer = load(write_json_model(tmp_path_factory.mktemp("json")), None)
    return Model.of(model.name, model.folder, model.target, compiled=False), tokenizer


@pytest.fixture(scope="module", params=[1, 3], ids=["in turns", "together"])
def server(request: pytest.FixtureRequest, pair: tuple[Model, Any]) -> Iterator[Running]:
    with running(ModelEngine(*pair), parallel=request.param) as found:
        yield found


@pytest.fixture(scope="module")
def scripted() -> Iterator[Running]:
    with running(ScriptedEngine(context=2000)) as found:
        yield found


def posted(server: Running, path: str, **body: Any) -> dict[str, Any]:
    found = httpx.post(server.url + path, json={"max_tokens": 100, **body}, timeout=60)
    assert found.status_code == 200, found.text
    answer: dict[str, Any] = found.json()
    return answer


@pytest.mark.parametrize("seed", range(2))
def test_a_schema_in_every_dialect(server: Running, seed: int) -> None:
    """The same text for the same seed, and it is valid."""
    sampled = {"temperature": 1.0, "seed": seed}
    flat = {"type": "json_schema", "name": "colours", "schema": COLOURS}
    chat = posted(server, "/v1/chat/completions", messages=HI, response_format=FORM, **sampled)
    response = posted(server, "/v1/responses", input=HI, text={"format": flat}, **sampled)
    config = {"format": flat}
    message = posted(server, "/v1/messages", messages=HI, output_config=config, **sampled)
    texts = {
        chat["choices"][0]["message"]["content"],
        response["output"][0]["content"][0]["text"],
        message["content"][0]["text"],
    }
    assert len(texts) == 1
    Draft202012Validator(COLOURS).validate(json.loads(texts.pop()))


@pytest.mark.parametrize(
    "more",
    [
        {"guided_regex": "(red|blue)+"}, {"guided_choice": ["red", "blue"]},
        {"structured_outputs": {"choice": ["red", "blue"]}}, {"grammar": 'root ::= "red" | "blue"'},
        {"guided_grammar": 'start: "red" | "blue"'}, {"guided_json": {"enum": ["red", "blue"]}},
        {"json_schema": {"enum": ["red", "blue"]}}, {"structured_outputs": {"regex": "red|blue"}},
    ],
    ids=str,
)  # fmt: skip
def test_the_fields_of_other_servers(scripted: Running, pair: tuple[Model, Any], more: Any) -> None:
    scripted.engine.compiled.clear()
    posted(scripted, "/v1/completions", prompt="Which?", **more)
    ((sources, thought),) = scripted.engine.compiled
    assert not thought
    model, tokenizer = pair
    made = model.grammars(tokenizer).compiled(*sources)
    text = generate(*pair, "Which?", grammar=made, max_tokens=9)
    assert text.strip('"').startswith(("red", "blue"))


def test_any_object(scripted: Running) -> None:
    posted(scripted, "/v1/chat/completions", messages=HI, response_format={"type": "json_object"})
    ((source,), _) = scripted.engine.compiled[-1]
    assert source["json_schema"]["type"] == "object"


def test_two_forms_are_refused(scripted: Running) -> None:
    body = {"messages": HI, "response_format": FORM, "guided_regex": "a"}
    found = httpx.post(f"{scripted.url}/v1/chat/completions", json=body)
    assert found.status_code == 400
    assert "cannot be followed at once" in found.json()["error"]["message"]


def checked_call(name: str, arguments: dict[str, Any]) -> None:
    Draft202012Validator(NAMED[name]).validate(arguments)


@pytest.mark.parametrize("seed", range(2))
def test_a_call_is_demanded_in_every_dialect(server: Running, seed: int) -> None:
    sampled = {"temperature": 1.0, "seed": seed}
    chat = posted(
        server, "/v1/chat/completions", messages=HI, tools=TOOLS, tool_choice="required",
        parallel_tool_calls=False, **sampled,
    )["choices"][0]  # fmt: skip
    (call,) = chat["message"]["tool_calls"]
    assert chat["finish_reason"] == "tool_calls" and chat["message"]["content"] is None
    checked_call(call["function"]["name"], json.loads(call["function"]["arguments"]))
    named = {"type": "function", "name": "sum"}
    response = posted(
        server, "/v1/responses", input=HI, tools=FLAT, tool_choice=named, **sampled
    )  # fmt: skip
    (item,) = response["output"]
    assert (item["type"], item["name"]) == ("function_call", "sum")
    checked_call("sum", json.loads(item["arguments"]))
    only = {"type": "any", "disable_parallel_tool_use": True}
    for choice in (only, {"type": "tool", "name": "get_weather"}):
        message = posted(
            server, "/v1/messages", messages=HI, tools=ANTHROPIC, tool_choice=choice, **sampled
        )
        (block,) = message["content"]
        assert message["stop_reason"] == "tool_use"
        assert block["name"] == choice.get("name", block["name"])
        checked_call(block["name"], block["input"])


def test_a_choice_that_is_not_possible(scripted: Running) -> None:
    named = {"type": "function", "function": {"name": "other"}}
    for choice, tools in (("required", []), (named, TOOLS), ("x", TOOLS), ({"type": "y"}, TOOLS)):
        body = {"messages": HI, "tools": tools, "tool_choice": choice}
        error = httpx.post(f"{scripted.url}/v1/chat/completions", json=body).json()["error"]
        assert error["param"] == "tool_choice", error


def test_a_form_leaves_room_for_calls(scripted: Running) -> None:
    """Tools that may be called and a form: the answer is one or the other."""
    posted(scripted, "/v1/chat/completions", messages=HI, tools=TOOLS, response_format=FORM)
    (sources, _) = scripted.engine.compiled[-1]
    assert len(sources) == 2 and "json_schema" in sources[1]


def test_the_grammar_begins_behind_the_thought(scripted: Running) -> None:
    """Where one may come, where the prompt has opened it, and not where it has closed it."""
    tokenizer, marks = scripted.engine.tokenizer, ("<think>", "</think>")
    tokenizer.think_start, tokenizer.think_end = marks
    try:
        for begun, thought, opened in (("", marks, False), ("<think>", marks, True),
                                       ("<think></think>", None, False)):  # fmt: skip
            talk = [*HI, {"role": "assistant", "content": begun}] if begun else HI
            more = {"continue_final_message": True} if begun else {}
            posted(scripted, "/v1/chat/completions", messages=talk, response_format=FORM, **more)
            assert scripted.engine.compiled[-1][1] == {"thought": thought, "opened": opened}
    finally:
        tokenizer.think_start = tokenizer.think_end = None


def test_beside_free_answers(server: Running) -> None:
    """Asked for at the same time, with a form or without, each is what it is alone."""
    forms: list[dict[str, Any]] = [{"response_format": FORM}, {}, {"guided_regex": "[a-z ]{30}"}]
    asked = [
        {"messages": HI, "temperature": 1.0, "seed": seed, "max_tokens": 60, **form}
        for seed, form in enumerate([*forms, *forms])
    ]

    def said(body: dict[str, Any]) -> Any:
        return posted(server, "/v1/chat/completions", **body)["choices"][0]["message"]["content"]

    alone = [said(body) for body in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(said, asked)) == alone


def parsed(module: Any) -> ToolFormat:
    start, end = module.tool_call_start, module.tool_call_end
    return ToolFormat(module.__name__.rpartition(".")[2], start, end, module.parse_tool_call)


FORMAT_CASES: dict[str, tuple[ToolFormat, str]] = {
    "hermes": (FORMATS["hermes"], ""),
    "generic": (FORMATS["generic"], ""),
    "llama": (FORMATS["llama"], ""),
    "granite": (FORMATS["granite"], ""),
    "json_tools": (parsed(json_tools), ""),
    "mistral": (parsed(mistral), "[TOOL_CALLS][ARGS]"),
    "mistral, older": (parsed(mistral), "[TOOL_CALLS] ["),
    "qwen3_coder": (parsed(qwen3_coder), ""),
}


def texts_of(how: ToolFormat, text: str) -> Sequence[str]:
    """What stands between the marks, as the reader hands it to a format."""
    if not how.start:
        return [text]
    parts = [part for part in text.split(how.start) if part.strip()]
    assert text.startswith(how.start)
    return [part.split(how.end)[0] if how.end else part for part in parts]


@pytest.mark.parametrize("seed", half_slow(range(2)))
@pytest.mark.parametrize("name", FORMAT_CASES)
def test_every_way_of_writing_calls(pair: tuple[Model, Any], name: str, seed: int) -> None:
    """What the grammar lets through, the format reads."""
    how, template = FORMAT_CASES[name]
    tools = TOOLS
    if name == "qwen3_coder":  # its parser tells a number from a text by a type that stands there
        tools = json.loads(
            json.dumps(TOOLS).replace('"$ref": "#/$defs/few"', json.dumps(FEW)[1:-1])
        )
    model, tokenizer = pair
    made = model.grammars(tokenizer)
    for most in (1, 2):
        source = calls(how, tools, most, made.marked, template)
        closing = {tokenizer.convert_tokens_to_ids(text): 5.0 for text in ('"', "}", "<", "]")}
        text = generate(
            *pair, "Which?", grammar=made.compiled(source), max_tokens=400, temp=1.0, seed=seed,
            logit_bias=closing,
        )  # fmt: skip
        found = [call for part in texts_of(how, text) for call in how.calls(part, tools)]
        assert 1 <= len(found) <= most, text
        for call in found:
            checked_call(call.name, call.values)


def test_a_way_that_is_not_known() -> None:
    odd = ToolFormat("kimi_k2", "<a>", "</a>", lambda text, tools: None)
    with pytest.raises(OptionError, match="kimi_k2"):
        calls(odd, TOOLS, 1, str)


class Landmark(BaseModel):
    city: str
    height: int
    old: bool


@pytest.fixture(scope="module")
def builtin() -> Iterator[Running]:
    with running(ModelEngine(*load()), parallel=4) as found:
        yield found


@pytest.mark.slow
@pytest.mark.model
def test_the_built_in_model_fills_a_class(builtin: Running) -> None:
    """By OpenAI's own `parse`, in chats and responses."""
    question: Any = [{"role": "user", "content": "Tell me of the Eiffel tower, 330 metres high."}]
    with openai.OpenAI(base_url=f"{builtin.url}/v1", api_key="any", max_retries=0) as client:
        for seed in range(4):
            chat = client.chat.completions.parse(
                model="m", messages=question, response_format=Landmark, temperature=0.8, seed=seed,
                max_tokens=200,
            )  # fmt: skip
            assert isinstance(chat.choices[0].message.parsed, Landmark)
            response = client.responses.parse(
                model="m", input=question, text_format=Landmark, max_output_tokens=200
            )
            assert isinstance(response.output_parsed, Landmark)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("seed", range(4))
def test_the_built_in_model_calls_when_it_must(builtin: Running, seed: int) -> None:
    for draft in (True, False):
        extra = {"draft": draft}
        chat = posted(
            builtin, "/v1/chat/completions", messages=HI, tools=TOOLS, tool_choice="required",
            temperature=0.9, seed=seed, max_tokens=300, x_redrafter=extra,
        )["choices"][0]  # fmt: skip
        for call in chat["message"]["tool_calls"]:
            checked_call(call["function"]["name"], json.loads(call["function"]["arguments"]))
    test_a_call_is_demanded_in_every_dialect(builtin, seed)
