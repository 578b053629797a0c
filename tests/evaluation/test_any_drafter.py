"""Every kind of drafter is evaluated: against what it says over given tokens, and live."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_medusa
import tiny_speculators
from conftest import (
    ByteTokenizer,
    D,
    V,
    engine_of,
    hidden_states,
    plainly,
    random_drafter,
    run,
    write_target,
)
from fitted_drafters import heads, speculator
from mlx.utils import tree_flatten
from tiny_chat import write_tokenizer
from tiny_heads import said
from typer.testing import CliRunner

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)
from mlx_redrafter.api import Model
from mlx_redrafter.budget import yields
from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.cli import main as cli
from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters import Drafter, calibration
from mlx_redrafter.drafters.calibration import Calibration
from mlx_redrafter.drafters.eagle import Branches, Eagle, EagleConfig
from mlx_redrafter.drafters.model import DraftModel
from mlx_redrafter.evaluation import positions, walk
from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.evaluation.yields_record import TEMPERATURES, Answer, record, tabulate
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.models.config import RopeConfig
from mlx_redrafter.models.features import Chunk, Features
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

LENGTH, DEPTH = 14, 3  # as many levels as the tiny heads have
PROMPT = Prompt("a few words", "chat")


class Tokenizer(ByteTokenizer):
    """Bytes modulo the tiny vocabulary."""

    has_chat_template = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [byte % V for byte in text.encode()]


IDS = Tokenizer().encode(PROMPT.text)


def medusa(target: Decoder, folder: Path) -> Any:
    return tiny_medusa.loaded(folder, tiny_medusa.medusa_1(tiny_medusa.heads()), target)


def medusa_of_one_matrix(target: Decoder, folder: Path) -> Any:
    """TGI's: the target's own."""
    h = tiny_medusa.heads()
    config, _, file = tiny_medusa.medusa_1(h)
    return tiny_medusa.loaded(
        folder, (config, tiny_medusa.blocks(h, "{}.{}.linear.{}"), file), target
    )


def speculator_of(dialect: str) -> Callable[[Decoder, Path], Any]:
    return lambda target, folder: tiny_speculators.loaded(
        folder, *tiny_speculators.DIALECTS[dialect], target
    )


def eagle(*layers: int) -> Callable[[Decoder, Path], Any]:
    def make(target: Decoder, folder: Path) -> Eagle:
        config = EagleConfig(
            D, D, V, layers, 4, 2, 8, 48, 1e-5, RopeConfig(8),
            rows=V if layers else 0, draft_vocab_size=None,
        )  # fmt: skip
        mx.random.seed(3)
        head = Eagle(config)
        for name, value in tree_flatten(head.parameters()):
            if name.endswith("proj.weight") or name == "lm_head.weight":
                head.load_weights([(name, 4 * value)], strict=False)  # far from even
        return head.bind(target)

    return make


def small_model(target: Decoder, folder: Path) -> DraftModel:
    return DraftModel(load_model(write_target(folder, seed=11, num_hidden_layers=2)), V)


KINDS: dict[str, Callable[[Decoder, Path], Any]] = {
    "redrafter": lambda target, folder: random_drafter(target, cell="gru"),
    "medusa": medusa,
    "medusa-target": medusa_of_one_matrix,
    "mlp": speculator_of("ibm"),
    "mlp-tied": speculator_of("ibm-tied"),
    "lstm": speculator_of("arctic-lstm"),
    "eagle-3": eagle(0, 1, 2),
    "eagle-1": eagle(),
    "model": small_model,
}


def said_by(drafter: Any, target: Decoder, text: list[int], root: int) -> np.ndarray:
    """Logits of every level over true tokens, from the root at this place on: (DEPTH, V)."""
    if isinstance(drafter, DraftModel):
        hidden = hidden_states(drafter.model, text)[root : root + DEPTH]
        return np.array(drafter.logits(mx.array(hidden)))
    if not isinstance(drafter, Eagle):
        return said(drafter, hidden_states(target, text)[root - 1], text[root : root + DEPTH])
    tokens, capacity = mx.array(text[:root], mx.int32), capacity_for(len(text))
    positions, slots = mx.arange(root), mx.arange(capacity)
    run = Pass(new_caches(target.caches, capacity, target.dtype), mx.array([0]))
    mask = slots[None] <= positions[:, None]
    layers = drafter.features
    hidden, outputs = target(tokens, positions, mask, slots, run, layers)
    read = Features(hidden, layers, outputs)
    own = Pass(new_caches(drafter.caches, capacity, target.dtype), mx.array([0]))
    drafter.absorb(Chunk(tokens, mx.array(text[1 : root + 1], mx.int32), positions, read), own)
    cell = Branches(drafter, own.caches[0], mx.array([root], mx.int32))
    state, fixed = cell.start(drafter.mixed(read.of(layers))[-1])
    rows = []
    for token in text[root : root + DEPTH]:
        logits, state = cell.step(mx.array([token], mx.int32), state, fixed)
        rows.append(np.array(logits)[0])
    return np.stack(rows)


def noise_at(position: int, temp: float) -> np.ndarray:
    """The draw's at this position and the following ones: (DEPTH, V)."""
    known = {"seed": mx.array([0], mx.uint32), "temp": mx.array(temp)}
    draw = sampling.draw(known, mx.array([position], mx.int32), DEPTH)
    assert draw is not None
    return np.concatenate([np.array(draw.noise(k, mx.arange(V))) for k in range(DEPTH)])


