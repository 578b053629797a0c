"""How often a drafter's first choice is the model's own next token, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import over_text
import pytest
from conftest import D, Oracle, V, hidden_states, plainly, prompt_of, random_drafter
from tiny_chat import WORDS, write_chat_model
from tiny_heads import fitted as fit_rows
from tiny_heads import write
from typer.testing import CliRunner

from mlx_redrafter.cache.layer import Pass
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cli import main as cli
from mlx_redrafter.decoding import step
from mlx_redrafter.drafters import Ask, loading, rollout
from mlx_redrafter.drafters.eagle import Eagle, EagleConfig
from mlx_redrafter.drafters.loading import Kind
from mlx_redrafter.drafters.model import DraftModel
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.evaluation import selfcheck
from mlx_redrafter.evaluation.selfcheck import Along, Reading, agreement, read, settle
from mlx_redrafter.models import Decoder, RopeConfig, load_model
from mlx_redrafter.models.weights import parameters
from mlx_redrafter.prefill.reading import read as prefill
from mlx_redrafter.text.tokenizer import load_tokenizer
from mlx_redrafter.tree.shape import TreeShape

START = 9


@pytest.fixture(scope="module")
def text(target: Decoder) -> list[int]:
    """A prompt and what the model writes after it."""
    prompt = prompt_of(START)
    return prompt + plainly(target, prompt, 41)


@pytest.fixture(scope="module")
def reading(target: Decoder, text: list[int]) -> Reading:
    """Of all but the last token, which is the model's own next one."""
    return read(target, text[:-1], start=START)


def test_who_knows_the_answer_agrees_everywhere(
    target: Decoder, text: list[int], reading: Reading
) -> None:
    assert reading.choices[START - 1 :].tolist() == text[START:]
    for ranks, share in [((0,), 1.0), ((0, 1), 0.5), ((1,), 0.0), ((9,), 0.0)]:
        found = agreement(Oracle(target, [text], ranks), reading)
        assert found == (share, len(text) - 1 - START)


def test_the_prompt_does_not_count(target: Decoder, text: list[int], reading: Reading) -> None:
    """It is not what the model would have written."""
    knowing = Oracle(target, [text])
    assert agreement(knowing, reading._replace(start=1))[0] < 1
    assert agreement(knowing, reading)[0] == 1


def test_a_position_off_is_no_agreement(target: Decoder, text: list[int], reading: Reading) -> None:
    """A drafter that drafts the root itself, and a comparison with the token before."""
    assert agreement(Late(target, [text]), reading)[0] < 0.2
    moved = mx.concatenate([reading.choices[:1], reading.choices[:-1]])
    assert agreement(Oracle(target, [text]), reading._replace(choices=moved))[0] < 0.2


class Late(Oracle):
    """Drafts for the place that it reads, not for the one behind the root."""

    def step(self, tokens: mx.array, state: mx.array, fixed: mx.array) -> tuple[mx.array, mx.array]:
        return super().step(tokens, state - 1, fixed)


@pytest.mark.parametrize("layers", [(), (0, 2)])
@pytest.mark.parametrize("size", [None, 40])
def test_first_choices_are_those_of_one_pass(
    target: Decoder, text: list[int], layers: tuple[int, ...], size: int | None
) -> None:
    drafter = random_drafter(target, context_layers=layers, draft_vocab_size=size)
    along = read(target, text, layers)
    contexts = drafter.context(along.read.of(layers))[:-1]
    (logits,) = over_text.logits(drafter, contexts, along.tokens[1:, None])
    expected = drafter.token_ids(mx.argmax(logits, axis=-1))
    found = rollout.first_choices(drafter, along.read, along.tokens)
    assert found.tolist() == expected.tolist()
    assert len(set(found.tolist())) > 5


