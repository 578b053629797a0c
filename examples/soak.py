"""Minutes of a real server under many clients: talks, streams, clients that leave, bad requests.

    python examples/soak.py --minutes 10 --clients 6

It starts `mlx-redrafter serve`, prints every half minute what `/metrics` says, and a verdict at the
end: does memory stay where it is, are the texts what they are alone, is nothing left behind?
Requests go to this machine only. Needs 'mlx-redrafter[serve]'.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

CHAT = "/v1/chat/completions"
TOPICS = ("rivers", "trees", "bread", "the moon", "old maps", "trains", "salt", "bees", "wool")
SYSTEM = "You are a helpful assistant. Answer briefly, in one or two plain sentences. " * 8
MIB = 2**20


def numbers(text: str) -> dict[str, float]:
    """The samples of a page of metrics, by name and label."""
    return {
        sample.name.removeprefix("redrafter:") + "".join(f"/{v}" for v in sample.labels.values()): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@dataclass
class Soak:
    """The clients, what they saw, and what the server said of itself."""

    http: httpx.AsyncClient
    dice: random.Random
    most: int  # tokens of an answer
    seconds: float
    ends: float = 0.0
    seen: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    alone: dict[int, str] = field(default_factory=dict)
    scraped: list[dict[str, float]] = field(default_factory=list)

    async def client(self) -> None:
        """One client after the other, in the same place, until the time is over."""
        ways: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.talk, 5), (self.same, 3), (self.others, 2), (self.leave_stream, 3),
            (self.leave_whole, 2), (self.leave_long, 2), (self.bad, 3), (self.broken, 1),
        ]  # fmt: skip
        while time.monotonic() < self.ends:
            (way,) = self.dice.choices([w for w, _ in ways], [n for _, n in ways])
            try:
                await way()
                self.seen[way.__name__] += 1
            except Exception as error:
                self.faults.append(f"{way.__name__}: {type(error).__name__} {error}"[:200])

    def body(self, messages: list[Any], **more: Any) -> dict[str, Any]:
        return {"messages": messages, "max_tokens": self.most, **more}

    async def ask(self, status: int = 200, path: str = CHAT, **body: Any) -> Any:
        """A whole answer, of the status that it has to have."""
        found = await self.http.post(path, json=body)
        if found.status_code != status:
            raise RuntimeError(f"{path}: status {found.status_code}, {found.text[:100]}")
        return found.json()

    async def stream(self, body: dict[str, Any], stop_after: int = 10**9) -> str:
        """The text of a stream; left after so many pieces."""
        text, pieces = "", 0
        async with self.http.stream("POST", CHAT, json={**body, "stream": True}) as found:
            async for line in found.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                text += event["choices"][0]["delta"].get("content") or ""
                pieces += 1
                if pieces > stop_after:
                    break
        return text

    async def talk(self) -> None:
        """Several turns, which go on from what was read; now and then the last one is edited."""
        about = self.dice.choice(TOPICS)
        messages: list[Any] = [{"role": "system", "content": SYSTEM}]
        for turn in range(self.dice.randint(1, 4)):
            messages.append({"role": "user", "content": f"Tell me of {about}, part {turn}."})
            text = await self.stream(self.body(messages, temperature=0.7, seed=turn))
            messages.append({"role": "assistant", "content": text})
            if self.dice.random() < 0.2:
                del messages[-2:]
                about = self.dice.choice(TOPICS)

    def probe(self, number: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": f"One sentence about {TOPICS[number]}."}]
        return self.body(messages, temperature=0.9 * (number % 2), seed=number)

    async def same(self) -> None:
        """Whatever else runs, the text is what it was alone."""
        number = self.dice.randrange(len(self.alone))
        text = await self.stream(self.probe(number))
        if text != self.alone[number]:
            raise RuntimeError(f"another text: {text!r}, alone {self.alone[number]!r}")

    async def others(self) -> None:
        """The other dialects, several choices, several prompts."""
        messages = [{"role": "user", "content": f"What is {self.dice.choice(TOPICS)}?"}]
        most = self.most
        await self.ask(path="/v1/messages", messages=messages, max_tokens=most)
        await self.ask(path="/v1/responses", input="Hi", max_output_tokens=most)
        await self.ask(path="/v1/completions", prompt=["Once", "Twice"], n=2, max_tokens=most)

    async def leave_stream(self) -> None:
        messages = [{"role": "user", "content": f"A long story of {self.dice.choice(TOPICS)}."}]
        await self.stream({"messages": messages}, stop_after=self.dice.randint(1, 6))

    async def leave_whole(self) -> None:
        """Without a stream: the connection is closed while the answer is made."""
        messages = [{"role": "user", "content": f"A long story of {self.dice.choice(TOPICS)}."}]
        await self._leave({"messages": messages})

    async def leave_long(self) -> None:
        """While the prompt is read."""
        words = " ".join(self.dice.choice(TOPICS) for _ in range(1500))
        await self._leave({"messages": [{"role": "user", "content": words}], "stream": True})

    async def _leave(self, body: dict[str, Any]) -> None:
        asked = asyncio.ensure_future(self.http.post(CHAT, json=body))
        await asyncio.wait({asked}, timeout=self.dice.uniform(0.05, 1.5))
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    async def bad(self) -> None:
        """Each has its status, and a line that says why."""
        hi = [{"role": "user", "content": "Hi"}]
        await self.ask(400, messages=hi, temperature="warm")
        await self.ask(400, messages=[])
        await self.ask(400, messages=[{"role": "user", "content": "word " * 20000}])
        await self.ask(404, path="/v1/nothing")
        await self.ask(501, path="/v1/embeddings", input="Hi")
        found = await self.http.post(CHAT, content=b"{", headers={"content-type": "text/plain"})
        if found.status_code != 415:
            raise RuntimeError(f"status {found.status_code} for text/plain")

    async def broken(self) -> None:
        """Half a request, and gone."""
        url = self.http.base_url
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        await writer.drain()
        await asyncio.sleep(self.dice.uniform(0, 0.5))
        writer.close()

    async def watch(self, every: float) -> None:
        """A line at intervals, until the time is over."""
        start = time.monotonic()
        print(
            "   time  RSS MB  arrays MB  graphs  answers  waiting  sessions  cache MB  of MB"
            "  connections  done  left  refused"
        )
        while True:
            await self.scrape(time.monotonic() - start)
            if time.monotonic() >= self.ends:
                return
            await asyncio.sleep(min(every, max(0.0, self.ends - time.monotonic())))

    async def scrape(self, seconds: float) -> dict[str, float]:
        found = numbers((await self.http.get("/metrics")).text)
        found["seconds"] = seconds
        self.scraped.append(found)
        refused = sum(v for k, v in found.items() if k.startswith("http_responses_total/4"))
        done = sum(found.get(f"request_success_total/{end}", 0) for end in ("stop", "length"))
        print(
            f"{seconds:6.0f} s {found.get('process_resident_memory_bytes', 0) / MIB:7.0f}"
            f" {found['memory_active_bytes'] / MIB:10.0f} {found['graphs']:7.0f}"
            f" {found['num_answers_running']:8.0f}"
            f" {found['num_requests_waiting']:8.0f} {found['prefix_cache_sessions']:9.0f}"
            f" {found['prefix_cache_bytes'] / MIB:9.1f}"
            f" {found['prefix_cache_limit_bytes'] / MIB:6.1f}"
            f" {found['http_connections']:12.0f} {done:5.0f}"
            f" {found.get('request_success_total/abort', 0):5.0f} {refused:8.0f}",
            flush=True,
        )
        return found

    async def run(self, clients: int, every: float) -> dict[str, float]:
        """All of it; what the server says when everybody has gone."""
        for number in range(len(TOPICS)):
            self.alone[number] = await self.stream(self.probe(number))
        self.ends = time.monotonic() + self.seconds
        work = [asyncio.ensure_future(self.client()) for _ in range(clients)]
        await self.watch(every)
        await asyncio.gather(*work)
        for _ in range(200):
            ready = (await self.http.get("/ready")).json()
            if (ready["running"], ready["waiting"]) == (0, 0):
                break
            await asyncio.sleep(0.05)
        return await self.scrape(self.scraped[-1]["seconds"] + 1)

    def verdict(self, last: dict[str, float], code: int, seconds: float) -> list[tuple[bool, str]]:
        """What has to hold, and whether it does."""
        resident = [s.get("process_resident_memory_bytes", 0.0) / MIB for s in self.scraped]
        third = max(1, len(resident) // 3)
        middle, end = max(resident[third:-third] or resident), max(resident[-third:])
        most = max(s["prefix_cache_bytes"] for s in self.scraped)
        left = {name: last[name] for name in ("num_answers_running", "num_requests_waiting")}
        return [
            (not self.faults, f"{sum(self.seen.values())} clients without a fault"),
            (self.seen["same"] > 0, f"{self.seen['same']} texts in company are those alone"),
            (end <= 1.1 * middle, f"RSS {end:.0f} MB in the last third, {middle:.0f} before"),
            (most <= last["prefix_cache_limit_bytes"], f"{most / MIB:.1f} MB of sessions at most"),
            (not any(left.values()), "nothing runs or waits when all have gone"),
            (last["http_connections"] <= 2, f"{last['http_connections']:.0f} connections left"),
            (last["engine_errors_total"] == 0, "no fault of the engine"),
            (code == 0, f"SIGTERM ended it with code {code} after {seconds:.1f} s"),
        ]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two lines")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("--prompt-cache-bytes", default="48M")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def started(given: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """The server, and where it listens."""
    command = [sys.executable, "-m", "mlx_redrafter", "serve", "-m", given.model, "--port", "0",
               "--grace", "5", "--prompt-cache-bytes", given.prompt_cache_bytes]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.match(r"listening on (http://\S+)", line):
            return process, found[1]
        print(line, end="", file=sys.stderr)
    raise SystemExit("the server did not start")


async def soak(given: argparse.Namespace, url: str) -> tuple[Soak, dict[str, float]]:
    limits = httpx.Limits(max_keepalive_connections=0)  # what is left open is the server's
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        dice = random.Random(given.seed)
        found = Soak(http, dice, given.max_tokens, 60 * given.minutes)
        return found, await found.run(given.clients, given.every)


def main() -> int:
    given = options()
    process, url = started(given)
    try:
        found, last = asyncio.run(soak(given, url))
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
        rows = found.verdict(last, code, time.monotonic() - start)
    finally:
        process.kill()
    print("clients:", ", ".join(f"{n} {name}" for name, n in sorted(found.seen.items())))
    for fault in found.faults[:10]:
        print("fault:", fault)
    for holds, text in rows:
        print("ok  " if holds else "BAD ", text)
    return 0 if all(holds for holds, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
