"""Bad requests: each gets the right status and an object that says why, and the next good request
is answered as if nothing had been."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from halves import half_slow
from scripted_engine import Running, ScriptedEngine, running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
HI = [{"role": "user", "content": "Hi"}]
USUAL: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI},
    TEXT: {"prompt": "Hi"},
    MESSAGES: {"messages": HI, "max_tokens": 9},
    RESPONSES: {"input": "Hi"},
    "/tokenize": {"content": "Hi"},
    "/detokenize": {"tokens": [1]},
}
JSON = {"content-type": "application/json"}
SMALL = 4096  # bytes of a request


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = ScriptedEngine(["fine"], context=600)
    with running(engine, body_limit=SMALL, body_seconds=0.3, strict_model=True) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as found:
        yield found


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# Fields of a sampling option, and what it may not be: on every dialect that has it.
NUMBERS: dict[str, list[Any]] = {
    "temperature": ["x", True, [], {}, -1, 1e9, 1e-9],
    "top_p": ["0.5", -0.1, 2, [1]],
    "top_k": [1.5, -2, 2**40, "3"],
}
MORE: dict[str, list[Any]] = {
    "min_p": [-1, "x"],
    "repetition_penalty": [-1, "x", 1e9],
    "presence_penalty": [1e9, [0]],
    "frequency_penalty": [-1e9, {}],
    "repetition_context_size": [0, 10**6],
    "logit_bias": [[1], {"x": 1}, {"65": "x"}, {"99999": 1}, {"-1": 1}, {"65": 1e31}],
    "seed": ["x", 1.5, [1]],
    "stop": [3, [""], "", [3], ["x"] * 17, {"a": 1}],
    "max_tokens": ["x", 0, -2, 1.5],
    "n": [0, 9, "2", 1.5],
    "stream": ["yes", 1],
    "stream_options": ["x", {"include_usage": "yes"}],
    "num_draft_tokens": [-1, 99, "x"],
    "x_redrafter": ["x", {"draft": "yes"}, {"tree": "3"}, {"tree": "3x4/99"}, {"tree": "0x4"},
                    {"lookup": 99}, {"lookup": -1}, {"sparse_prefill": "x"}, {"tree": "1x²"}],
    "logprobs": [True, 3],
    "response_format": [{"type": "json_schema"}, "json", {}, {"type": "x"},
                        {"type": "json_schema", "json_schema": {"schema": [1]}},
                        {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}],
    "guided_json": [[1], "{", {"type": "nothing"}],
    "guided_regex": ["((", 3, ""],
    "guided_choice": [[], "x", [3]],
    "guided_grammar": [3, "start: nothing"],
    "grammar": ["root ::= x", "root ::= (", {}],
    "structured_outputs": ["x", {"regex": "(("}, {"choice": []}, {"json": {"not": {}}}],
    "best_of": [3],
    "model": [3, "another", ["scripted"]],
}  # fmt: skip
FIELDS: dict[str, dict[str, list[Any]]] = {
    CHAT: {
        **NUMBERS,
        **MORE,
        "top_logprobs": [3],
        "messages": [
            None, [], "Hi", 3, {}, [3], [None], ["Hi"], [[]], [{}], [{"role": "x", "content": "y"}],
            [{"role": "user", "content": 3}], [{"role": "user", "content": {"type": "text"}}],
            [{"role": "user", "content": [3]}], [{"role": "user", "content": [{"type": "text"}]}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            [{"role": "user", "content": [{"text": "x"}]}], [{"role": ["user"], "content": "x"}],
            [{"role": "system", "content": ""}], [{"role": "user", "content": "x" * 600}],
            [*HI, {"role": "assistant", "tool_calls": "x"}],
            [*HI, {"role": "assistant", "tool_calls": [{}]}],
            [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": 3}}]}],
            [*HI, {"role": "assistant",
                   "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]}],
            [*HI, {"role": "assistant",
                   "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[1]"}}]}],
        ],
        "tools": ["x", [3], [{"type": "function"}], [{"type": "function", "function": {}}],
                  [{"type": "function", "function": {"name": "f", "parameters": "x"}}]],
        "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}, 3],
        "prediction": ["x", {}, {"content": 3}, {"type": "x", "content": "x"},
                       {"type": "content", "content": [{"type": "image_url"}]}],
        "continue_final_message": [True, "x"],
        "chat_template_kwargs": ["x", [1], {"chat_template": "{{ 1 }}"}, {"max_length": 10**9},
                                 {"padding": "max_length"}, {"tokenize": False}],
    },
    TEXT: {
        **MORE,
        "prompt": [None, "", [], [""], [[]], 3, {}, [3.5], [None], ["a", 3], [[1, "x"]], [[999]],
                   [-1], [True], "x" * 600, ["a"] * 65],
        "echo": [True],
        "suffix": ["x"],
        "logprobs": [0, 2],
    },
    MESSAGES: {
        **NUMBERS,
        "messages": [None, [], "x", [3], [{"role": "x"}], [{"role": "user", "content": "x" * 600}],
                     [{"role": "user", "content": [{"type": "image", "source": {}}]}],
                     [{"role": "user", "content": [{"type": "document"}]}],
                     [{"role": "user", "content": [3]}],
                     [*HI, {"role": "assistant", "content": [{"type": "tool_use"}]}]],
        "max_tokens": ["x", 0],
        "system": [3, [{"type": "image"}], [3]],
        "tools": ["x", [3], [{"input_schema": {}}], [{"name": "f", "input_schema": 3}]],
        "tool_choice": [{"type": "any"}, {"type": "tool", "name": "f"}, "auto", 3],
        "stop_sequences": ["x", [3], [""]],
        "thinking": ["x", {"type": 3}],
        "output_format": [{"type": "json_schema"}, "x"],
        "output_config": [{"format": {"type": "json_schema", "schema": 3}}],
    },
    RESPONSES: {
        **NUMBERS,
        "input": [None, [], 3, {}, [3], [{"type": "message", "role": "x"}], "x" * 600,
                  [{"type": "message", "role": "user", "content": [{"type": "input_image"}]}],
                  [{"type": "function_call"}], [{"type": "function_call", "name": "f",
                                                 "arguments": "x"}]],
        "instructions": [3, ["x"]],
        "tools": ["x", [3], [{"type": "function"}]],
        "tool_choice": ["required", {"type": "function", "name": "f"}],
        "max_output_tokens": ["x", 0],
        "previous_response_id": ["resp_1"],
        "background": [True],
        "top_logprobs": [1, 5, True],
        "include": [["reasoning.encrypted_content", "message.output_text.logprobs"]],
        "text": ["x", {"format": {"type": "json_schema"}}, {"format": {"type": "x"}},
                 {"format": {"type": "json_schema", "schema": {"not": {}}}}],
        "reasoning": ["x", {"effort": 3}],
    },
    "/tokenize": {"content": [None, 3]},
    "/detokenize": {"tokens": ["x", [-1], [999], [1.5], [True], None]},
}  # fmt: skip
BAD = [
    (path, field, value)
    for path, fields in FIELDS.items()
    for field, values in fields.items()
    for value in values
]


def good(client: httpx.Client, path: str = CHAT) -> None:
    found = client.post(path, json=USUAL[path])
    assert found.status_code == 200, found.text


def test_there_are_enough() -> None:
    assert len(BAD) >= 200


@pytest.mark.parametrize("path", half_slow(FIELDS))
def test_fields(path: str, server: Running, client: httpx.Client) -> None:
    """All of one path in one test: they take milliseconds each."""
    for field, values in FIELDS[path].items():
        for value in values:
            found = client.post(path, json={**USUAL[path], field: value})
            missing = field == "model" and value == "another"
            assert found.status_code == (404 if missing else 400), (field, value, found.text)
            body = found.json()
            if path == MESSAGES:
                kind = "invalid_request_error"
                assert (body["type"], body["error"]["type"]) == ("error", kind), (field, value)
                assert body["request_id"] == found.headers["request-id"]
            else:
                assert set(body["error"]) >= {"message", "type", "param", "code"}
                param = body["error"]["param"]
                named = re.split(r"[.[]", param)[0] if param else field
                assert named in (field, "messages", "prompt"), (field, value, param)
            message = body["error"]["message"]
            assert message and "\n" not in message and "generate --raw" not in message
            good(client, path)
    assert server.log == []


def test_the_field_is_named(client: httpx.Client) -> None:
    """A few of them whole: what is wrong, where, and what is possible."""
    for given, param, message in [
        ({"temperature": 1e9}, "temperature",
         "temperature 1000000000.0 is not possible: use 0 to 100"),
        ({"top_p": "0.5"}, "top_p", "top_p: input should be a valid number"),
        ({"stop": [3]}, "stop", "stop: input should be a valid string"),
        ({"n": 9}, "n", "n 9 is not possible: use 1 to 8"),
        ({"messages": [*HI, {"role": "x"}]}, "messages[1].role",
         "messages[1].role is not possible: use one of system, developer, user, assistant, tool, "
         "function"),
        ({"logit_bias": {"99999": 1}}, "logit_bias",
         "logit_bias token 99999 is not possible: use 0 to 258"),
        ({"max_tokens": 0}, "max_tokens",
         "max_tokens 0 is not possible: use 1 or more, or -1 for no limit"),
    ]:  # fmt: skip
        error = client.post(CHAT, json={"messages": HI, **given}).json()["error"]
        assert (error["param"], error["message"]) == (param, message)


def test_a_prompt_beyond_the_context(client: httpx.Client) -> None:
    """In the words and codes that agents look for."""
    long = [{"role": "user", "content": "x" * 700}]
    text = f"prompt is too long: {700 + len('[user][assistant]')} tokens > 600 maximum"
    error = client.post(CHAT, json={"messages": long}).json()["error"]
    assert (error["message"], error["code"]) == (text, "context_length_exceeded")
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (717, 600)
    error = client.post(MESSAGES, json={"messages": long, "max_tokens": 5}).json()["error"]
    assert error == {"type": "invalid_request_error", "message": text}
    found = client.post(RESPONSES, json={"input": long, "stream": True})
    assert found.status_code == 200
    last = json.loads(found.text.strip().split("\n\n")[-1].partition("data: ")[2])
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "context_length_exceeded", "message": text}
    good(client)


RAW: list[tuple[str, dict[str, str], bytes | str, int]] = [
    ("POST", JSON, "", 400),
    ("POST", JSON, "{", 400),
    ("POST", JSON, "null", 400),
    ("POST", JSON, "[]", 400),
    ("POST", JSON, '"x"', 400),
    ("POST", JSON, nested(2000), 400),
    ("POST", JSON, '{"messages":' + nested(1000) + "}", 400),
    ("POST", JSON, '{"messages":[{"role":"user","content":"\\ud800"}]}', 400),
    ("POST", JSON, '{"temperature":NaN}', 400),
    ("POST", JSON, '{"temperature":1e999,"messages":[{"role":"user","content":"x"}]}', 400),
    ("POST", JSON, '{"seed":' + "9" * 5000 + "}", 413),
    ("POST", JSON, b"\xff\xfe\x00", 400),
    ("POST", JSON, b"\x00" * 100, 400),
    ("POST", JSON, b"\x1f\x8b\x08\x00", 400),
    ("POST", JSON, "x" * (SMALL + 1), 413),
    # Still on its way when it is refused: the answer must not be lost.
    ("POST", JSON, "x" * 5_000_000, 413),
    ("POST", {"content-type": "text/plain"}, "x" * 5_000_000, 415),
    ("POST", {"content-type": "text/plain"}, '{"messages":[]}', 415),
    ("POST", {"content-type": "application/x-www-form-urlencoded"}, "a=b", 415),
    ("POST", {}, "{}", 415),
    ("GET", {}, "", 405),
    ("PUT", JSON, "{}", 405),
    ("DELETE", {}, "", 405),
]


@pytest.mark.parametrize(("method", "headers", "body", "status"), RAW)
def test_bodies(
    method: str, headers: dict[str, str], body: bytes | str, status: int, client: httpx.Client
) -> None:
    found = client.request(method, CHAT, headers=headers, content=body)
    assert found.status_code == status, found.text
    assert found.json()["error"]["type"] == "invalid_request_error"
    good(client)


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nothing", 404, "not_found_error"),
        ("GET", "/v1", 404, "not_found_error"),
        ("POST", "/v1/nothing", 404, "not_found_error"),
        ("POST", "/v1/chat/completions/", 404, "not_found_error"),
        ("GET", "/../../etc/passwd", 404, "not_found_error"),
        ("GET", "/%00%ff", 404, "not_found_error"),
        ("POST", "/v1/embeddings", 501, "not_supported_error"),
        ("POST", "/v1/models", 405, "invalid_request_error"),
        ("POST", "/health", 405, "invalid_request_error"),
    ],
)
def test_paths(method: str, path: str, status: int, kind: str, client: httpx.Client) -> None:
    found = client.request(method, path, json={})
    assert (found.status_code, found.json()["error"]["type"]) == (status, kind)
    good(client)


def raw(server: Running, data: bytes, *, wait: bool = True) -> bytes:
    """What a server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as found:
        found.sendall(data)
        if not wait:
            return b""
        received = b""
        while b"\r\n\r\n" not in received or not received.endswith((b"}", b"0\r\n\r\n")):
            if not (part := found.recv(4096)):
                break
            received += part
        return received


HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HEAD + b"\r\n", 411),
        (HEAD + b"Content-Length: 99999999999\r\n\r\n", 413),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 50\r\n\r\n{half", 408),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{half\r\n", 408),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2000\r\n" + b"x" * 0x2000 + b"\r\n", 413),
        (b"GARBAGE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 60 + b"\r\n\r\n", 400),
    ],
)
def test_half_slow_and_broken_ones(
    data: bytes, status: int, server: Running, client: httpx.Client
) -> None:
    found = raw(server, data)
    assert found.startswith(f"HTTP/1.1 {status}".encode()), found[:200]
    good(client)


def test_one_that_ends_in_the_middle(server: Running, client: httpx.Client) -> None:
    for _ in range(3):
        raw(server, HEAD + b"Content-Length: 50\r\n\r\n{half", wait=False)
    good(client)
    assert server.log == []
