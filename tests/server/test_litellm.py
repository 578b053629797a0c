"""litellm against the server, whole and streamed, in both dialects, with tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_engine import Running, ScriptedEngine, running
from test_openai import CALL, HI, TOOLS, ZURICH


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ScriptedEngine(context=4000)) as found:
        yield found


@pytest.fixture(scope="module")
def litellm() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it would fetch a list of prices
        yield pytest.importorskip("litellm", reason="litellm is not installed")


def place(server: Running, dialect: str) -> dict[str, Any]:
    base = server.url + ("/v1" if dialect == "openai" else "")
    return {"model": f"{dialect}/m", "api_base": base, "api_key": "x", "max_tokens": 200}


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_an_answer(server: Running, litellm: Any, dialect: str) -> None:
    server.engine.says("Hi thére.")
    found = litellm.completion(messages=HI, **place(server, dialect))
    assert found.choices[0].message.content == "Hi thére."
    assert found.usage.completion_tokens > 0 and found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_a_stream(server: Running, litellm: Any, dialect: str) -> None:
    server.engine.says("Hi thére, you.")
    parts = list(litellm.completion(messages=HI, stream=True, **place(server, dialect)))
    texts = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(texts) == "Hi thére, you." and sum(map(bool, texts)) > 1


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_a_call(server: Running, litellm: Any, dialect: str) -> None:
    server.engine.says(CALL)
    found = litellm.completion(messages=HI, tools=TOOLS, **place(server, dialect))
    (call,) = found.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == ZURICH


def test_what_is_refused(server: Running, litellm: Any) -> None:
    with pytest.raises(litellm.BadRequestError, match="logprobs is not supported"):
        litellm.completion(messages=HI, logprobs=True, **place(server, "openai"))
