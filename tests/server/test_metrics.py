"""What `/metrics` counts is what the requests were told one by one; `/slots` shows them at work."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import Running, ScriptedEngine, running
from test_leaving import request

from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.server.events import Event
from mlx_redrafter.server.requests import Generation
from mlx_redrafter.server.worker import Job, Worker

CHAT = "/v1/chat/completions"
SECRET = "very secret words"
HI = [{"role": "user", "content": SECRET}]


@pytest.fixture
def server() -> Iterator[Running]:
    with running(ScriptedEngine(context=9000), queue=1) as found:
        yield found


def scraped(server: Running) -> dict[str, float]:
    """Samples by name, with the value of a label behind it."""
    found = httpx.get(server.url + "/metrics", timeout=20)
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(found.text):
        for sample in family.samples:
            label = "".join(f"/{value}" for value in sample.labels.values())
            samples[sample.name.removeprefix("redrafter:") + label] = sample.value
    return samples


def post(server: Running, **body: Any) -> Any:
    return httpx.post(server.url + CHAT, json={"messages": HI, **body}, timeout=20)


def answered(server: Running) -> list[dict[str, Any]]:
    """Requests that end well, each in its own way: what they were told."""
    server.engine.says("a short answer", step=4)
    found = [post(server).json(), post(server, n=2).json(), post(server, max_tokens=6).json()]
    body = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    text = httpx.post(server.url + CHAT, json=body, timeout=20).text
    return [*found, json.loads(text.split("\n\n")[-3].removeprefix("data: "))]


def failing(server: Running) -> None:
    """One that breaks in its second step, four that are refused, and two that leave."""
    server.engine.says("never seen whole", step=4)
    begun = server.engine.steps

    def fail(step: int) -> None:
        if step > begun:
            raise KeyError

    server.engine.before_step = fail
    assert post(server).status_code == 500
    assert post(server, temperature="x").status_code == 400
    assert httpx.post(server.url + "/nowhere", json={}).status_code == 404
    assert httpx.get(server.url + CHAT).status_code == 405
    server.engine.says("a very long answer " * 40, step=4, pause=0.01)
    held = [request(server, {"messages": HI, "stream": True})]
    server.wait(lambda: server.worker.load == (1, 0) and server.engine.asked != [])
    held.append(request(server, {"messages": HI, "n": 3}))
    server.wait(lambda: server.worker.load == (1, 1))
    assert post(server).status_code == 429
    for each in reversed(held):
        each.close()
        server.wait(lambda: server.worker.load[1] == 0)
    server.idle()


def test_counters_are_the_sums_of_what_requests_were_told(server: Running) -> None:
    told = answered(server)
    server.idle()
    usage = [each["usage"] for each in told]
    drafting = [each["metrics"]["speculative_decoding"] for each in told]
    written = sum(each["completion_tokens"] for each in usage)
    found = scraped(server)
    prompts = sum(each["prompt_tokens"] for each in usage) + usage[1]["prompt_tokens"]  # n=2
    assert found["prompt_tokens_total"] == found["prefix_cache_queries_total"] == prompts
    assert found["generation_tokens_total"] == written
    assert found["request_success_total/stop"] == 4
    assert found["request_success_total/length"] == 1
    for name, theirs in (
        ("num_drafts", "num_spec_steps"),
        ("num_draft_tokens", "num_draft_tokens"),
        ("num_accepted_tokens", "num_accepted_draft_tokens"),
    ):
        assert found[f"spec_decode_{name}_total"] == sum(each[theirs] for each in drafting), name
    places = [v for k, v in found.items() if k.startswith("spec_decode_num_accepted_tokens_per")]
    assert sum(places) == found["spec_decode_num_accepted_tokens_total"]
    assert found["time_to_first_token_seconds_count"] == 5
    assert found["e2e_request_latency_seconds_count"] == 5
    assert found["inter_token_latency_seconds_count"] == written - 5 * 4  # all but a first step's
    assert found["http_responses_total/200"] == 4
    assert found["num_requests_running"] == found["num_requests_waiting"] == 0

    failing(server)
    after = scraped(server)
    assert after["request_success_total/error"] == 1
    assert after["request_success_total/abort"] == 1 + 3
    assert after["engine_errors_total"] == after["queue_full_total"] == 1
    codes = {code: after[f"http_responses_total/{code}"] for code in (400, 404, 405, 429, 500)}
    assert set(codes.values()) == {1}, codes
    assert after["prompt_tokens_total"] == prompts + 2 * usage[0]["prompt_tokens"]
    assert after["generation_tokens_total"] >= written + 4 + 4
    assert after["e2e_request_latency_seconds_count"] == 5 + 2


def test_slots_show_what_answers_do_and_no_text(server: Running) -> None:
    server.engine.says("a very long answer " * 40, step=4, pause=0.01)
    begun = server.engine.parts
    first = request(server, {"messages": [{"role": "user", "content": SECRET * 100}]})
    slots = lambda: httpx.get(server.url + "/slots").json()  # noqa: E731
    server.wait(lambda: server.engine.parts > begun)
    (reading,) = slots()["slots"]
    assert (reading["state"], reading["generated_tokens"]) == ("reading", 0)
    assert 0 <= reading["prompt_tokens_read"] < reading["prompt_tokens"]
    steps = server.engine.steps
    server.wait(lambda: server.engine.steps > steps + 3)
    second = request(server, {"messages": HI, "n": 2})
    server.wait(lambda: server.worker.load == (1, 1))
    found = slots()
    assert (found["running"], found["waiting"], found["parallel"]) == (1, 1, 1)
    decoding, *queued = found["slots"]
    assert decoding["id"] == reading["id"]
    assert (decoding["state"], decoding["choice"]) == ("decoding", 0)
    assert decoding["prompt_tokens_read"] == decoding["prompt_tokens"]
    assert decoding["generated_tokens"] > 0 and decoding["tokens_per_second"] > 0
    assert decoding["tokens_per_step"] == 4
    assert [(each["state"], each["choice"]) for each in queued] == [("queued", 0), ("queued", 1)]
    assert not any(word in json.dumps(found) for word in ("secret", "long"))
    for each in (first, second):
        each.close()
    server.idle()
    assert slots()["slots"] == []


@pytest.mark.parametrize("path", ["/metrics", "/slots"])
def test_they_need_the_key(path: str) -> None:
    with running(ScriptedEngine(), api_key="right") as server:
        assert httpx.get(server.url + path).status_code == 401
        given = {"authorization": "Bearer right"}
        assert httpx.get(server.url + path, headers=given).status_code == 200


class Refusing(ScriptedEngine):
    """Refuses what it is asked after the first answer, before it begins."""

    refuses = False

    def answer(self, asked: Generation, session: Any, progress: Any) -> Any:
        if self.refuses:
            raise OptionError("no such thing")
        session.tokens = list(asked.prompt)
        return super().answer(asked, session, progress)


def test_what_is_refused_at_its_start_leaves_the_session_it_was_given() -> None:
    """And every answer of the request is counted once, those that never began too."""
    engine, ready, seen = Refusing(["fine"]), threading.Event(), list[Event]()
    worker = Worker(lambda: engine, on_ready=ready.set, cache_bytes=1 << 20)
    worker.start()
    assert ready.wait(30)
    asked = Generation([65] * 50, SamplingParams(), 9)

    def ask(answers: int) -> None:
        worker.submit(Job("j", [asked] * answers, lambda row, event: seen.append(event)))
        while worker.load != (0, 0):
            time.sleep(0.001)

    ask(1)
    assert len(worker.prefixes) == 1
    engine.refuses = True
    ask(3)
    assert len(worker.prefixes) == 1
    assert b'request_success_total{finished_reason="error"} 3.0' in worker.metrics.page()
    worker.stop()
    assert worker.join(20)
