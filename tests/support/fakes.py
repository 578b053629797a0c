"""A model that says what a test tells it to, behind the two functions that the CLI calls."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest

# These take `api.load` when they are imported: that must not be while it is exchanged.
import mlx_redrafter.bench.budget
import mlx_redrafter.bench.exactness
import mlx_redrafter.bench.parallel
import mlx_redrafter.bench.prefill.needles
import mlx_redrafter.bench.prefill.patterns
import mlx_redrafter.bench.prefill.run
import mlx_redrafter.bench.speed.run
import mlx_redrafter.evaluation.report  # noqa: F401
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.text.answer import GenerationResponse

SUMMARY = "3 tokens · 20.0 tokens/s · 1.50 tokens per step · prompt 4 tokens, 100.0 tokens/s\n"


class FakeTokenizer:
    """Characters as tokens; a template that is easy to read in an assertion."""

    has_chat_template = True
    think_start: str | None = None
    think_end: str | None = None
    takes_system = True

    bos_token: str | None = None
    knows: tuple[str, ...] = ()  # variables of the template

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, **options: Any
    ) -> str | list[int]:
        assert options.pop("add_generation_prompt")
        if not self.takes_system and messages[0]["role"] == "system":
            raise jinja2.TemplateError("System role not supported")
        text = "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"
        text += "".join(f"[{name}={options[name]}]" for name in self.knows if name in options)
        return list(map(ord, text)) if tokenize else text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(map(ord, text))

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))


@dataclass
class FakeModel:
    """Answers with `answers` in turn, a piece per step; keeps what it was called with."""

    answers: list[list[str]] = field(default_factory=lambda: [["Par", "is", "."]])
    calls: list[dict[str, Any]] = field(default_factory=list)
    loaded: list[tuple[Any, ...]] = field(default_factory=list)
    before_piece: Callable[[int], None] = lambda index: None
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    drafter: object | None = field(default_factory=object)
    drafting: bool = True
    error: Exception | None = None
    name: str = "fake"
    budget: Any = field(default_factory=lambda: SimpleNamespace(costs=lambda *_: None))
    ends: str = "stop"
    drafter_folder: Path | None = Path("the-drafter")
    engine: Any = field(default_factory=lambda: SimpleNamespace(same_bits=True))
    target: Any = field(
        default_factory=lambda: SimpleNamespace(
            config=SimpleNamespace(max_positions=1000, model_type="llama")
        )
    )

    def load(self, name: str, drafter: str | None, **options: Any) -> tuple[Any, Any]:
        self.loaded.append((name, drafter, options))
        return self, self.tokenizer

    def stream_generate(
        self, model: Any, tokenizer: Any, prompt: str | Sequence[int], **options: Any
    ) -> Iterator[GenerationResponse]:
        shown = prompt if isinstance(prompt, str) else "".join(map(chr, prompt))
        self.calls.append({"prompt": shown, **options})
        if self.error is not None:
            raise self.error
        pieces = self.answers[min(len(self.calls), len(self.answers)) - 1]
        stats = DraftStats()
        for i, piece in enumerate(pieces):
            self.before_piece(i)
            if i % 2 == 0:
                stats.record(min(2, len(pieces) - i), drafted=4)
            yield GenerationResponse(
                text=piece,
                token=100 + i,
                from_draft=i % 2 == 0,
                prompt_tokens=4,
                prompt_tps=100.0,
                generation_tokens=i + 1,
                generation_tps=20.0,
                peak_memory=0.0,
                finish_reason=self.ends if i == len(pieces) - 1 else None,
                stats=stats,
            )

    @property
    def prompts(self) -> list[str]:
        return [call["prompt"] for call in self.calls]


def install(monkeypatch: pytest.MonkeyPatch, model: FakeModel) -> FakeModel:
    """Put the fake in the place of the real functions."""
    # By name: the package exports a function that is called as this module is.
    module = importlib.import_module("mlx_redrafter.api")
    monkeypatch.setattr(module, "load", model.load)
    monkeypatch.setattr(module, "stream_generate", model.stream_generate)
    return model
