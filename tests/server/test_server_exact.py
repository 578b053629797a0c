"""Over HTTP the tokens are those of `stream_generate`, drafted or not, in float32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import Running, running
from tiny_chat import words, write_chat_model

from mlx_redrafter import load, stream_generate
from mlx_redrafter.api import Model
from mlx_redrafter.server.engine import ModelEngine
from mlx_redrafter.text.template import render
from mlx_redrafter.tree.shape import TreeShape

QUESTION = [{"role": "user", "content": "ba be bi ba be bi ba be"}]
OPTIONS: list[dict[str, Any]] = [
    {"temp": 0.0},
    {"temp": 1.0, "seed": 3},
    {"temp": 0.9, "seed": 4, "top_p": 0.9, "top_k": 20, "min_p": 0.02},
    {"temp": 0.7, "seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temp": 0.0, "frequency_penalty": 0.6, "logit_bias": {9: -3.0}},
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    """Uncompiled, which for few tokens is quicker; the same graphs."""
    model, tokenizer = load(write_chat_model(tmp_path_factory.mktemp("chat")))
    return Model.of(model.name, model.folder, model.target, compiled=False), tokenizer


@pytest.fixture(scope="module", params=[1, 4], ids=["in turns", "together"])
def server(request: pytest.FixtureRequest, loaded: tuple[Model, Any]) -> Iterator[Running]:
    with running(ModelEngine(*loaded), parallel=request.param) as found:
        yield found


def sent(server: Running, **options: Any) -> dict[str, Any]:
    given = {"temperature" if name == "temp" else name: value for name, value in options.items()}
    body = {"messages": QUESTION, "max_tokens": 24, **given}
    found = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert found.status_code == 200, found.text
    answer: dict[str, Any] = found.json()
    return answer


@pytest.mark.parametrize("options", OPTIONS)
def test_the_text_of_an_answer(
    options: dict[str, Any], server: Running, loaded: tuple[Model, Any]
) -> None:
    model, tokenizer = loaded
    prompt = render(tokenizer, QUESTION)
    wanted = list(stream_generate(model, tokenizer, prompt, 24, draft=False, **options))
    text, count = "".join(each.text for each in wanted), len(wanted)
    drafting = set()
    for extra in ({}, {"draft": False}, {"tree": "1x4/5", "lookup": 3}, {"draft": True}):
        found = sent(server, **options, x_redrafter=extra)
        assert found["choices"][0]["message"]["content"] == text
        assert found["usage"]["completion_tokens"] == count
        assert found["usage"]["prompt_tokens"] == len(prompt)
        drafting.add(found["metrics"]["speculative_decoding"] is not None)
    assert drafting == {True, False}


def test_another_seed_is_another_text(server: Running) -> None:
    texts = {sent(server, temp=1.0, seed=s)["choices"][0]["message"]["content"] for s in range(4)}
    assert len(texts) > 1


def test_choices_have_the_seeds_that_follow(server: Running) -> None:
    several = sent(server, temp=1.0, seed=20, n=3)["choices"]
    for i, choice in enumerate(several):
        alone = sent(server, temp=1.0, seed=20 + i)["choices"][0]
        assert choice["message"] == alone["message"]


def test_requests_at_once_and_those_that_are_left(server: Running) -> None:
    """What others do changes no text."""
    wanted = {seed: sent(server, temp=1.0, seed=seed)["choices"] for seed in range(4)}
    found: dict[int, Any] = {}

    def ask(seed: int) -> None:
        found[seed] = sent(server, temp=1.0, seed=seed)["choices"]

    def leave() -> None:
        body = {"messages": QUESTION, "stream": True}
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body, timeout=60
        ) as got:
            next(got.iter_bytes())

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    threads += [threading.Thread(target=leave) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


def test_a_talk_goes_on_from_what_was_read(server: Running, loaded: tuple[Model, Any]) -> None:
    """Its text is that of a talk that is read anew."""
    model, tokenizer = loaded
    messages, cached = list(QUESTION), []
    for turn in range(3):
        body = {"messages": messages, "max_tokens": 12, "temperature": 0}
        found = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        answer = found["choices"][0]["message"]["content"]
        prompt = render(tokenizer, messages)
        alone = stream_generate(model, tokenizer, prompt, 12, draft=False)
        assert answer == "".join(each.text for each in alone)
        cached.append(found["usage"]["prompt_tokens_details"]["cached_tokens"])
        said = {"role": "assistant", "content": answer}
        messages = [*messages, said, {"role": "user", "content": f"ba be {'bi ' * turn}bo"}]
    assert cached[2] > cached[1] >= 8


def test_a_text_is_continued(server: Running, loaded: tuple[Model, Any]) -> None:
    model, tokenizer = loaded
    prompt = words(*range(6, 16))
    wanted = "".join(each.text for each in stream_generate(model, tokenizer, prompt, 12))
    for given in (prompt, tokenizer.encode(prompt)):
        body = {"prompt": given, "max_tokens": 12, "temperature": 0}
        found = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        assert found["choices"][0]["text"] == wanted


def test_what_the_models_files_say_of_sampling(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model")
    for text, wanted in [
        ('{"do_sample": true, "temperature": 0.6, "top_k": 20}', {"temp": 0.6, "top_k": 20}),
        ('{"do_sample": true}', {"temp": 1.0}),
        ('{"temperature": 0.6}', {}),
        ('{"do_sample": true, "temperature": "x", "top_p": 7}', {"temp": 1.0}),
    ]:
        (folder / "generation_config.json").write_text(text)
        engine = ModelEngine(*load(folder), context=100)
        assert engine.sampling == wanted
    assert (engine.name, engine.context, engine.vocab_size) == ("model", 100, 31)
    assert engine.facts["n_ctx_train"] == 2048


def test_a_context_beyond_the_memory(
    loaded: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ModelEngine(*loaded, context=1000)
    assert engine.warning() is None
    assert engine.facts["cache_bytes"] < ModelEngine(*loaded).facts["cache_bytes"]
    need = engine.facts["cache_bytes"] + 4 * engine.facts["n_params"]
    monkeypatch.setattr("mlx_redrafter.server.engine.memory_bytes", lambda: need / 0.9 + 1)
    assert engine.warning() is None
    monkeypatch.setattr("mlx_redrafter.server.engine.memory_bytes", lambda: need / 0.9 - 2)
    assert "a request of 1000 tokens take 0.0 GB" in str(engine.warning())


def test_a_tree_is_what_it_says(server: Running) -> None:
    """The mutation that ignores x_redrafter would leave the same text: the counts tell."""
    chain = sent(server, temp=0.0, x_redrafter={"tree": "1x1/1", "lookup": 5})
    steps = chain["metrics"]["speculative_decoding"]["num_spec_steps"]
    assert chain["timings"]["draft_n"] == 5 * steps
    assert str(TreeShape(1, 0, 6, lookup=5)) == "lookup of 5"


def test_a_prediction(server: Running) -> None:
    """Of the text itself: the same text in fewer steps; OpenAI's counts say how much was right."""
    bias = {"logit_bias": {"1": -1e30}, "temp": 0.9, "seed": 8}
    tree = {"x_redrafter": {"tree": "1x4/5", "lookup": 7}}
    plain = sent(server, **bias, **tree)
    text = plain["choices"][0]["message"]["content"]
    wrong = words(*range(8, 20))
    for content, least in ((text, 19), ([{"type": "text", "text": text}], 19), (wrong, 0)):
        prediction = {"type": "content", "content": content}
        found = sent(server, **bias, **tree, prediction=prediction)
        assert found["choices"][0]["message"]["content"] == text
        counts = found["usage"]["completion_tokens_details"]
        accepted, rejected = (counts[f"{n}_prediction_tokens"] for n in ("accepted", "rejected"))
        if least:
            assert (accepted >= least, rejected) == (True, 0)
            steps = [f["metrics"]["speculative_decoding"]["num_spec_steps"] for f in (found, plain)]
            assert steps[0] <= 5 < steps[1]
        else:
            assert accepted <= 4 and rejected >= 6
    undrafted = sent(server, **bias, prediction={"content": text}, x_redrafter={"draft": False})
    counts = undrafted["usage"]["completion_tokens_details"]
    assert counts["accepted_prediction_tokens"] == counts["rejected_prediction_tokens"] == 0
