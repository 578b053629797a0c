"""Evaluation of a drafter: on a target and drafters whose agreement is known beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from conftest import ByteTokenizer, write_target

from mlx_redrafter.api import Model
from mlx_redrafter.budget import yields
from mlx_redrafter.drafters import calibration
from mlx_redrafter.drafters.loading import save_drafter
from mlx_redrafter.drafters.recurrent import ReDrafter, ReDrafterConfig
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation import figures, walk
from mlx_redrafter.evaluation import positions as evaluate
from mlx_redrafter.evaluation.agreement import Agreement, Calibration, Depth, Tally, of_answers
from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.evaluation.yields_record import record
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.training import card, plots
from mlx_redrafter.training.config import TrainConfig
from mlx_redrafter.training.shards import Conversation
from mlx_redrafter.tree.shape import TreeShape

V = 32  # also the hidden size: embeddings are unit vectors
USED = 29  # tokens of the texts; the others are never written
NEXT = [*((np.arange(USED) + 7) % USED), *range(USED, V)]  # the text is one long cycle
PROMPTS = [Prompt("ab", "chat"), Prompt("hello", "code"), Prompt("why", "chat")]
LENGTH = 12


class Tokenizer(ByteTokenizer):
    """Bytes modulo the few tokens there are."""

    has_chat_template = False
    BOS, EOS = 30, 31
    eos_token_id = EOS

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [byte % USED for byte in text.encode()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose next token is NEXT of the last one, with a logit far above the others."""
    folder = write_target(tmp_path_factory.mktemp("cycle"), vocab_size=V, hidden_size=V)
    file = str(folder / "model.safetensors")
    weights: dict[str, Any] = dict(mx.load(file))  # type: ignore[arg-type]
    for name, value in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(value)
    weights["model.embed_tokens.weight"] = mx.eye(V)
    weights["model.norm.weight"] = mx.ones(V)
    weights["lm_head.weight"] = follow(NEXT)
    mx.save_safetensors(file, {k: mx.array(np.array(v)) for k, v in weights.items()})
    return folder


@pytest.fixture(scope="module")
def target(folder: Path) -> Decoder:
    return load_model(folder)


def follow(after: list[int]) -> mx.array:
    """(V, V) output rows that give after[t] a logit of 20 times the t-th input."""
    rows = np.zeros((V, V), np.float32)
    rows[after, np.arange(V)] = 20
    return mx.array(rows)


def drafter_of(
    target: Decoder, by_token: mx.array, by_context: mx.array | None = None, **config: Any
) -> ReDrafter:
    """A drafter without memory whose logits are rows of its last token plus rows of its context."""
    drafter = ReDrafter(
        ReDrafterConfig(V, V, exit_dim=2 * V, num_draft_layers=0, cell="elman", **config)
    )
    by_context = mx.zeros_like(by_token) if by_context is None else by_context
    drafter.rnn_w.weight = mx.eye(V)
    drafter.rnn_u.weight, drafter.rnn_u.bias = mx.zeros((V, V)), mx.zeros(V)
    drafter.lm_head[-1].weight = mx.concatenate([by_context, by_token], axis=1)
    return drafter.bind(target)


def perfect(target: Decoder) -> ReDrafter:
    return drafter_of(target, follow(NEXT))


def compared(target: Decoder, drafter: ReDrafter) -> list[Agreement]:
    model = Model.of("cycle", Path(), target, drafter, compiled=False)
    return of_answers(list(record(model, Tokenizer(), PROMPTS, LENGTH, depth=3)))  # type: ignore[arg-type]


def shares(row: Agreement) -> list[float]:
    return [d.calibration.agreement for d in row.depths]


def texts() -> list[list[int]]:
    """The answers, which are known without a model."""
    result = []
    for prompt in PROMPTS:
        text = [Tokenizer().encode(prompt.text)[-1]]
        for _ in range(LENGTH):
            text.append(int(NEXT[text[-1]]))
        result.append(text[1:])
    return result


