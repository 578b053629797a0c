"""A tiny random model with a chat template that ends its turns: enough to train a drafter for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_target

from mlx_redrafter.errors import OptionError
from mlx_redrafter.training import folder as folders
from mlx_redrafter.training import imports, stages

SPECIAL = ["<|im_start|>", "<|im_end|>", "<unk>"]
WORDS = [*SPECIAL, "user", "assistant", "system", *(a + b for a in "bdfgk" for b in "aeiou")]
START, END = 0, 1
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def write_chat_model(folder: Path, template: str | None = TEMPLATE, **changes: Any) -> Path:
    """The model, with a tokenizer that knows WORDS; without a template it is a base model."""
    write_target(folder, vocab_size=len(WORDS), eos_token_id=END, **changes)
    write_tokenizer(folder, template)
    return folder


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    ids = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    if template is not None:
        content["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def words(*tokens: int) -> str:
    return " ".join(WORDS[t] for t in tokens)


SMALL: dict[str, Any] = {
    "answer_tokens": 300, "max_tokens": 16, "prompt_tokens": 16, "batch": 4, "positions": 128,
    "batch_positions": 32, "segment": 8, "candidates": 32, "draft_vocab_size": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat"))


def begin(out: Path, model: Path, **options: Any) -> stages.Run:
    given = {**SMALL, "model": str(model), "out": out, **options}
    return stages.open_run(*folders.settle(given))


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the answers of one uninterrupted run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    stages.answers(begin(out, model))
    return out


def contents(out: Path, *parts: str) -> dict[str, bytes]:
    files = (f for part in parts for f in (out / part).iterdir())
    return {f"{f.parent.name}/{f.name}": f.read_bytes() for f in files}


def lines_of(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(OptionError) as caught:
        work()
    return str(caught.value)


def stop_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """Ctrl-C at so manieth a call of a function."""
    real, left = getattr(module, name), [call]

    def counted(*arguments: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(module, name, counted)


def all_answers(out: Path) -> str:
    return "".join(f.read_text() for f in imports.split(out)[1])
