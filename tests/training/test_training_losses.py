"""The training loss and its gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_redrafter.drafters.recurrent import ReDrafter, ReDrafterConfig
from mlx_redrafter.drafters.rollout import head_inputs
from mlx_redrafter.training.losses import distillation

GOLDEN = Path(__file__).parents[1] / "support" / "golden" / "training.npz"


def loss_in_numpy(
    x: np.ndarray, p: np.ndarray, w: np.ndarray, acceptance: float
) -> tuple[float, np.ndarray]:
    q = np.exp(x - x.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    rows = -(p * np.log(q)).sum(1) + acceptance * (1 - np.minimum(p, q).sum(1))
    return float((w * rows).sum()), q


@pytest.mark.parametrize("acceptance", [0.0, 1.0, 2.5])
def test_loss_and_gradient(acceptance: float) -> None:
    random = np.random.default_rng(3)
    x = random.standard_normal((5, 11)) * 2
    p = random.dirichlet(np.ones(11), 5) * np.array([[1], [1], [0.9], [1], [0.5]])
    w = np.array([1.0, 0.5, 0.0, 2.0, 1.0])
    arrays = [mx.array(a, mx.float32) for a in (x, p, w, acceptance)]
    value, gradient = mx.value_and_grad(lambda z: distillation(z, *arrays[1:])[0])(arrays[0])
    expected, _ = loss_in_numpy(x, p, w, acceptance)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    step = 1e-6
    for i, j in np.ndindex(*x.shape):
        plus, minus = x.copy(), x.copy()
        plus[i, j] += step
        minus[i, j] -= step
        numeric = (
            loss_in_numpy(plus, p, w, acceptance)[0] - loss_in_numpy(minus, p, w, acceptance)[0]
        )
        assert gradient[i, j].item() == pytest.approx(numeric / step / 2, abs=1e-4)


def gradients_as_in_torch(shift: int = 0) -> tuple[float, dict[str, np.ndarray], dict[str, Any]]:
    """Loss and gradients of the recorded case; ``shift`` moves the targets by positions."""
    golden = dict(np.load(GOLDEN))
    targets = np.roll(golden["targets"], shift, axis=1)
    size, layers = golden["features"].shape[-1], golden["features"].shape[-2]
    drafter = ReDrafter(
        ReDrafterConfig(
            size, 50, exit_dim=size, cell="gru", initial_state="context",
            context_layers=tuple(range(layers)), draft_vocab_size=golden["targets"].shape[-1],
        )
    )  # fmt: skip
    names = {k.removeprefix("weight/"): mx.array(v) for k, v in golden.items() if "weight/" in k}
    drafter.load_weights(list(names.items()), strict=False)
    features = mx.array(golden["features"])
    runs, length = features.shape[:2]

    def loss(*_: Any) -> mx.array:
        flat = features.reshape(-1, layers, size)
        inner = tuple(flat[:, i] for i in range(layers))
        context = drafter.context(mx.concatenate(inner, axis=-1)).reshape(runs, length, -1)
        steps = len(targets)
        inputs = head_inputs(drafter, context, mx.array(golden["embeddings"]), steps)
        total = mx.array(0.0)
        for k, x in enumerate(inputs):
            weights = mx.array(golden["valid"][k].reshape(-1))
            made = distillation(
                x @ drafter.output_rows().T, mx.array(targets[k]), weights, mx.array(0.7)
            )
            total = total + 0.8**k * made[0]
        return total

    value, tree = nn.value_and_grad(drafter, loss)(drafter)
    found = {k: np.array(v) for k, v in tree_flatten(tree)}
    expected = {k.removeprefix("gradient/"): v for k, v in golden.items() if "gradient/" in k}
    return value.item() / float(golden["loss"]) - 1, found, expected


def test_gradients_are_those_of_pytorch() -> None:
    error, found, expected = gradients_as_in_torch()
    assert abs(error) < 1e-5
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_shifted_targets_fail_the_gradient_check() -> None:
    error, found, expected = gradients_as_in_torch(shift=1)
    assert abs(error) > 1e-3
    assert any(np.abs(found[name] - value).max() > 0.1 for name, value in expected.items())
