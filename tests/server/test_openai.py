"""OpenAI's own client against the server: chats, texts, tools, thoughts and responses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from scripted_engine import Running, ScriptedEngine, running

HI: Any = [{"role": "user", "content": "Hi"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
FLAT: Any = [
    {"type": "function", **TOOLS[0]["function"]},
    {"type": "web_search"},
    {"type": "namespace", "name": "x", "tools": []},
    {"type": "custom", "name": "y"},
]
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich 😀"}}</tool_call>'
ZURICH = {"city": "Zürich 😀"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = ScriptedEngine(context=4000)
    engine.tokenizer.think_start, engine.tokenizer.think_end = "<think>", "</think>"
    with running(engine) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def raw_chunks(server: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    found = httpx.post(server.url + path, json={**body, "stream": True}, timeout=20)
    lines = [line for line in found.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_chat(server: Running, client: openai.OpenAI) -> None:
    server.engine.says("Hi thére.")
    found = client.chat.completions.create(model="m", messages=HI)
    assert found.choices[0].message.content == "Hi thére."
    ChatCompletion.model_validate(found.model_dump(), strict=True)
    stream = client.chat.completions.create(
        model="m", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hi thére."
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("Hi thére.".encode()) + 1


@pytest.mark.parametrize("text", ["Hi", f"<think>so\n</think>\n{CALL}{CALL}", "<think>cut"])
def test_every_chunk_is_one_by_their_model(text: str, server: Running) -> None:
    server.engine.says(text)
    options = {"include_usage": True}
    body = {"model": "m", "messages": HI, "tools": TOOLS, "n": 2, "stream_options": options}
    chunks = raw_chunks(server, "/v1/chat/completions", body)
    assert len(chunks) > 4
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)


def test_texts(server: Running, client: openai.OpenAI) -> None:
    server.engine.says("one", "two")
    found = client.completions.create(model="m", prompt=["a", "b"], max_tokens=9)
    assert [choice.text for choice in found.choices] == ["one", "two"]
    Completion.model_validate(found.model_dump())
    server.engine.says("one", "two")
    chunks = client.completions.create(model="m", prompt=["a", "b"], stream=True)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["one", "two"]


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    Model.model_validate(model.model_dump())
    assert client.models.retrieve("scripted").id == "scripted"
    with pytest.raises(openai.NotFoundError, match="there is no model 'x' here"):
        client.models.retrieve("x")


@pytest.mark.parametrize("count", [1, 3])
def test_calls_of_tools(count: int, server: Running, client: openai.OpenAI) -> None:
    server.engine.says(f"<think>Let me see.\n</think>\n\nA moment.\n{CALL * count}", step=3)
    found = client.chat.completions.create(model="m", messages=HI, tools=TOOLS)
    (choice,) = found.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "A moment."
    assert choice.message.reasoning_content == "Let me see.\n"  # type: ignore[attr-defined]
    calls: Any = choice.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [ZURICH] * count
    with client.chat.completions.stream(model="m", messages=HI, tools=TOOLS) as stream:
        last = stream.get_final_completion().choices[0]
    calls = last.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [ZURICH] * count
    assert (last.finish_reason, last.message.content) == ("tool_calls", "A moment.")


def test_one_call_where_they_may_not_be_parallel(server: Running, client: openai.OpenAI) -> None:
    server.engine.says(CALL * 3, step=3)
    found = client.chat.completions.create(
        model="m", messages=HI, tools=TOOLS, parallel_tool_calls=False
    )
    assert len(found.choices[0].message.tool_calls or []) == 1
    assert found.usage is not None
    assert found.usage.completion_tokens < 2 * len(CALL)


def test_no_call_where_there_may_be_none(server: Running, client: openai.OpenAI) -> None:
    server.engine.says(CALL)
    for more in ({"tools": TOOLS, "tool_choice": "none"}, {}):
        found = client.chat.completions.create(model="m", messages=HI, **more)  # type: ignore[call-overload]
        assert found.choices[0].message.content == CALL
        assert "get_weather" not in server.engine.tokenizer.last["text"]


def test_the_next_turn_of_a_call(server: Running, client: openai.OpenAI) -> None:
    """A template that knows nothing of tools is told of them in words."""
    server.engine.says(CALL)
    first = client.chat.completions.create(model="m", messages=HI, tools=TOOLS)
    message = first.choices[0].message
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12 °C"}  # type: ignore[index]
    server.engine.says("It is 12 °C.")
    second = client.chat.completions.create(
        model="m", messages=[*HI, message.model_dump(), result], tools=TOOLS
    )
    assert second.choices[0].message.content == "It is 12 °C."
    system, *turns = server.engine.tokenizer.last["messages"]
    assert system["role"] == "system"
    assert json.dumps(TOOLS[0]["function"]["parameters"]) in system["content"]
    assert turns == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": CALL.replace(">{", ">\n{").replace("}</", "}\n</")},
        {"role": "user", "content": "<tool_response>\n12 °C\n</tool_response>"},
    ]


def test_the_client_sees_a_fault_in_the_stream(server: Running, client: openai.OpenAI) -> None:
    server.engine.says("a long answer that breaks", step=2)

    def fail(step: int) -> None:
        if step - begun > 3:
            raise RuntimeError

    begun = server.engine.steps
    server.engine.before_step = fail
    with pytest.raises(openai.APIError, match="internal error"):
        list(client.chat.completions.create(model="m", messages=HI, stream=True))


def test_errors_are_theirs(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x" * 5000}]
        )
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=HI, temperature=-3)
    assert caught.value.param == "temperature"


def test_a_response(server: Running, client: openai.OpenAI) -> None:
    server.engine.says("<think>hm\n</think>\n\nHi thére.")
    found = client.responses.create(model="m", input="Hi", instructions="Be brief.")
    assert found.output_text == "Hi thére."
    assert [item.type for item in found.output] == ["reasoning", "message"]
    assert server.engine.tokenizer.last["text"] == "[system]Be brief.[user]Hi[assistant]"
    assert found.usage is not None
    assert found.usage.output_tokens_details.reasoning_tokens == len("hm\n</think>")
    raw = client.responses.with_raw_response.create(model="m", input="Hi")
    Response.model_validate_json(raw.text)


def test_a_response_in_events(server: Running, client: openai.OpenAI) -> None:
    server.engine.says("<think>hm\n</think>\n\nHi thére.", step=4)
    with client.responses.stream(model="m", input="Hi") as stream:
        events = list(stream)
        last = stream.get_final_response()
    assert last.output_text == "Hi thére."
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert [kind for kind in kinds if not kind.endswith(".delta")][3:] == [
        "response.reasoning_summary_part.added", "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done", "response.output_item.done",
        "response.output_item.added", "response.content_part.added", "response.output_text.done",
        "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "Hi thére."
    assert len(deltas) > 1


@pytest.mark.parametrize("count", [1, 3])
def test_calls_in_a_response(count: int, server: Running, client: openai.OpenAI) -> None:
    """Codex sends tools of other types too, and the whole of the talk with every turn."""
    server.engine.says("A moment." + CALL * count, step=6)
    with client.responses.stream(model="m", input="Hi", tools=FLAT, store=False) as stream:
        last = stream.get_final_response()
    text, *calls = last.output
    assert text.type == "message"
    assert [json.loads(call.arguments) for call in calls] == [ZURICH] * count  # type: ignore[union-attr]
    whole = client.responses.create(model="m", input="Hi", tools=FLAT)
    assert [item.type for item in whole.output] == [item.type for item in last.output]
    server.engine.says("Done.")
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "12 °C"}  # type: ignore[union-attr]
        for call in calls
    ]
    turn: Any = [*HI, {"type": "reasoning", "summary": []}, *[i.model_dump() for i in last.output],
                 *results, {"type": "item_of_tomorrow"}]  # fmt: skip
    assert client.responses.create(model="m", input=turn, tools=FLAT).output_text == "Done."
    roles = [message["role"] for message in server.engine.tokenizer.last["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    history = server.engine.tokenizer.last["messages"][2]["content"]
    assert history.count("<tool_call>") == count
    assert history.startswith("A moment.")


def test_a_response_that_is_cut_off(server: Running, client: openai.OpenAI) -> None:
    server.engine.says("a long answer")
    with client.responses.stream(model="m", input="Hi", max_output_tokens=6) as stream:
        events = list(stream)
    assert events[-1].type == "response.incomplete"
    found = client.responses.create(model="m", input="Hi", max_output_tokens=6)
    assert (found.status, found.output_text) == ("incomplete", "a long")
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"


def test_a_response_that_waits_says_so_in_events() -> None:
    """Codex does not count comments."""
    with running(ScriptedEngine(["ok"], pause=0.05, chunk=4), keep_alive=0.01) as server:
        chunks = raw_chunks(server, "/v1/responses", {"input": "Hi"})
    kinds = [chunk["type"] for chunk in chunks]
    assert kinds.count("response.in_progress") > 2
    assert kinds[-1] == "response.completed"
