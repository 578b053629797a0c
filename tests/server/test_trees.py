"""What the page asks of the server: trees of steps, answers alone in turns, prompts read afresh."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import random_drafter
from scripted_engine import Running, ScriptedEngine, running
from tiny_chat import write_chat_model

from mlx_redrafter import load
from mlx_redrafter.api import Model
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.server.engine import ModelEngine
from mlx_redrafter.server.requests import Generation
from mlx_redrafter.server.together import InTurns

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "ba be bi ba be bi ba be"}]}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model, tokenizer = load(write_chat_model(tmp_path_factory.mktemp("chat")))
    drafter = random_drafter(model.target)
    drafting = Model.of(model.name, model.folder, model.target, drafter, compiled=False)
    with running(ModelEngine(drafting, tokenizer), parallel=4) as found:
        yield found


def streamed(server: Running, extra: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    body = {**ASK, "max_tokens": 20, "stream": True, "temperature": 1.0, "seed": 3, **more}
    options = {"include_usage": True}
    body |= {"x_redrafter": extra, "stream_options": options}
    found = httpx.post(server.url + CHAT, json=body, timeout=60)
    assert found.status_code == 200, found.text
    lines = [line.removeprefix("data: ") for line in found.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def told(chunks: list[dict[str, Any]], name: str) -> list[Any]:
    return [chunk["x_redrafter"][name] for chunk in chunks if name in chunk.get("x_redrafter", {})]


def test_a_stream_tells_the_tree_of_every_step(server: Running) -> None:
    """The kept nodes and the bonus of all trees are the text, as the tokens are."""
    chunks = streamed(server, {"trees": True, "tree": "3x3/7", "lookup": 3})
    tokens = [token for part in told(chunks, "tokens") for token in part]
    trees = [tree for part in told(chunks, "trees") for tree in part]
    assert len(trees) == chunks[-1]["metrics"]["speculative_decoding"]["num_spec_steps"]
    words = []
    for tree in trees:
        words += [node["text"] for node in tree["nodes"][1:] if node["kept"]] + [tree["bonus"]]
    spelt = [stripped for text, _ in tokens if (stripped := text.strip())]
    assert words[: len(spelt)] == spelt
    parts = {node["part"] for tree in trees for node in tree["nodes"]}
    assert parts == {"", "beams", "text"}
    assert all(node["checked"] for tree in trees for node in tree["nodes"] if node["kept"])
    assert any(not node["checked"] for tree in trees for node in tree["nodes"])
    usual = streamed(server, {"tokens": True, "tree": "3x3/7", "lookup": 3})
    assert told(usual, "trees") == [] and told(usual, "seconds") == []
    assert [token for part in told(usual, "tokens") for token in part] == tokens


def test_answers_alone_are_the_same_and_tell_their_own_time(server: Running) -> None:
    """Two at once, beside one in company; their clocks only rise."""
    texts, clocks = dict[str, str](), dict[str, list[float]]()

    def run(name: str, extra: dict[str, Any]) -> None:
        chunks = streamed(server, extra)
        pieces = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]]
        texts[name], clocks[name] = "".join(pieces), told(chunks, "seconds")

    kinds = {"plain": {"draft": False}, "drafted": {"draft": True, "tree": "3x3/7"}}
    asked = {name: {**kind, "alone": True, "tokens": True} for name, kind in kinds.items()}
    asked["company"] = {"tokens": True}
    threads = [threading.Thread(target=run, args=one) for one in asked.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(texts.values())) == 1
    assert clocks["company"] == []
    for name in kinds:
        assert clocks[name] == sorted(clocks[name]) and clocks[name][0] > 0
    server.idle()


def test_the_turn_goes_to_the_one_whose_clock_is_behind() -> None:
    """One whose steps take three times as long has a third of them (turns of a step each would give
    both the same)."""
    slow, fast = ScriptedEngine(["x" * 200], step=1), ScriptedEngine(["y" * 600], step=1)
    slow.warmed = fast.warmed = True
    runner, asked = InTurns(slow), Generation([1, 2], SamplingParams(), 1000)
    seconds = {"slow": 0.03, "fast": 0.01}
    numbers = {}
    for name, engine in (("slow", slow), ("fast", fast)):
        runner._engine = engine
        numbers[name] = runner.insert(asked, Session(), lambda done, total: None)
    for _ in range(120):
        ((number, response),) = runner.next()
        name = next(own for own, n in numbers.items() if n == number)
        response.stats.decode_seconds += seconds[name]
        runner._used += seconds[name]  # as if it had taken so long
    counts = {"slow": slow.steps, "fast": fast.steps}
    assert 2.4 < counts["fast"] / counts["slow"] < 3.6
    runner.close()


def test_an_answer_alone_ends_when_its_client_leaves(server: Running) -> None:
    extra = {"alone": True, "tokens": True, "draft": False}
    body = {**ASK, "stream": True, "logit_bias": {"1": -1e30}, "x_redrafter": extra}
    for _ in range(2):
        with httpx.stream("POST", server.url + CHAT, json=body, timeout=60) as answer:
            next(line for line in answer.iter_lines() if '"seconds"' in line)
        server.idle()
    assert told(streamed(server, {"alone": True, "tokens": True}), "seconds")


def test_a_prompt_is_read_afresh_where_that_is_wanted(server: Running) -> None:
    """And leaves nothing for others, who find what they had left."""
    words = [{"role": "user", "content": "fa fe fi fo fu " * 8}]

    def cached(**more: Any) -> int:
        used = streamed(server, {}, messages=words, **more)[-1]["usage"]
        count: int = used["prompt_tokens_details"]["cached_tokens"]
        return count

    assert cached(cache_prompt=False) == 0
    assert cached() < 5  # of another talk's beginning
    assert cached() > 20
    assert cached(cache_prompt=False) == 0
    assert cached() > 20


def test_a_prompt_of_any_length_is_read_sparsely(server: Running) -> None:
    words = [{"role": "user", "content": "fa fe fi fo fu " * 100}]
    extra = {"sparse_prefill": "trianglemix", "sparse_prefill_min_context": 64}
    used = streamed(server, extra, messages=words, cache_prompt=False)[-1]["x_redrafter"]
    assert used["sparse_prefill"]["mode"] == "trianglemix"
    wrong = {**ASK, "x_redrafter": {**extra, "sparse_prefill_min_context": -1}}
    found = httpx.post(server.url + CHAT, json=wrong)
    assert (found.status_code, found.json()["error"]["param"]) == (400, "x_redrafter")
