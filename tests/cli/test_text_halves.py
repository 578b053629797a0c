"""Checkpoints that see, through the command line: their text half answers, and nothing else is
read; thoughts and tool calls are text, and no end of it."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from adapter_cases import TYPES, write_module
from conftest import write_target
from tiny_chat import END, WORDS, write_tokenizer
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.models import AdaptedModel, load_model, registry
from mlx_redrafter.models.weights import parameters

SEEING = ("vision_tower.blocks.0.w.weight", "model.visual.merger.weight",
          "multi_modal_projector.linear_1.weight", "model.audio_tower.a.weight")  # fmt: skip


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


def said(folder: Path, command: str, *more: str, line: str = "ba be") -> str:
    """Standard output; nothing but what was asked for is said beside it."""
    arguments = [command, "-q", "-m", str(folder), "--max-tokens", "9", *more]
    chats = command == "chat"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = CliRunner().invoke(
            cli.app, arguments if chats else [*arguments, line], input=line if chats else None
        )
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


# Ours, under both names that its weights go by; mlx_lm's.
@pytest.mark.parametrize(
    ("kind", "half"),
    [
        ("qwen3_vl", "qwen3"),
        ("gemma3", "gemma3_text"),
        ("lfm2-vl", "lfm2"),
        ("mistral3", "mistral4"),
    ],
)
@pytest.mark.parametrize("newer", [False, True])
def test_the_text_half_answers(tmp_path: Path, kind: str, half: str, newer: bool) -> None:
    text = {**TYPES[kind]["text_config"], "vocab_size": len(WORDS)}
    if kind == "mistral3":
        text = {**TYPES[half], "vocab_size": len(WORDS)}
    raw = write_module(
        tmp_path, kind, text_config=text, vocab_size=len(WORDS), eos_token_id=END,
        vision_config={"hidden_size": 8},
    )  # fmt: skip
    write_tokenizer(tmp_path)
    file = str(tmp_path / "model.safetensors")
    weights: dict[str, Any] = dict(mx.load(file))  # type: ignore[arg-type]
    if newer and registry.way(raw) == "native":
        weights = {
            name.replace("language_model.model.", "model.language_model.").replace(
                "language_model.lm_head.", "lm_head."
            ): value
            for name, value in weights.items()
        }
    blind = mx.full((4, 4), mx.nan)  # what was read of it would be refused
    mx.save_safetensors(file, {**weights, **dict.fromkeys(SEEING, blind)})
    model = load_model(tmp_path)
    assert isinstance(model, AdaptedModel) is (half in ("lfm2", "mistral4"))
    assert not [n for n in parameters(model) if "vis" in n or "audio" in n or "modal" in n]
    answer = said(tmp_path, "generate")
    assert len(answer.split()) > 1
    assert said(tmp_path, "generate", "--no-draft") == answer == said(tmp_path, "chat")


def test_another_half_is_still_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mistral3", "text_config": {"model_type": "qwen9"}})
    )
    result = CliRunner().invoke(cli.app, ["generate", "-m", str(tmp_path), "hi"])
    assert result.exit_code == 1
    assert "'qwen9'" in result.stderr and "mistral4" in result.stderr


MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
SAID = ["<think>", "ba", "</think>", "<tool_call>", "bi", "</tool_call>", "bo"]


def reciting(folder: Path, special: bool) -> Path:
    """A model whose answer to anything is SAID, and then the end of its turn."""
    from tokenizers import AddedToken, Tokenizer

    words = [*WORDS, *MARKS]
    size = 64
    write_target(folder, vocab_size=size, hidden_size=size, eos_token_id=END)
    file = str(folder / "model.safetensors")
    weights: dict[str, Any] = dict(mx.load(file))  # type: ignore[arg-type]
    after = mx.zeros((size, size))
    chain = [words.index("assistant"), *map(words.index, SAID), END]
    for one, two in itertools.pairwise(chain):
        after[two, one] = 20.0
    silent = {n: mx.zeros_like(w) for n, w in weights.items() if "o_proj" in n or "down_proj" in n}
    weights |= silent | {"model.embed_tokens.weight": mx.eye(size), "lm_head.weight": after}
    weights["model.norm.weight"] = mx.ones((size,))
    mx.save_safetensors(file, {name: value + 0 for name, value in weights.items()})
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(mark, special=special) for mark in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("special", [True, False])
def test_thoughts_and_tool_calls_are_text(tmp_path: Path, special: bool) -> None:
    """Whether the tokenizer calls them special or not; only the end of a turn ends the answer."""
    folder = reciting(tmp_path, special)
    for command in ("generate", "chat"):
        for more in ((), ("--no-draft",)):
            assert said(folder, command, *more).split() == SAID


def test_an_end_that_is_taken_for_one_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_redrafter.text import turn_ends

    monkeypatch.setattr(turn_ends, "of_template", lambda _: "</think>")
    with pytest.raises(AssertionError):
        assert said(reciting(tmp_path, True), "generate").split() == SAID
