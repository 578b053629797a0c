"""The fit of a drafter's calibration: against a known truth, and what it asks a drafter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import ByteTokenizer, V, hidden_states, plainly, random_drafter
from tiny_heads import said

from mlx_redrafter.api import Model
from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters import UNFITTED, calibration
from mlx_redrafter.drafters.calibration import Calibration
from mlx_redrafter.drafters.loading import load_drafter, save_drafter
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.evaluation import calibrating
from mlx_redrafter.evaluation.calibrating import GRID, TEMP, Seen
from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.models import Decoder


class Tokenizer(ByteTokenizer):
    """Bytes modulo the tiny vocabulary."""

    has_chat_template = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [byte % V for byte in text.encode()]


def softmax(x: np.ndarray) -> np.ndarray:
    likely = np.exp(x - x.max(-1, keepdims=True))
    return likely / likely.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "truth", [Calibration(1.0, 0.85, 0.9), Calibration(1.6, 0.55, 0.75), Calibration(0.65, 1.0, 1)]
)
def test_known_numbers_are_found(truth: Calibration) -> None:
    """Choices drawn by what the drafter says under them. (A fit that takes no notice of tokens that
    cannot be drafted, or of all but the first choice, fails.)"""
    random = np.random.default_rng(3)
    logits, noise = random.normal(0, 2.5, (6000, 1, 12)), random.gumbel(0, 1, (6000, 1, 12))
    sharpness, weight = (
        np.array([[getattr(c, name)] for c in GRID]) for name in ("sharpness", "noise")
    )
    says = softmax(sharpness * (logits + weight * TEMP * noise))  # (n, S, 12)
    drawn = says[:, [g.sharpness == truth.sharpness and g.noise == truth.noise for g in GRID]]
    rest = 1 - truth.share * drawn[:, 0].sum(-1, keepdims=True)
    sums = np.concatenate([truth.share * drawn[:, 0], np.maximum(rest, 0)], axis=-1).cumsum(-1)
    chosen = (sums < random.random((6000, 1))).sum(-1)  # 12: nothing that it drafts
    right = np.take_along_axis(says, np.minimum(chosen, 11)[:, None, None], axis=-1)[..., 0]
    there = (chosen < 12)[:, None]
    hit = (says.argmax(-1) == chosen[:, None]) & there
    seen = Seen(says.max(-1), right * there, hit)
    found = calibrating.best(seen)
    assert (found.sharpness, found.noise) == (truth.sharpness, truth.noise)
    assert found.share == pytest.approx(truth.share, abs=0.03)
    before, after = (calibrating._table(seen, c) for c in (UNFITTED, found))
    assert after.error < 0.03 and after.error <= before.error


def test_every_setting_is_asked_with_the_answers_own_noise(target: Decoder) -> None:
    """(Noise of another position, a setting that is traced as another, or a raised
    token that is taken for what it seems, fails.)"""
    drafter, prompt = random_drafter(target, cell="gru"), Prompt("a few words", "chat")
    model = Model.of("tiny", Path(), target, drafter, compiled=False)
    tokenizer: Any = Tokenizer()
    (seen,) = calibrating._along(model, tokenizer, [prompt], 6, seed=4)
    assert drafter.calibration == UNFITTED
    ids = tokenizer.encode(prompt.text)
    tokens = plainly(target, ids, 6, SamplingParams(temp=TEMP, seed=4))
    text, known = [*ids, *tokens], {"seed": mx.array([4], mx.uint32), "temp": mx.array(TEMP)}
    hidden = hidden_states(target, text)
    for i, token in enumerate(tokens):
        root = len(ids) - 1 + i
        (logits,) = said(drafter, hidden[root - 1], text[root : root + 1])
        draw = sampling.draw(known, mx.array([root + 1], mx.int32), 1)
        assert draw is not None
        noise = np.array(draw.noise(0, mx.arange(V)))[0]
        for s, setting in enumerate(GRID):
            says = softmax(setting.sharpness * (logits + setting.noise * TEMP * noise))
            expected = says[token] if says[token] > says.max() * np.exp(-8.0) else 0.0
            assert seen.first[i, s] == pytest.approx(says.max(), abs=1e-4)
            assert seen.right[i, s] == pytest.approx(expected, rel=0.02)
            assert seen.hit[i, s] == (token == says.argmax())


def test_a_drafter_is_loaded_with_its_numbers(target: Decoder, tmp_path: Path) -> None:
    save_drafter(tmp_path, random_drafter(target, cell="gru"))
    assert load_drafter(tmp_path, target).calibration == UNFITTED
    fitted = Calibration(1.25, 0.7, 0.9)
    calibration.save(tmp_path, fitted)
    assert load_drafter(tmp_path, target).calibration == fitted
    for text in ("[]", "{", '{"noise": 0}', '{"share": 1.1}', '{"sharpness": "much"}', '{"x": 1}'):
        (tmp_path / calibration.FILE).write_text(text)
        with pytest.raises(DrafterError, match="delete it, or record it again"):
            load_drafter(tmp_path, target)
