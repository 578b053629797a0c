"""Anthropic's own client against the server, and what Claude Code sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message
from scripted_engine import Running, ScriptedEngine, running

HI: Any = [{"role": "user", "content": "Hi"}]
TOOLS: Any = [
    {
        "name": "get_weather",
        "description": "The weather.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
    {"type": "web_search_20250305", "name": "web_search"},
]
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich 😀"}}</tool_call>'
ZURICH = {"city": "Zürich 😀"}
BILLING = "x-anthropic-billing-header: cc_version=2.1; cch=%d;"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = ScriptedEngine(context=4000)
    engine.tokenizer.think_start, engine.tokenizer.think_end = "<think>", "</think>"
    with running(engine) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as found:
        yield found


def asked(client: anthropic.Anthropic, **more: Any) -> Message:
    found: Message = client.messages.create(
        **{"model": "m", "max_tokens": 500, "messages": HI, **more}
    )
    return found


def streamed(client: anthropic.Anthropic, **more: Any) -> tuple[list[Any], Message]:
    given = {"model": "m", "max_tokens": 500, "messages": HI, **more}
    with client.messages.stream(**given) as stream:
        return list(stream), stream.get_final_message()


def test_a_message(server: Running, client: anthropic.Anthropic) -> None:
    server.engine.says("Hi thére.")
    found = asked(client, system="Be brief.")
    assert [(block.type, block.text) for block in found.content] == [("text", "Hi thére.")]  # type: ignore[union-attr]
    assert (found.stop_reason, found.stop_sequence) == ("end_turn", None)
    assert server.engine.tokenizer.last["text"] == "[system]Be brief.[user]Hi[assistant]"
    assert found.usage.input_tokens == len("[system]Be brief.[user]Hi[assistant]")
    Message.model_validate(found.model_dump())
    _, last = streamed(client, system="Be brief.")
    assert last.content[0].text == "Hi thére."  # type: ignore[union-attr]
    assert last.usage.output_tokens == found.usage.output_tokens == 11


def test_how_it_ends(server: Running, client: anthropic.Anthropic) -> None:
    server.engine.says("one STOP two")
    for find in (asked, lambda *a, **k: streamed(*a, **k)[1]):
        found = find(client, stop_sequences=["x", "STOP"])
        assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", "STOP")
        assert found.content[0].text == "one "  # type: ignore[union-attr]
        assert find(client, max_tokens=3).stop_reason == "max_tokens"


@pytest.mark.parametrize("count", [1, 3])
def test_thoughts_and_calls(count: int, server: Running, client: anthropic.Anthropic) -> None:
    server.engine.says(f"<think>Let me see.\n</think>\n\nA moment.\n{CALL * count}", step=3)
    events, last = streamed(client, tools=TOOLS)
    kinds = ["thinking", "text", *["tool_use"] * count]
    for found in (last, asked(client, tools=TOOLS)):
        assert [block.type for block in found.content] == kinds
        thought, text, *calls = found.content
        assert (thought.thinking, text.text) == ("Let me see.\n", "A moment.")  # type: ignore[union-attr]
        assert thought.signature == "local"  # type: ignore[union-attr]
        assert [call.input for call in calls] == [ZURICH] * count  # type: ignore[union-attr]
        assert found.stop_reason == "tool_use"
    told = [event.type for event in events if event.type.startswith(("content_block_st", "mess"))]
    blocks = ["content_block_start", "content_block_stop"] * len(kinds)
    assert told == ["message_start", *blocks, "message_delta", "message_stop"]


def test_every_event_on_the_wire(server: Running) -> None:
    server.engine.says("Hi", step=9)
    body = {"model": "m", "max_tokens": 9, "messages": HI, "stream": True}
    found = httpx.post(f"{server.url}/v1/messages?beta=true", json=body, timeout=20)
    blocks = [block.split("\n") for block in found.text.strip().split("\n\n")]
    assert all(event == f"event: {json.loads(data[6:])['type']}" for event, data in blocks)
    assert [json.loads(data[6:]) for _, data in blocks][1:] == [
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {
                "input_tokens": 19, "output_tokens": 3, "cache_read_input_tokens": 0,
                "cache_creation_input_tokens": 0,
            },
        },
        {"type": "message_stop"},
    ]  # fmt: skip


def test_a_turn_with_results(server: Running, client: anthropic.Anthropic) -> None:
    """Results come before the text of their turn; thoughts are not shown to the model again."""
    server.engine.says(CALL)
    first = asked(client, tools=TOOLS)
    call = first.content[0]
    turn = [
        *HI,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "local"}, call.model_dump(),
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And now?"},
                {"type": "tool_result", "tool_use_id": call.id,  # type: ignore[union-attr]
                 "content": [{"type": "text", "text": "12 °C"}]},
            ],
        },
    ]  # fmt: skip
    server.engine.says("It is 12 °C.")
    second = asked(client, messages=turn, tools=TOOLS)
    assert second.content[0].text == "It is 12 °C."  # type: ignore[union-attr]
    system, *turns = server.engine.tokenizer.last["messages"]
    assert "get_weather" in system["content"] and "web_search" not in system["content"]
    assert [message["role"] for message in turns] == ["user", "assistant", "user"]
    assert turns[1]["content"].startswith("<tool_call>")
    assert turns[2]["content"] == "<tool_response>\n12 °C\n</tool_response>\nAnd now?"


def test_the_block_that_is_new_in_every_request_is_dropped(
    server: Running, client: anthropic.Anthropic
) -> None:
    server.engine.says("ok")
    prompts = []
    for number in (1, 2):
        rest = {"type": "text", "text": "You are.", "cache_control": {"type": "ephemeral"}}
        asked(client, system=[{"type": "text", "text": BILLING % number}, rest])
        prompts.append(list(server.engine.asked[-1].prompt))
    assert prompts[0] == prompts[1]
    assert server.engine.tokenizer.last["text"].startswith("[system]You are.[user]")


def test_a_system_message_in_the_middle(server: Running, client: anthropic.Anthropic) -> None:
    server.engine.says("ok")
    middle = [*HI, {"role": "assistant", "content": "Hello"}, {"role": "system", "content": "Now."}]
    asked(client, messages=[*middle, *HI])
    assert server.engine.tokenizer.last["text"] == (
        "[user]Hi[assistant]Hello[user]Now.\n\nHi[assistant]"
    )


def test_tokens_are_counted(server: Running, client: anthropic.Anthropic) -> None:
    found = client.messages.count_tokens(model="m", messages=HI)
    assert found.input_tokens == len("[user]Hi[assistant]")


@pytest.mark.parametrize(
    ("kind", "value"), [("enabled", True), ("disabled", False), ("adaptive", None)]
)
def test_thinking(kind: str, value: bool | None, server: Running) -> None:
    server.engine.says("ok")
    body = {"max_tokens": 9, "messages": HI, "thinking": {"type": kind, "budget_tokens": 5}}
    assert httpx.post(f"{server.url}/v1/messages", json=body).status_code == 200
    assert server.engine.tokenizer.last.get("enable_thinking") is value


def test_the_client_sees_faults(server: Running, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: 5017 tokens > 4000"):
        asked(client, messages=[{"role": "user", "content": "x" * 5000}])
    server.engine.says("a long answer that breaks", step=2)
    begun = server.engine.steps

    def fail(step: int) -> None:
        if step - begun > 3:
            raise RuntimeError

    server.engine.before_step = fail
    with pytest.raises(anthropic.APIStatusError, match="internal error"):
        streamed(client)


def test_models(client: anthropic.Anthropic) -> None:
    (model,) = client.models.list()
    assert (model.id, model.type) == ("scripted", "model")


def test_pings_while_the_prompt_is_read() -> None:
    with running(ScriptedEngine(["ok"], pause=0.05, chunk=4), keep_alive=0.01) as server:
        body = {"max_tokens": 9, "messages": HI, "stream": True}
        found = httpx.post(f"{server.url}/v1/messages", json=body, timeout=20)
    assert found.text.count('event: ping\ndata: {"type":"ping"}\n\n') > 2
