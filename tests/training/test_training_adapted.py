"""Training for models that only mlx_lm has: every kind, from prompts to a drafter in use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from adapter_cases import TYPES, module_of, write_module
from conftest import SHAPES, engine_of, prompt_of, run
from tiny_chat import END, WORDS, begin, contents, lines_of, write_tokenizer

import convert
from mlx_redrafter.api import load
from mlx_redrafter.cli import info
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import ModelError
from mlx_redrafter.models import AdaptedModel, load_model
from mlx_redrafter.training import kinds, stages
from mlx_redrafter.training.config import Evaluating, TrainConfig
from mlx_redrafter.training.kinds import eagle, trainee


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


def chat_model(folder: Path, kind: str) -> Path:
    write_module(folder, kind, vocab_size=len(WORDS), eos_token_id=END)
    write_tokenizer(folder)
    return folder


@pytest.mark.filterwarnings("ignore:this head hardly fits")  # it saw a few tokens
# States alone; short convolutions and attention; a delta rule and experts.
@pytest.mark.parametrize(
    ("kind", "of"),
    [
        ("redrafter", "mamba2"), ("eagle3", "lfm2"),
        pytest.param("medusa", "lfm2", marks=pytest.mark.slow),
        pytest.param("eagle3", "qwen3_next", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_drafter_is_trained_measured_and_used(tmp_path: Path, kind: str, of: str) -> None:
    place, file = chat_model(tmp_path / "model", of), tmp_path / "prompts.jsonl"
    file.write_text(lines_of(*(" ".join(WORDS[6 + i :: 7]) for i in range(6))))
    out = tmp_path / "run"
    options = {"kind": kind, "prompts": file, "answer_tokens": 60, "rollout": 2}
    training = begin(out, place, **options)
    training.evaluating = Evaluating(prompts=1, max_tokens=3)
    assert isinstance(training.target, AdaptedModel)
    assert not training.writer.together
    for stage in stages.STAGES.values():
        stage(training)
    drafter = out / "drafter"
    assert {"README.md", "evaluation.json", "yields.json"} <= {f.name for f in drafter.iterdir()}
    facts = info.collect(str(place), str(drafter))["drafter"]
    assert facts["fits"]
    made = convert.convert(drafter, tmp_path / "again", target=place)
    assert any("first choice" in note for note in made.notes)

    model, _ = load(place, drafter)
    plain, prompt = engine_of(model.target, None, compiled=False), prompt_of(12)
    prompt = [token % len(WORDS) for token in prompt]
    drafting = engine_of(model.target, model.drafter, compiled=False)
    for params in (SamplingParams(), SamplingParams(temp=0.9, seed=3)):
        shape = SHAPES["beam-3x4-8"]
        assert run(drafting, prompt, params, shape, 16) == run(plain, prompt, params, None, 16)


def test_an_answer_that_was_begun_is_the_same_again(tmp_path: Path) -> None:
    """Seeds: the files of two runs are equal."""
    place, file = chat_model(tmp_path / "model", "mamba2"), tmp_path / "prompts.jsonl"
    file.write_text(lines_of("ba be", "bi bo bu", "do", "du fa fe"))
    for name in ("one", "two"):
        stages.answers(begin(tmp_path / name, place, prompts=file, answer_tokens=40))
    one, two = (contents(tmp_path / name, "answers", "features") for name in ("one", "two"))
    assert one == two and len(one) > 2


@pytest.mark.parametrize("of", ["mamba2", "lfm2", "qwen3_next"])
def test_what_is_copied_of_the_target(tmp_path: Path, of: str) -> None:
    """Head rows give its logits, the embedding its inputs, the norm what the head reads."""
    write_module(tmp_path, of)
    target = load_model(tmp_path)
    ids = mx.array([3, 9, 40])
    hidden = mx.random.normal((2, target.config.hidden_size))
    rows = target.scaled(hidden @ target.head_rows(ids).T)
    assert mx.allclose(rows, target.logits(hidden)[:, ids], atol=1e-4).item()
    assert target.embed(ids).shape == (3, target.config.hidden_size)
    head = eagle.EagleTrainee.shape_of(TrainConfig(kind="eagle3"), target.config)
    assert head.num_heads * head.head_dim <= 4 * target.config.hidden_size  # of a recurrence too
    first = trainee.first_rows(target, None, 8)
    assert first.shape == (target.config.vocab_size, 8)


@pytest.mark.parametrize("of", ["nanochat", "gemma3n", "kimi_k3"])
def test_what_cannot_be_trained_for_is_said_at_once(tmp_path: Path, of: str) -> None:
    """No norm of its own; outputs of another form; a last layer that is not all the head reads."""
    raw = TYPES[of]
    target = AdaptedModel(module_of(raw, lively=True), raw)
    with pytest.raises(ModelError, match=f"no drafter can be trained for model_type '{of}'"):
        kinds.of(TrainConfig())(target, TrainConfig())
