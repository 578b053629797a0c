"""Clients that leave, queues that are full, and a server that ends."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from scripted_engine import Running, ScriptedEngine, running
from tiny_chat import write_chat_model

from mlx_redrafter import api
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.server.engine import ModelEngine
from mlx_redrafter.server.events import Event, Progress, Text
from mlx_redrafter.server.requests import Generation
from mlx_redrafter.server.worker import Job, Worker

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
LONG = "a very long answer " * 60
PAUSE = 0.01


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[api.Model, Any]:
    folder = write_chat_model(tmp_path_factory.mktemp("chat"), max_position_embeddings=9000)
    model, tokenizer = api.load(folder)
    return api.Model.of(model.name, model.folder, model.target, compiled=False), tokenizer


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ScriptedEngine(context=9000), queue=2) as found:
        yield found


def test_a_job_ends_within_a_step_and_a_part_of_the_prompt() -> None:
    """Counted where no network stands between."""
    engine = ScriptedEngine([LONG], step=4, context=9000)
    ready = threading.Event()
    worker = Worker(lambda: engine, on_ready=ready.set)
    worker.start()
    assert ready.wait(30)
    for kind, counted in ((Text, "steps"), (Progress, "parts")):
        begun = getattr(engine, counted)
        assert _seen_before_it_ends(worker, kind) == 1
        assert getattr(engine, counted) - begun <= 2
    worker.stop()
    assert worker.join(20)


def _seen_before_it_ends(worker: Worker, kind: type) -> int:
    """Events of that kind from a job that is cancelled at the first of them."""
    seen: list[Event] = []

    def deliver(row: int, event: Event) -> None:
        if isinstance(event, kind):
            seen.append(event)
            job.cancel()

    job = Job("j", [Generation([65] * 500, SamplingParams(), 8000)], deliver)
    worker.submit(job)
    while worker.load != (0, 0):
        time.sleep(0.001)
    return len(seen)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("kind", [Text, Progress])
def test_in_company_rows_are_gone_within_a_step(
    kind: type, streams: bool, loaded: tuple[api.Model, Any]
) -> None:
    """Over HTTP, of answers that run together: nothing is read or decoded for a client that is
    gone but the piece of work in which it left, and the other one goes on."""
    with running(ModelEngine(*loaded), parallel=3) as server:
        worker, pieces, at_work = server.worker, list[tuple[bool, bool]](), list[Any]()
        work = worker._together.next
        left: list[socket.socket] = []

        def counted() -> Any:
            tallies = [row.writing.tally for row in worker._rows.values()]
            (own,) = [t for t in tallies if t.prompt > 1000] or [None]
            at_work.extend(slot for slot in worker.slots() if slot.get("generated_tokens"))
            if own is not None:
                there = bool(own.generated if kind is Text else own.read)
                if there and not left[0]._closed:  # type: ignore[attr-defined]
                    left[0].close()
                    cancelled.wait(10)
                pieces.append((there, cancelled.is_set()))
            time.sleep(0.002)
            return work()

        cancelled = threading.Event()
        withdraw = worker.withdraw

        def told(job: Job) -> None:
            withdraw(job)
            cancelled.set()

        worker._together.next, worker.withdraw = counted, told  # type: ignore[method-assign]
        body = {"messages": HI, "max_tokens": 300, "logit_bias": {"1": -1e30}}
        other = request(server, {**body, "stream": True})
        long = [{"role": "user", "content": "ba " * 2000}]
        left.append(request(server, {**body, "messages": long, "stream": streams}))
        assert cancelled.wait(20)
        server.wait(lambda: len(worker._rows) < 2)
        assert pieces[-1] == (True, True)
        assert [gone for _, gone in pieces].count(True) == 1
        assert at_work and all(slot["drafting"] for slot in at_work)
        other.close()
        server.idle()


def request(server: Running, body: dict[str, Any], path: str = CHAT) -> socket.socket:
    """Sent and not waited for."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    found = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    found.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return found


def good(server: Running) -> None:
    server.engine.says("fine")
    found = httpx.post(server.url + CHAT, json={"messages": HI}, timeout=20).json()
    assert found["choices"][0]["message"]["content"] == "fine"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses", "/v1/completions"])
