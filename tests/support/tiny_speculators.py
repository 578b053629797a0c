"""Tiny MLP and LSTM speculators in every layout, and what they say by plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conftest import D, V
from tiny_heads import Weights, noise, write

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)
from mlx_redrafter.drafters.loading import check_folder, load_drafter
from mlx_redrafter.drafters.speculator import GATES, Speculator
from mlx_redrafter.models import Decoder

N = 3
_erf = np.vectorize(math.erf)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + _erf(x / math.sqrt(2))) / 2


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def ibm(
    tied: bool, width: int = 64, seed: int = 0, **config: Any
) -> tuple[dict[str, Any], Weights]:
    """IBM's layout, with an index per level; a tied file holds what all levels share once."""
    rng = np.random.default_rng(seed)
    weights = {}
    for i in range(N):
        if i < (2 if tied else N):
            weights[f"proj.{i}.weight"] = noise(rng, width, D if i == 0 else width)
        if i < (1 if tied else N):
            weights[f"emb.{i}.weight"] = noise(rng, V, width)
            weights[f"ln.{i}.weight"] = 1 + noise(rng, width, scale=1.0)
            weights[f"ln.{i}.bias"] = noise(rng, width, scale=1.0)
            weights[f"head.{i}.weight"] = noise(rng, V, width, scale=3.0)
    known = {
        "model_type": "mlp_speculator", "architectures": ["MLPSpeculatorPreTrainedModel"],
        "emb_dim": D, "inner_dim": 0 if width == D else width, "n_predict": N, "vocab_size": V,
        "tie_weights": tied, "scale_input": True, "n_candidates": 5,
    }  # fmt: skip
    return {**known, **config}, weights


def arctic(method: str, width: int = 64, seed: int = 0, copies: bool = False) -> Any:
    """Arctic's layouts: sizes as text; the LSTM's embedding may be stored once more a gate."""
    config, weights = ibm(True, width, seed)
    size = str(width)
    config |= {
        "architectures": "ArcticLSTMSpeculatorPreTrainedModel", "input_hidden_dim": D,
        "emb_dim": size, "inner_dim": size, "proj_dim": size, "method": method,
        "tie_lstm_embs": True,
    }  # fmt: skip
    if method == "sum_rnn":
        parts = ("weight", "bias")
        renamed = {}
        for name, value in weights.items():
            part, number, last = name.split(".")
            renamed[f"speculator.{part}.{number}.{0}.{last}" if last in parts else name] = value
        return config, renamed
    rng = np.random.default_rng(seed)
    lstm = {"head.0.weight": weights["head.0.weight"]}
    for gate in GATES:
        lstm[f"{gate}_proj.0.weight"] = noise(rng, width, D)
        lstm[f"{gate}_proj.1.weight"] = noise(rng, width, width)
    for gate in GATES if copies else GATES[:1]:
        lstm[f"{gate}_emb.0.weight"] = weights["emb.0.weight"]
    for name in ("cell_ln", "state_ln"):
        lstm[f"{name}.0.weight"] = 1 + noise(rng, width, scale=1.0)
        lstm[f"{name}.0.bias"] = noise(rng, width, scale=1.0)
    if copies:
        lstm = {f"speculator.{name}": value for name, value in lstm.items()}
        lstm["speculator.head.1.weight"] = weights["head.0.weight"]
    return config, lstm


def states(config: dict[str, Any], w: Weights, h: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """What the output matrix reads at every level, in float64: (levels, D)."""
    w = {name.removeprefix("speculator."): value.astype(np.float64) for name, value in w.items()}
    w = {name.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if name.count(".") == 3
         else name: value for name, value in w.items()}  # fmt: skip
    tied, n = config["tie_weights"], config["n_predict"]
    lstm = config.get("method") == "sum_lstm"
    width = w["cell_ln.0.weight" if lstm else "ln.0.weight"].size
    keep = 0.5 ** (0.5 / n)
    a = math.sqrt((1 - keep**2) * width / 2) / keep
    s = h.astype(np.float64)
    s = rms(s) / math.sqrt(2) if config["scale_input"] else s
    c, found = np.zeros(width), []
    for i, token in enumerate(tokens):
        stage, p = (0, min(i, 1)) if tied else (i, i)
        if not lstm:
            x = w[f"proj.{p}.weight"] @ s + a * w[f"emb.{stage}.weight"][token]
            s = gelu(rms(x) * w[f"ln.{stage}.weight"] + w[f"ln.{stage}.bias"])
        else:
            sums = {}
            for gate in GATES:
                own = w.get(f"{gate}_emb.0.weight", w["forget_emb.0.weight"])
                sums[gate] = w[f"{gate}_proj.{p}.weight"] @ s + a * own[token]
            new = rms(sums["cell"]) * w["cell_ln.0.weight"] + w["cell_ln.0.bias"]
            c = c * sigmoid(sums["forget"]) + gelu(new) * sigmoid(sums["input"])
            out = rms(c) * w["state_ln.0.weight"] + w["state_ln.0.bias"]
            s = gelu(out) * sigmoid(sums["output"])
        found.append(s)
    return np.stack(found)


def matrix(config: dict[str, Any], weights: Weights, level: int) -> np.ndarray:
    names = [n for n in weights if n.removeprefix("speculator.").startswith("head.")]
    number = 0 if config["tie_weights"] else level
    return next(weights[n] for n in names if f"head.{number}." in n).astype(np.float64)


def reference(config: dict[str, Any], w: Weights, h: np.ndarray, tokens: Sequence[int]) -> Any:
    rows = states(config, w, h, tokens)
    return np.stack([matrix(config, w, i) @ row for i, row in enumerate(rows)])


def loaded(folder: Path, config: dict[str, Any], weights: Weights, target: Decoder) -> Speculator:
    drafter = load_drafter(write(folder, config, weights), target)
    check_folder(folder, target)
    assert isinstance(drafter, Speculator)
    return drafter


DIALECTS: dict[str, tuple[dict[str, Any], Weights]] = {
    "ibm": ibm(False),
    "ibm-tied": ibm(True),
    "ibm-as-wide-as-the-target": ibm(False, width=D),
    "ibm-unscaled": ibm(True, scale_input=False),
    "arctic-rnn": arctic("sum_rnn"),
    "arctic-lstm": arctic("sum_lstm"),
    "arctic-lstm-copies": arctic("sum_lstm", copies=True),
}
