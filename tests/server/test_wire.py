"""What lies on the wire, byte by byte, and what stands in whole answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from scripted_engine import Running, ScriptedEngine, running

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ScriptedEngine()) as found:
        yield found


def post(server: Running, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=20)


def stripped(text: str) -> str:
    """Without what is another in every answer or on every machine."""
    text = re.sub(r'"id":"(chatcmpl|cmpl)-[0-9a-f]{24}"', r'"id":"\1-N"', text)
    text = re.sub(r'"created":\d+', '"created":1', text)
    return re.sub(r'"system_fingerprint":"mlx-redrafter-[^"]+"', '"system_fingerprint":"F"', text)


HEAD = (
    'data: {"id":"chatcmpl-N","object":"chat.completion.chunk","created":1,"model":"m",'
    '"system_fingerprint":"F","choices":'
)


def chunk(delta: str, reason: str = "null", row: int = 0) -> str:
    return f'{HEAD}[{{"index":{row},"delta":{delta},"finish_reason":{reason}}}]}}\n\n'


def test_a_chat_stream(server: Running) -> None:
    """One chunk a step, no letter in two pieces, the role once, ASCII only, [DONE] at the end."""
    server.engine.says("Hi thé😀re.", step=5)
    found = post(server, "/v1/chat/completions", model="m", messages=HI, stream=True)
    assert found.status_code == 200
    assert found.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert found.headers["cache-control"] == "no-cache"
    assert found.headers["x-accel-buffering"] == "no"
    assert "content-length" not in found.headers
    assert found.headers["x-request-id"].startswith("req_")
    assert stripped(found.text) == (
        chunk('{"role":"assistant","content":""}')
        + chunk('{"content":"Hi th"}')
        + chunk('{"content":"\\u00e9"}')  # the next letter has four bytes, three are there
        + chunk('{"content":"\\ud83d\\ude00re."}')
        + chunk("{}", '"stop"')
        + "data: [DONE]\n\n"
    )


def test_the_usage_is_a_chunk_without_choices(server: Running) -> None:
    server.engine.says("Hi", step=5)
    options = {"include_usage": True}
    found = post(
        server, "/v1/chat/completions", messages=HI, stream=True, stream_options=options, seed=9
    )
    *lines, last, done = found.text.split("\n\n")[:-1]
    assert done == "data: [DONE]"
    assert all('"usage":null' in line for line in lines)
    used = json.loads(last.removeprefix("data: "))
    assert used["choices"] == []
    assert used["usage"]["prompt_tokens"] == len("[user]Hi[assistant]")
    assert used["usage"]["completion_tokens"] == 3
    assert used["usage"]["total_tokens"] == used["usage"]["prompt_tokens"] + 3
    assert used["timings"]["draft_n"] == 5
    assert used["x_redrafter"]["seed"] == 9


def test_a_whole_chat(server: Running) -> None:
    server.engine.says("Hi there", step=4)
    found = post(server, "/v1/chat/completions", messages=HI, seed=7).json()
    assert found["object"] == "chat.completion"
    assert found["model"] == "scripted"
    message = {"role": "assistant", "content": "Hi there", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert found["choices"] == [choice]
    drafting = found["metrics"]["speculative_decoding"]
    assert drafting == {
        "mean_acceptance_length": 3.0,
        "draft_acceptance_rate": 0.5,
        "acceptance_histogram": [1, 0, 0, 2],
        "num_spec_steps": 3,
        "num_accepted_draft_tokens": 6,
        "num_draft_tokens": 12,
    }
    assert found["timings"]["draft_n_accepted"] == 6
    assert found["timings"]["predicted_n"] == 9


def test_a_text_stream(server: Running) -> None:
    server.engine.says("one two", step=4)
    found = post(server, "/v1/completions", model="m", prompt="x", stream=True)
    head = (
        'data: {"id":"cmpl-N","object":"text_completion","created":1,"model":"m",'
        '"system_fingerprint":"F","choices":[{"index":0,"text":'
    )
    assert stripped(found.text) == (
        head + '"one ","logprobs":null,"finish_reason":null}]}\n\n'
        + head + '"two","logprobs":null,"finish_reason":null}]}\n\n'
        + head + '"","logprobs":null,"finish_reason":"stop"}]}\n\n'
        + "data: [DONE]\n\n"
    )  # fmt: skip


def test_several_prompts_with_several_choices(server: Running) -> None:
    """In the order prompt by prompt; a prompt counts once, and every choice has its own seed."""
    server.engine.says("a", "bb", "ccc", "dddd")
    found = post(server, "/v1/completions", prompt=["x", [65, 66]], n=2, seed=40).json()
    assert [(c["index"], c["text"]) for c in found["choices"]] == [
        (0, "a"), (1, "bb"), (2, "ccc"), (3, "dddd"),
    ]  # fmt: skip
    assert found["usage"]["prompt_tokens"] == 2 + 2  # the text has its first token before it
    assert found["usage"]["completion_tokens"] == 2 + 3 + 4 + 5
    seeds = [asked.sampling.seed for asked in server.engine.asked]
    assert seeds == [40, 41, 40, 41]
    assert [list(asked.prompt) for asked in server.engine.asked] == [[256, 120]] * 2 + [
        [65, 66]
    ] * 2


def test_several_choices_of_a_stream(server: Running) -> None:
    server.engine.says("a", "b")
    found = post(server, "/v1/chat/completions", model="m", messages=HI, n=2, stream=True)
    assert stripped(found.text) == (
        chunk('{"role":"assistant","content":""}')
        + chunk('{"role":"assistant","content":""}', row=1)
        + chunk('{"content":"a"}')
        + chunk("{}", '"stop"')
        + chunk('{"content":"b"}', row=1)
        + chunk("{}", '"stop"', row=1)
        + "data: [DONE]\n\n"
    )


def test_where_the_tokens_of_a_stream_are_from(server: Running) -> None:
    """Drafted or the bonus, with the chunk in which they are told; nothing of it unless asked."""
    server.engine.says("one é two", step=5)
    more = {"x_redrafter": {"tokens": True}}
    found = post(server, "/v1/chat/completions", messages=HI, stream=True, **more)
    chunks = [json.loads(line[6:]) for line in found.text.split("\n\n") if line[6:].startswith("{")]
    told = [chunk.get("x_redrafter", {}).get("tokens") for chunk in chunks]
    assert told == [
        None,
        [["o", "d"], ["n", "d"], ["e", "d"], [" ", "d"], ["", "b"]],
        [["é", "d"], [" ", "d"], ["t", "d"], ["w", "d"], ["o", "b"]],
        [["", "b"]],
    ]
    assert "x_redrafter" not in post(server, "/v1/chat/completions", messages=HI, stream=True).text


def test_a_stop_string_is_held_back_and_not_sent(server: Running) -> None:
    server.engine.says("one ST two STOP three", step=2)
    found = post(server, "/v1/chat/completions", messages=HI, stream=True, stop=["STOP", "x"])
    deltas = re.findall(r'"content":"([^"]*)"', found.text)
    assert "".join(deltas) == "one ST two "
    assert not any(text.endswith("S") for text in deltas if text != "one S")
    assert '"finish_reason":"stop"' in found.text


def test_the_length_ends_an_answer(server: Running) -> None:
    server.engine.says("a long answer")
    found = post(server, "/v1/chat/completions", messages=HI, max_tokens=6).json()
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["choices"][0]["message"]["content"] == "a long"
    assert found["usage"]["completion_tokens"] == 6


def test_a_slow_prompt_sends_signs_of_life() -> None:
    with running(ScriptedEngine(["ok"], pause=0.05, chunk=4), keep_alive=0.01) as server:
        found = post(server, "/v1/chat/completions", messages=HI, stream=True)
        comments = re.findall(r"^: prompt (\d+)/19$", found.text, re.MULTILINE)
        assert {"4", "8", "12"} <= set(comments)
        progress = post(
            server, "/v1/chat/completions", messages=HI, stream=True, return_progress=True
        )
        read = re.findall(
            r'"prompt_progress":\{"total":19,"cache":0,"processed":(\d+)', progress.text
        )
        assert read == ["0", "4", "8", "12", "16", "19"]


def test_parts_of_a_prompt_that_are_read_quickly_do_not_keep_it_silent() -> None:
    """They are events, and nothing that the client hears of."""
    with running(ScriptedEngine(["ok"], pause=0.04, chunk=1), keep_alive=0.2) as server:
        found = post(server, "/v1/chat/completions", messages=HI, stream=True)
    assert found.text.count("\n: prompt ") >= 2


def test_a_fault_in_a_stream_is_an_event_without_done(server: Running) -> None:
    server.engine.says("a", "never seen", step=5)

    def fail(step: int) -> None:
        raise KeyError("secret words of the prompt")

    server.engine.before_step = fail
    found = post(server, "/v1/chat/completions", messages=HI, stream=True)
    assert found.status_code == 200
    last = json.loads(found.text.strip().split("\n\n")[-1].removeprefix("data: "))
    request_id = found.headers["x-request-id"]
    message = f"internal error (request {request_id})"
    error = {"message": message, "type": "server_error", "param": None, "code": None}
    assert last == {"error": error}
    whole = post(server, "/v1/chat/completions", messages=HI)
    assert whole.status_code == 500
    assert [line.partition(": ")[0] for line in server.log] == [
        request_id, whole.headers["x-request-id"],
    ]  # fmt: skip
    assert all("unexpected KeyError at test_wire.py:" in line for line in server.log)
    server.log.clear()
    server.engine.says("fine")
    good = post(server, "/v1/chat/completions", messages=HI).json()
    assert good["choices"][0]["message"]["content"] == "fine"


def test_models_and_health(server: Running) -> None:
    get = lambda path, **headers: httpx.get(server.url + path, headers=headers)  # noqa: E731
    listed = get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["scripted"]
    assert listed["data"][0]["max_model_len"] == 1000
    assert get("/v1/models/scripted").json() == listed["data"][0]
    assert get("/models").json() == listed
    wrong = get("/v1/models/org/other")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
    named = get("/v1/models", **{"anthropic-version": "2023-06-01"}).json()
    assert named["data"][0]["type"] == "model"
    assert named["first_id"] == named["last_id"] == "scripted"
    assert get("/health").json() == {"status": "ok"}
    assert get("/ready").json() == {"status": "ready", "running": 0, "waiting": 0}


def test_tokens_and_templates(server: Running) -> None:
    assert post(server, "/tokenize", content="Hé").json()["tokens"] == [72, 195, 169]
    special = post(server, "/tokenize", prompt="H", add_special_tokens=True).json()
    assert special == {"tokens": [256, 72], "count": 2, "max_model_len": 1000}
    assert post(server, "/tokenize", messages=HI).json()["count"] == len("[user]Hi[assistant]")
    assert post(server, "/detokenize", tokens=[72, 195, 169]).json()["content"] == "Hé"
    assert post(server, "/apply-template", messages=HI).json() == {"prompt": "[user]Hi[assistant]"}


def test_options_reach_the_engine(server: Running) -> None:
    server.engine.says("x")
    post(
        server, "/v1/chat/completions", messages=HI, temperature=0.5, top_p=0.9, top_k=-1,
        min_p=0.1, repeat_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4,
        logit_bias={"65": -5}, seed=2**33 + 5, max_completion_tokens=9, max_tokens=5, stop="z",
        x_redrafter={"draft": True, "tree": "2x3/5"},
    )  # fmt: skip
    (asked,) = server.engine.asked
    sampling = asked.sampling
    assert (sampling.temp, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert sampling.repetition_penalty == 1.2
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.3, 0.4)
    assert (sampling.logit_bias, sampling.seed) == ({65: -5.0}, 5)
    assert (asked.max_tokens, asked.stop, asked.draft) == (9, ("z",), True)
    assert (asked.tree.width, asked.tree.depth, asked.tree.nodes) == (2, 3, 5)


@pytest.mark.parametrize(
    ("given", "draft", "tree"),
    [
        ({"num_draft_tokens": 0}, False, None),
        ({"num_draft_tokens": 3}, None, "chain of 3"),
        ({"x_redrafter": {"draft": False}}, False, None),
        ({"x_redrafter": {"lookup": 4}}, None, "beam 3x4, 5 nodes, lookup 4"),
        ({"x_redrafter": None, "temperature": None, "max_tokens": None, "stop": None}, None, None),
    ],
)
def test_what_is_drafted(
    given: dict[str, Any], draft: bool | None, tree: str | None, server: Running
) -> None:
    server.engine.says("x")
    post(server, "/v1/chat/completions", messages=HI, **given)
    (asked,) = server.engine.asked
    assert (asked.draft, asked.tree and str(asked.tree)) == (draft, tree)
    assert asked.max_tokens == 1000 - len(asked.prompt)