def test_a_drafter_with_rows_per_position_sees_nothing_behind_its_root(
    target: Decoder, target_folder: Path, reading: Reading
) -> None:
    """The target itself as the drafter is always right; a head says what it says of a prompt."""
    itself = loading.load_drafter(target_folder, target)
    assert isinstance(itself, DraftModel)
    assert agreement(itself, reading)[0] == 1
    assert agreement(itself, read(target, prompt_of(200), start=1))[0] == 1
    layers = (0, 2)
    head = eagle(layers).bind(target)
    tokens = prompt_of(40)
    whole = read(target, tokens, layers)
    found = rollout.first_choices(head, whole.read, whole.tokens).tolist()
    alone = [
        rollout.first_choices(head, part.read, part.tokens).tolist()[-1]
        for part in (read(target, tokens[:n], layers) for n in range(2, 41))
    ]
    assert found == alone and len(set(found)) > 5
    assert [drafted(target, head, tokens[:n]) for n in range(2, 41)] == found


def drafted(target: Decoder, head: Eagle, tokens: list[int]) -> int:
    """What it drafts when a prompt was read as for an answer."""
    session = Session().open([*target.caches, *head.caches], 128, target.dtype)
    absorb = step.absorbing([head])
    seen = prefill(target, tokens, session, 16, layers=head.features, absorb=absorb)
    at = mx.array([len(tokens) - 1], mx.int32)
    own = Pass(session.caches[len(target.caches) :], at)
    ask = Ask(mx.array(tokens[-1:], mx.int32), at, None, TreeShape.chain(1), None, own)
    return int(head.propose(head.begin(seen), ask)[-1].paths[-1, 1].item())


def eagle(layers: tuple[int, ...], **more: Any) -> Eagle:
    """A random EAGLE-3 head that has the target's output rows, once it is bound."""
    mx.random.seed(3)
    head = Eagle(EagleConfig(D, D, V, layers, 4, 2, 8, 48, 1e-5, RopeConfig(dims=8), **more))
    head.midlayer.hidden_norm.weight = mx.random.normal((D,))
    return head


class Stored:
    """An `Along` of a text of the test's own."""

    def __init__(self, target: Decoder, text: Sequence[int]) -> None:
        self.target, self._text = target, text

    def read(self, layers: Sequence[int]) -> Reading:
        return read(self.target, self._text, layers, START)


@pytest.fixture
def settled(
    target: Decoder, text: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Settle a folder whose drafter is as good as its config.json says; the config afterwards."""

    def load(folder: Path, target: Decoder) -> Oracle:
        ranks = json.loads((folder / "config.json").read_text()).get("ranks", (1,))
        if not ranks:
            raise DrafterError("no such layer")
        return Oracle(target, [text], ranks)

    def settled(alternatives: list[Mapping[str, Any]]) -> tuple[selfcheck.Fit, dict[str, Any]]:
        known = Kind(load, lambda *_: None, alternatives=lambda raw: alternatives)
        monkeypatch.setitem(loading.DRAFTERS, "mine", known)
        write(tmp_path, {"model_type": "mine", "more": 1}, {"x": np.ones(1)})
        fit = settle(tmp_path, Stored(target, text[:-1]))  # type: ignore[arg-type]
        return fit, json.loads((tmp_path / "config.json").read_text())

    return settled


def test_the_best_reading_of_the_files_is_kept(settled: Callable[..., Any]) -> None:
    best = {"ranks": [0]}
    for alternatives in ([{}, best, {"ranks": [0, 1]}], [best, {"ranks": []}, {}]):
        fit, config = settled(alternatives)
        assert (fit.agreement, fit.chosen, fit.tried) == (1.0, best, 3)
        assert config == {"model_type": "mine", "more": 1, **best}
        assert str(fit).endswith('positions; the best of 3 readings of its files: {"ranks": [0]}')
    fit, config = settled([{}, {"ranks": [9]}])  # equally bad: as the files stand
    assert (fit.agreement, config) == (0.0, {"model_type": "mine", "more": 1})
    fit, config = settled([{}])
    assert str(fit) == "the drafter's first choice is the model's next token at 0% of 40 positions"
    with pytest.raises(DrafterError, match="no such layer"):
        settled([{"ranks": []}, {"ranks": []}])


def test_what_an_eagle_head_leaves_open_is_settled(
    target: Decoder, text: list[int], tmp_path: Path
) -> None:
    """Its files say neither what its layers' numbers count nor which norm comes first."""
    block = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "hidden_size": D, "vocab_size": V, **block,
        "intermediate_size": 48, "rms_norm_eps": 1e-5,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]},
    }  # fmt: skip
    along = Stored(target, text[: START + 25])
    head = eagle((0, 1), norm_before_residual=True)
    weights = {name: np.array(w) for name, w in parameters(head).items()}
    head.bind(target)
    reading = along.read((0, 1))
    rows: list[np.ndarray] = []

    def record(x: mx.array) -> mx.array:
        rows.append(np.array(x)[0])
        return mx.zeros((1, V))

    head._output = record
    rollout.first_choices(head, reading.read, reading.tokens)
    tokens = reading.choices[START:].tolist()
    weights["lm_head.weight"] = fit_rows(np.stack(rows)[START - 1 :], tokens)
    folder = write(tmp_path / "head", config, weights)
    as_it_stands = selfcheck.check(folder, along)  # type: ignore[arg-type]
    fit = settle(folder, along)  # type: ignore[arg-type]
    assert fit.tried == 4 and fit.agreement == 1 > as_it_stands.agreement
    chosen = {"feature_layers_are": "inputs", "norm_before_residual": True}
    assert fit.chosen == chosen
    assert json.loads((folder / "config.json").read_text()) == {**config, **chosen}
    assert selfcheck.check(folder, along).agreement == 1  # type: ignore[arg-type]


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(selfcheck, "LONGEST", 24)
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: False)
    return write_chat_model(tmp_path / "chat")