def model_of(target: Decoder, drafter: Drafter, folder: Path | None = None) -> Model:
    folder = folder or Path("somewhere")
    return Model.of("tiny", folder, target, drafter, folder, compiled=False)


def answers_of(target: Decoder, drafter: Drafter, depth: int = DEPTH) -> list[Answer]:
    tokenizer: Any = Tokenizer()
    found = list(record(model_of(target, drafter), tokenizer, [PROMPT], LENGTH, depth=depth))
    assert [answer.temp for answer in found] == list(TEMPERATURES)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_first_choices_are_those_over_true_tokens(
    target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As they are drawn, and as every kind is calibrated; a greedy one is not."""
    drafter = KINDS[kind](target, tmp_path)
    drafter.calibration = trust = Calibration(sharpness=1.5, noise=0.6, share=0.8)

    def right(answer: Answer) -> bool:
        text = [*IDS, *answer.tokens]
        for i in range(LENGTH - DEPTH):
            logits = said_by(drafter, target, text, len(IDS) - 1 + i)
            scaled, share = logits.astype(np.float64), 1.0
            if answer.temp:
                noise = noise_at(len(IDS) + i, answer.temp)
                scaled = trust.sharpness * (scaled + trust.noise * answer.temp * noise)
                share = trust.share
            likely = np.exp(scaled - scaled.max(-1, keepdims=True))
            best = share * (likely / likely.sum(-1, keepdims=True)).max(-1)
            if answer.said.picks[i].tolist() != scaled.argmax(-1).tolist():
                return False
            if not np.allclose(answer.said.probability[i], best, atol=1e-4):
                return False
        return bool(answer.said.led[: LENGTH - DEPTH].all())

    assert all(map(right, answers_of(target, drafter)))
    if kind not in ("redrafter", "eagle-3"):
        return  # the mistakes are the same for all
    with monkeypatch.context() as patch:
        patch.setattr(walk, "_FAR", 0.0)
        assert not any(map(right, answers_of(target, drafter)))
    with monkeypatch.context() as patch:
        commit = type(drafter).commit
        stale = lambda self, state, done: (commit(self, state, done), state)[1]  # noqa: E731
        patch.setattr(type(drafter), "commit", stale)
        assert not any(map(right, answers_of(target, drafter)))


def itself(target: Decoder, folder: Path, text: list[int]) -> DraftModel:
    """Right wherever its noise is the target's."""
    return DraftModel(target, V)


@pytest.mark.parametrize("make", [heads, speculator("mlp"), speculator("lstm"), itself])
def test_recorded_steps_are_those_of_decoding(
    target: Decoder, tmp_path: Path, make: Callable[..., Drafter]
) -> None:
    text = plainly(target, IDS, LENGTH + 5)
    drafter = make(target, tmp_path, IDS + text)
    engine = engine_of(target, drafter, compiled=False)
    answers = answers_of(target, drafter)
    for answer in answers:
        for shape in (TreeShape(1, 3, 4, lookup=7), TreeShape(3, 3, 8, lookup=7)):
            stats = DraftStats()
            params = SamplingParams(temp=answer.temp)
            again = run(engine, IDS, params, shape, LENGTH, stats=stats)
            assert again == answer.tokens and answer.steps(shape) == stats.steps
    for answer in answers if make is itself else answers[:1]:  # the others know the greedy text
        assert answer.steps(TreeShape(1, 3, 4, lookup=7)) <= LENGTH / 3, "the drafts are right"
    assert tabulate(answers).tokens(TreeShape(1, 3, 4, lookup=7), sampled=False) > 3


def test_levels_that_a_drafter_does_not_have_are_left_out(target: Decoder, tmp_path: Path) -> None:
    text = plainly(target, IDS, LENGTH + 5)
    model = model_of(target, heads(target, tmp_path, IDS + text), tmp_path)
    found = positions.evaluate(model, Tokenizer(), [PROMPT], max_tokens=LENGTH)  # type: ignore[arg-type]
    greedy = next(row for row in found.agreement if row.temp == 0)
    assert [d.calibration.agreement for d in greedy.depths] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["medusa", "lstm"])
