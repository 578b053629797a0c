"""Writes training.npz: loss and gradients of a tiny drafter, computed by PyTorch.

python tests/support/golden/make_training_golden.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

D, VD, LAYERS, RUNS, LENGTH, STEPS = 8, 12, 2, 2, 3, 3
DECAY, ACCEPTANCE = 0.8, 0.7


def inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(11)

    def normal(*shape: int, scale: float = 0.5) -> np.ndarray:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    weights = {
        "context_norm.0.weight": 1 + normal(D, scale=0.2),
        "context_norm.1.weight": 1 + normal(D, scale=0.2),
        "context_proj.weight": normal(D, LAYERS * D),
        "rnn_u.weight": normal(3 * D, D),
        "rnn_u.bias": normal(3 * D),
        "rnn_w.weight": normal(3 * D, D),
        "input_proj.weight": normal(D, 2 * D),
        "input_proj.bias": normal(D),
        "lm_head.0.linear.weight": normal(D, D),
        "lm_head.0.linear.bias": normal(D),
        "lm_head.1.weight": normal(VD, D),
    }
    valid = np.ones((STEPS, RUNS, LENGTH), np.float32)
    valid[2, 1, 1:] = 0
    valid[1, 1, 2] = 0
    return {
        **{f"weight/{k}": v for k, v in weights.items()},
        "features": normal(RUNS, LENGTH, LAYERS, D, scale=1.0),
        "embeddings": normal(RUNS, LENGTH + STEPS - 1, D, scale=1.0),
        "targets": random.dirichlet(np.ones(VD), (STEPS, RUNS * LENGTH)).astype(np.float32),
        "valid": valid,
    }


def loss(w: dict[str, torch.Tensor], data: dict[str, torch.Tensor]) -> torch.Tensor:
    features = data["features"].reshape(-1, LAYERS, D)
    normed = [
        features[:, i]
        * torch.rsqrt(features[:, i].pow(2).mean(-1, keepdim=True) + 1e-5)
        * w[f"context_norm.{i}.weight"]
        for i in range(LAYERS)
    ]
    context = torch.cat(normed, -1) @ w["context_proj.weight"].T
    state, total = context, torch.zeros(())
    for k in range(STEPS):
        e = data["embeddings"][:, k : k + LENGTH].reshape(-1, D)
        wr, wz, wn = (e @ w["rnn_w.weight"].T).chunk(3, -1)
        ur, uz, un = F.linear(state, w["rnn_u.weight"], w["rnn_u.bias"]).chunk(3, -1)
        update = torch.sigmoid(wz + uz)
        state = (1 - update) * torch.tanh(wn + torch.sigmoid(wr + ur) * un) + update * state
        x = F.linear(torch.cat([context, state], -1), w["input_proj.weight"], w["input_proj.bias"])
        x = x + F.silu(F.linear(x, w["lm_head.0.linear.weight"], w["lm_head.0.linear.bias"]))
        logits = x @ w["lm_head.1.weight"].T
        p, q = data["targets"][k], logits.softmax(-1)
        rows = -(p * logits.log_softmax(-1)).sum(-1)
        rows = rows + ACCEPTANCE * (1 - torch.minimum(p, q).sum(-1))
        total = total + DECAY**k * (rows * data["valid"][k].reshape(-1)).sum()
    return total


def main() -> None:
    arrays = inputs()
    tensors = {k: torch.tensor(v) for k, v in arrays.items()}
    weights = {
        k.removeprefix("weight/"): v.requires_grad_()
        for k, v in tensors.items()
        if k.startswith("weight/")
    }
    value = loss(weights, tensors)
    value.backward()
    results = {"loss": value.detach().numpy()}
    results |= {f"gradient/{k}": v.grad.numpy() for k, v in weights.items() if v.grad is not None}
    file = Path(__file__).parent / "training.npz"
    np.savez_compressed(file, **arrays, **results)
    print(f"{file}: {file.stat().st_size} bytes, loss {value.item():.6f}")


if __name__ == "__main__":
    main()