def heads(folder: Path, output: np.ndarray) -> Path:
    """A Medusa head that multiplies the hidden state with a matrix (V, D)."""
    weights = {"0.0.linear.weight": np.zeros((D, D), np.float32), "0.1.weight": output}
    weights["0.0.linear.bias"] = np.zeros(D, np.float32)
    return write(folder, {}, weights, "medusa_lm_head.safetensors")


def fitted(chat: Path) -> np.ndarray:
    """The matrix that says what the model will, along the answer."""
    along = Along(load_model(chat), load_tokenizer(chat)).read(())
    assert along.tokens.size - along.start == 24
    tokens = along.tokens.tolist()
    rows = hidden_states(load_model(chat), tokens)[along.start - 1 : -1]
    wanted = np.eye(len(WORDS))[np.array(along.choices)[along.start :]]
    return np.linalg.lstsq(rows, 100 * wanted, rcond=None)[0].T.astype(np.float32)


def said(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return result


def test_convert_and_info_say_how_well_a_head_fits(chat: Path, tmp_path: Path) -> None:
    line = "the drafter's first choice is the model's next token at {} of 24 positions"
    good, bad = fitted(chat), np.ones((len(WORDS), D), np.float32)
    for name, output, share in (("good", good, "100%"), ("bad", bad, "0%")):
        source, out = heads(tmp_path / name, output), tmp_path / f"{name}-out"
        shown = said("convert", source, "--out", out, "--target", chat, "--dtype", "float32")
        assert f"note: {line.format(share)}\n" in shown.stdout
        told = said("info", chat, "--drafter", out, "--self-check")
        assert line.format(share) in " ".join(told.stdout.split())
        for stderr in (shown.stderr, told.stderr):
            assert stderr.startswith(f"warning: this head hardly fits {chat}: ") is (name == "bad")
            assert f"another head: mlx-redrafter drafters {chat}" in stderr or name == "good"
    given = ["info", chat, "-d", tmp_path / "good-out", "--json"]
    assert json.loads(said(*given, "--self-check").stdout)["drafter"]["agreement"] == 1
    assert "agreement" not in json.loads(said(*given).stdout)["drafter"]


def test_convert_can_do_without(chat: Path, tmp_path: Path) -> None:
    source = heads(tmp_path / "heads", fitted(chat))
    plain = said("convert", source, "--out", tmp_path / "a", "--target", chat, "--no-self-check")
    assert "first choice" not in plain.stdout
    assert "first choice" not in said("convert", source, "--out", tmp_path / "b").stdout
    (chat / "tokenizer.json").unlink()
    result = said("convert", source, "--out", tmp_path / "c", "--target", chat)
    assert f"note: the drafter was not compared with {chat}: " in result.stdout


def test_the_stored_answer_is_of_about_the_length_that_it_should_be() -> None:
    stored = json.loads(selfcheck.FILE.read_text())
    assert stored.keys() == {"question", "answer"}
    assert 200 < len(stored["answer"].split()) < 400