def test_a_drafter_that_is_right_agrees_everywhere(target: Decoder) -> None:
    rows = compared(target, perfect(target))
    assert [(r.temp, r.group) for r in rows] == [
        (temp, group) for temp in (0.0, 0.8) for group in ("chat", "code", "all")
    ]
    for row in rows:
        answers = {"chat": 2, "code": 1, "all": 3}[row.group]
        assert shares(row) == [1, 1, 1]
        assert [d.conditional for d in row.depths] == [1, 1, 1]
        # Of n tokens the k-th draft can be compared at n + 1 - k places.
        assert [d.calibration.count for d in row.depths] == [
            answers * (LENGTH + 1 - k) for k in (1, 2, 3)
        ]
        assert row.error < 1e-3


def test_a_drafter_that_is_one_token_ahead_never_agrees(
    target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = drafter_of(target, follow([NEXT[t] for t in NEXT]))
    row = compared(target, drafter)[-1]
    assert shares(row) == [0, 0, 0]
    assert row.error > 0.99  # it is sure of itself, and wrong
    # It is led along the answers all the same, unless nothing leads it.
    assert [d.calibration.count for d in row.depths] == [3 * (LENGTH + 1 - k) for k in (1, 2, 3)]
    monkeypatch.setattr(walk, "_FAR", 0.0)
    astray = compared(target, drafter)[-1]
    assert [d.calibration.count for d in astray.depths] == [3 * LENGTH, 0, 0]


@pytest.mark.parametrize("shift", [-1, 1])
def test_comparing_with_shifted_targets_is_noticed(
    target: Decoder, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    right = walk.windows
    monkeypatch.setattr(walk, "windows", lambda *given: np.roll(right(*given), shift, axis=0))
    assert max(shares(compared(target, perfect(target))[-1])) == 0


def test_features_belong_to_the_token_they_predicted(target: Decoder) -> None:
    """A drafter that knows only its context is right once: two tokens after what it saw. What it
    saw in a prompt is no part of the cycle."""
    after_next = follow([NEXT[t] for t in NEXT])
    drafter = drafter_of(target, mx.zeros((V, V)), by_context=after_next)
    row = compared(target, drafter)[-1]
    assert shares(row) == [pytest.approx((LENGTH - 1) / LENGTH), 0, 0]
    assert row.depths[1].conditional == 0


def test_a_token_outside_the_draft_vocabulary_is_wrong(target: Decoder) -> None:
    """And what would be said behind it does not count."""
    ids = np.array([t for t in range(V) if t % 4])
    rows = follow(NEXT)[mx.array(ids)]
    drafter = drafter_of(target, rows, draft_vocab_size=len(ids))
    drafter.draft_vocab = mx.array(ids.astype(np.int32))
    known = [[t % 4 != 0 for t in text] for text in texts()]
    row = compared(target, drafter.bind(target))[-1]
    for k in (1, 2, 3):
        runs = [line[i : i + k] for line in known for i in range(LENGTH + 1 - k)]
        hits = [run[-1] for run in runs if all(run[:-1])]
        assert 0 < np.mean(hits) < 1 and row.depths[k - 1].calibration.count == len(hits)
        assert shares(row)[k - 1] == pytest.approx(np.mean(hits))
        assert row.depths[k - 1].conditional == pytest.approx(np.mean(hits))


def test_windows() -> None:
    assert walk.windows([5, 6, 7], 3).tolist() == [[5, 6, 7], [6, 7, -1], [7, -1, -1]]
    assert walk.windows([5], 2).tolist() == [[5, -1]]


def test_calibration_of_a_known_table() -> None:
    """Bin 2: 10 of mean 0.25, 4 right. Bin 9: 30 of mean 0.9, 24 right."""
    table = Calibration(
        (0, 0, 10, 0, 0, 0, 0, 0, 0, 30), (0, 0, 2.5, 0, 0, 0, 0, 0, 0, 27.0),
        (0, 0, 4, 0, 0, 0, 0, 0, 0, 24),
    )  # fmt: skip
    assert table.error == pytest.approx((10 * 0.15 + 30 * 0.1) / 40)
    assert table.agreement == pytest.approx(0.7)
    values = table.as_dict()
    assert values["probability"][2] == 0.25 and values["agreed"][9] == 0.8
    assert values["probability"][0] is None
    # Another depth that errs the other way does not make up for it.
    opposite = Calibration(table.counts, table.mass, (0, 0, 1, 0, 0, 0, 0, 0, 0, 30))
    depths = tuple(Depth(k, 1, 1, c) for k, c in ((1, table), (2, opposite)))
    both = Agreement("all", 0.0, depths)
    assert both.error == pytest.approx((table.error + opposite.error) / 2)


def test_probabilities_go_to_their_bins() -> None:
    tally = Tally(1)
    probability = np.array([[0.05], [0.11], [0.19], [1.0], [0.5]])
    agreed = np.array([[True], [False], [True], [True], [True]])
    tally.add(probability, agreed, np.array([[True]] * 4 + [[False]]))
    (depth,) = tally.result("all", 0.0).depths
    assert depth.calibration.counts == (1, 2, 0, 0, 0, 0, 0, 0, 0, 1)
    assert depth.calibration.hits == (1, 1, 0, 0, 0, 0, 0, 0, 0, 1)
    assert depth.calibration.mass == pytest.approx((0.05, 0.3, *[0] * 7, 1.0))


@pytest.fixture(scope="module")
def evaluated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter's folder with evaluation, log and plots."""
    target = load_model(folder)
    drafter = perfect(target)
    out = tmp_path_factory.mktemp("made") / "my-drafter"
    save_drafter(out, drafter)
    model = Model.of(str(folder), folder, target, drafter, out, compiled=False)
    calls: list[None] = []
    found = evaluate.evaluate(
        model, Tokenizer(), PROMPTS, max_tokens=LENGTH, on_answer=lambda: calls.append(None)
    )
    assert len(calls) == evaluate.answers(len(PROMPTS))
    evaluate.write(out, found)
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log_rows()))
    assert [f.name for f in plots.write_all(out, out / "log.jsonl")] == [
        plots.CURVES, plots.ACCEPTANCE, plots.CALIBRATION
    ]  # fmt: skip
    return out