def test_the_command_records(tmp_path: Path, kind: str) -> None:
    """Live and along answers, for any kind; and the policy reads what was recorded."""
    model, place = write_target(tmp_path / "model"), tmp_path / "heads"
    write_tokenizer(model)
    KINDS[kind](load_model(model), place)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "ba be", "category": "chat"}))

    def invoke(*more: str) -> Any:
        given = ["bench", "acceptance", "-m", str(model), "--max-tokens", "6"]
        given += ["--prompts", str(tmp_path / "prompts.jsonl"), *more]
        return CliRunner().invoke(cli.app, given)

    refused = invoke("--record")
    assert refused.exit_code == 1 and "name it with --drafter" in refused.stderr
    live = invoke("-d", str(place), "--json")
    assert live.exit_code == 0, live.output
    assert "teacher_forced" not in json.loads(live.stdout)
    assert not (place / yields.FILE).exists()
    recorded = invoke("-d", str(place), "--record", "--json")
    assert recorded.exit_code == 0, recorded.output
    found = json.loads(recorded.stdout)
    assert [row["tokens"] for row in found["rows"]] == [
        row["tokens"] for row in json.loads(live.stdout)["rows"]
    ]
    assert {row["temp"] for row in found["teacher_forced"]} == {0.0, 0.8}
    written = positions.read(place)
    assert written["teacher_forced"] == found["teacher_forced"]
    assert written["calibration"]["fitted"] == found["fitted"]
    assert calibration.read(place).share == found["fitted"]["share"]
    assert yields.load(place).table.keys() == {False, True}
    assert json.loads((place / yields.FILE).read_text())["greedy"].keys() == {
        f"{width}x{depth}" for width, depth in yields.BEAMS
    }
    shown = invoke("-d", str(place), "--record")
    assert "First choices that are right" in shown.stdout and yields.FILE in shown.stderr
    assert "fitted to 1 answers: sharpness" in " ".join(shown.stderr.split())


def test_a_folder_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, place = write_target(tmp_path / "model"), tmp_path / "heads"
    write_tokenizer(model)
    medusa(load_model(model), place)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != place)
    given = ["bench", "acceptance", "-m", str(model), "-d", str(place), "--record"]
    refused = CliRunner().invoke(cli.app, given)
    assert refused.exit_code == 1 and "nothing can be written into" in refused.stderr