def test_a_client_that_leaves_ends_its_answer(stream: bool, path: str, server: Running) -> None:
    server.engine.says(LONG, step=4, pause=PAUSE)
    body = {"messages": HI, "input": "Hi", "prompt": "Hi", "stream": stream}
    begun, closed = server.engine.steps, server.engine.closed
    left = request(server, body, path)
    server.wait(lambda: server.engine.steps > begun + 2)
    left.close()
    server.idle()
    assert server.engine.closed == closed + 1
    assert server.engine.steps - begun < len(LONG) / 4 / 2
    good(server)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_prompt_is_read(stream: bool, server: Running) -> None:
    server.engine.says("never", pause=PAUSE)
    begun, steps = server.engine.parts, server.engine.steps
    long = [{"role": "user", "content": "x" * 8000}]
    left = request(server, {"messages": long, "stream": stream})
    server.wait(lambda: server.engine.parts > begun + 2)
    left.close()
    server.idle()
    assert server.engine.parts - begun < 8000 / server.engine.chunk / 2
    assert server.engine.steps == steps
    good(server)


def test_one_that_leaves_the_queue_is_not_answered(server: Running) -> None:
    server.engine.says(LONG, pause=PAUSE)
    first = request(server, {"messages": HI, "stream": True})
    server.wait(lambda: server.worker.load == (1, 0))
    second = request(server, {"messages": HI, "stream": True})
    server.wait(lambda: server.worker.load == (1, 1))
    second.close()
    server.wait(lambda: server.worker.load == (1, 0))
    first.close()
    server.idle()
    assert len(server.engine.asked) == 1
    good(server)


def test_a_full_queue(server: Running) -> None:
    """429 with the time to wait; Anthropic's clients know 529."""
    server.engine.says(LONG, pause=PAUSE)
    held = []
    for load in ((1, 0), (1, 1), (1, 2)):
        held.append(request(server, {"messages": HI, "stream": True}))
        server.wait(lambda load=load: server.worker.load == load)
    refused = httpx.post(server.url + CHAT, json={"messages": HI}, timeout=20)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert refused.headers["retry-after"] == "2"
    body = {"messages": HI, "max_tokens": 5}
    other = httpx.post(server.url + "/v1/messages", json=body, timeout=20)
    assert (other.status_code, other.json()["error"]["type"]) == (529, "overloaded_error")
    ready = httpx.get(server.url + "/ready").json()
    assert ready == {"status": "ready", "running": 1, "waiting": 2}
    for each in held:
        each.close()
    server.idle()
    good(server)


def test_requests_are_answered_in_turn(server: Running) -> None:
    server.engine.says("one", "two", "three", pause=PAUSE)
    held = []
    for load in ((1, 0), (1, 1), (1, 2)):
        held.append(request(server, {"messages": HI, "max_tokens": 50}))
        server.wait(lambda load=load: server.worker.load[0] == 1 or server.worker.load == load)
        time.sleep(0.01)
    texts = []
    for each in held:
        received = b""
        while not received.rstrip().endswith(b"}"):
            received += each.recv(65536)
        content = json.loads(received.partition(b"\r\n\r\n")[2])
        texts.append(content["choices"][0]["message"]["content"])
        each.close()
    assert texts == ["one", "two", "three"]


def test_a_client_that_does_not_read_is_let_go() -> None:
    engine = ScriptedEngine(["x\n" * 2000], step=1, context=9000, pause=0.001)
    with running(engine, send_buffer=2048, write_seconds=0.2) as server:
        left = socket.socket()
        left.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        left.connect(("127.0.0.1", server.port))
        data = json.dumps({"messages": HI, "stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        left.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        server.wait(lambda: len(engine.asked) == 1)
        server.wait(lambda: server.worker.load == (0, 0), 60)
        assert engine.closed == 1
        left.close()
        good(server)


def ending(server: Running, seconds: float) -> tuple[list[str], float]:
    """The lines of a stream during which the server is told to end, and how long that took."""
    lines: list[str] = []

    def read() -> None:
        body = {"messages": HI, "stream": True}
        with httpx.stream("POST", server.url + CHAT, json=body, timeout=20) as found:
            lines.extend(line for line in found.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    server.wait(lambda: server.worker.load == (1, 0))
    server.wait(lambda: len(server.engine.asked) == 1)
    at = time.monotonic()
    server.server.end()
    reader.join(seconds + 10)
    return lines, time.monotonic() - at


def test_running_answers_end_within_the_grace() -> None:
    with running(ScriptedEngine(["a short answer"], pause=0.05), grace=5.0) as server:
        lines, took = ending(server, 5)
        assert lines[-1] == "data: [DONE]"
        assert took < 4


def test_what_runs_after_the_grace_is_told_so() -> None:
    with running(ScriptedEngine([LONG], pause=0.1), grace=0.3) as server:
        lines, _ = ending(server, 0.3)
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("unavailable", "server_error")
        assert "shutting down" in error["message"]