def log_rows(steps: int = 30) -> list[dict[str, Any]]:
    rows = []
    for step in range(10, 10 * steps, 10):
        agreement = [0.5 - 1 / step, 0.3]
        row = {"step": step, "positions": step * 1024, "loss": 1 + 10 / step,
               "agreement": agreement, "rate": 1e-3, "seconds": float(step)}  # fmt: skip
        rows.append(
            {**row, "held_out": {"loss": 2.0, "agreement": agreement}} if step % 50 == 0 else row
        )
    return [*rows, rows[-1]]  # a resumed run logs a step again


def test_the_live_result_of_a_perfect_drafter(evaluated: Path) -> None:
    found = evaluate.read(evaluated)
    chains = [r for r in found["live"] if r["shape"] == str(TreeShape.chain(4))]
    assert {r["group"] for r in chains} == {"chat", "code", "all"}
    assert {r["temp"] for r in chains} == {0.0, 0.8}
    assert all(r["tokens_per_step"] > 3.9 and r["accepted"] for r in chains)
    assert [d["depth"] for d in found["calibration"]["tables"][0]["depths"]] == [1, 2, 3, 4, 5]
    assert found["conditions"]["prompts"] == {"chat": 2, "code": 1}
    assert {"dtype", "blas", "mlx", "max_tokens"} <= found["conditions"].keys()
    assert found["conditions"]["recorded"] == 3
    fit = found["calibration"]["fitted"]
    assert calibration.read(evaluated) == calibration.Calibration(
        fit["sharpness"], fit["noise"], fit["share"]
    )
    for sampled in (False, True):
        assert yields.load(evaluated).tokens(TreeShape(1, 3, 4, lookup=yields.LOOKUP), sampled) == 4


def test_plots_are_pictures(evaluated: Path) -> None:
    for name in (plots.CURVES, plots.ACCEPTANCE, plots.CALIBRATION):
        assert (evaluated / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_one_warning(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    assert plots.write_all(evaluated, evaluated / "log.jsonl") == []
    assert capsys.readouterr().err.count("mlx-redrafter[plot]") == 1
    with pytest.raises(OptionError, match="matplotlib"):
        plots.curves(evaluated / "log.jsonl", tmp_path / "x.png")


def test_the_card_has_all_its_parts(evaluated: Path) -> None:
    config = TrainConfig(model="org/model", out=Path("/home/somebody/my-drafter"))
    recipe = card.Recipe.of(
        [Conversation([1], [2, 3], 0.0), Conversation([1], [4], 0.8), Conversation([5], [6], 0.8)],
        positions=12_345_678,
    )
    assert recipe == card.Recipe(2, {0.0: 1, 0.8: 2}, 4, 12_345_678)
    made, measured = "mlx-redrafter train --model org/model", "mlx-redrafter train evaluate"
    text = card.render(evaluated, config, recipe, made_by=made, measured_by=measured)
    assert text.startswith("---\nlibrary_name: mlx\nbase_model: org/model\ntags:\n- mlx\n")
    size = (evaluated / "model.safetensors").stat().st_size
    weights = 2 * V * V + V + V * 2 * V  # two matrices of the cell and a bias, and the output
    for part in (
        "\n# ReDrafter for org/model\n", "| chain of 4 | 0.8 |", "| beam 3x4, 8 nodes | 0 |",
        "depth 4", "| chat | 0 | 24 | 1.00 |", "Fitted to the answers to 1 prompts",
        "| before | 24 | 1.00 | 1.00 | 0.000 |", "| after | 24 |", "ECE by draft position",
        f"{size:,} bytes",
        f"| read per draft step | {weights:,} parameters |", "12,345,678", "0.8 (67%)",
        "learning_rate: 0.001", 'out: "my-drafter"', f"```\n{made}\n```", f"```\n{measured}\n```",
        "## Limits", "chat template", "| dtype | float32 |", "3 prompts (2 chat, 1 code)",
        f"({plots.CALIBRATION})", f"({plots.CURVES})", f"({plots.ACCEPTANCE})",
    ):  # fmt: skip
        assert part in text, part
    assert "/home/" not in text and str(evaluated.parent) not in text


@pytest.mark.parametrize(
    "model, base",
    [
        ("smollm2-135m", "base_model: HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("./models/mine", None),
        ("/a/b", None),
    ],
)
def test_only_a_model_of_the_hub_is_a_base_model(model: str, base: str | None) -> None:
    lines = card._front_matter(model).splitlines()
    assert [line for line in lines if line.startswith("base_model")] == ([base] if base else [])


def test_a_card_needs_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="evaluate the drafter first"):
        card.render(tmp_path, TrainConfig(), card.Recipe(1, {}, 1, 1), made_by="", measured_by="")


def test_there_must_be_a_drafter_and_prompts(target: Decoder, folder: Path) -> None:
    bare = Model.of("bare", folder, target, compiled=False)
    with pytest.raises(OptionError, match="no drafter"):
        evaluate.evaluate(bare, Tokenizer(), PROMPTS)  # type: ignore[arg-type]
    drafter = perfect(target)
    whole = Model.of("whole", folder, target, drafter, compiled=False)
    with pytest.raises(OptionError, match="no prompts"):
        evaluate.evaluate(whole, Tokenizer(), [])  # type: ignore[arg-type]
