"""Make drafters.npz: what PyTorch computes for every variant of Apple's ReDrafter.

    python make_golden.py          (needs torch and numpy; the tests need only the file)

This follows the published description of Apple's forward pass and beam search (recurrent_drafting,
modeling_drafter.py) in PyTorch's own modules and shares nothing with mlx_redrafter. Its
beam_length counts the root. The vocabulary is smaller than 50, because Apple's search sees only
the 50 best tokens of a beam and ours sees all of them.

The file holds one pool of random weights, in float16 so that it is small; the variants take from
it and compute in float32:

    rnn_w, rnn_u, rnn_u_bias, embed, context, root      shared by all
    E{6,8}.block.{i}.weight / .bias, E{6,8}.out       by exit dimension; 8 = 2 D needs no input_proj
    input_proj.weight, input_proj.bias
    variants (16,)      "cell-E-blocks"
    logits (16, 1 + W (L - 1), V)   of every beam at every step, before any normalisation
    beams (16, W, L + 1)            with the root, best first
    scores (16, W)                  log-probabilities of the beams
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

D, V, BLOCKS = 4, 11, 3
WIDTH, LENGTH = 3, 4  # LENGTH counts the root: 3 drafted tokens
PROJECTED, PLAIN = 6, 2 * D
MASKED = -50000.0


def make_pool() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(20241217)

    def draw(*shape: int, scale: float = 1.5) -> np.ndarray:
        values = generator.standard_normal(shape) * scale / shape[-1] ** 0.5
        return values.astype(np.float16)

    pool = {
        "rnn_w": draw(D, D, scale=3),
        "rnn_u": draw(D, D, scale=3),
        "rnn_u_bias": draw(D),
        "embed": draw(V, D),
        "context": draw(D),
        "root": np.array([5], np.int64),
        "input_proj.weight": draw(PROJECTED, 2 * D),
        "input_proj.bias": draw(PROJECTED),
    }
    for width in (PROJECTED, PLAIN):
        for i in range(BLOCKS):
            pool[f"E{width}.block.{i}.weight"] = draw(width, width, scale=0.8)
            pool[f"E{width}.block.{i}.bias"] = draw(width)
        pool[f"E{width}.out"] = draw(V, width)
    return pool


class Block(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + functional.silu(self.linear(x))


class Drafter(torch.nn.Module):
    """Module names are Apple's tensor names."""

    def __init__(self, rnn: bool, width: int, blocks: int) -> None:
        super().__init__()
        self.rnn = rnn
        if width != 2 * D:
            self.input_proj = torch.nn.Linear(2 * D, width)
        layers = [Block(width) for _ in range(blocks)]
        self.lm_head = torch.nn.Sequential(*layers, torch.nn.Linear(width, V, bias=False))
        if rnn:
            self.rnn_u = torch.nn.Linear(D, D)
            self.rnn_w = torch.nn.Linear(D, D, bias=False)

    def logits(self, context: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        x = torch.cat([context, state], dim=-1)
        return self.lm_head(self.input_proj(x) if hasattr(self, "input_proj") else x)

    def advance(self, embedding: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        if self.rnn:
            return functional.silu(self.rnn_w(embedding) + self.rnn_u(state))
        return embedding + state


def weights_of(pool: dict[str, np.ndarray], drafter: Drafter, width: int) -> None:
    blocks = len(drafter.lm_head) - 1
    names = {f"lm_head.{blocks}.weight": f"E{width}.out"}
    for i in range(blocks):
        for part in ("weight", "bias"):
            names[f"lm_head.{i}.linear.{part}"] = f"E{width}.block.{i}.{part}"
    if drafter.rnn:
        names |= {"rnn_u.weight": "rnn_u", "rnn_u.bias": "rnn_u_bias", "rnn_w.weight": "rnn_w"}
    if width != 2 * D:
        names |= {f"input_proj.{part}": f"input_proj.{part}" for part in ("weight", "bias")}
    state = {name: torch.tensor(pool[key].astype(np.float32)) for name, key in names.items()}
    drafter.load_state_dict(state, strict=True)


def search(
    drafter: Drafter, context: torch.Tensor, root: torch.Tensor, embed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apple's beam search for one sequence: logits of every step, beams, their scores."""
    score = torch.tensor([0.0] + [MASKED] * (WIDTH - 1))
    contexts = context.expand(WIDTH, D)
    beams = root.expand(WIDTH, 1)
    state = torch.zeros(WIDTH, D)
    rows = []
    for step in range(LENGTH - 1):
        state = drafter.advance(embed[beams[:, -1]], state)
        raw = drafter.logits(contexts, state)
        rows.append(raw if step else raw[:1])  # at first all beams are the root
        logits = raw - raw.max(dim=-1, keepdim=True).values
        best = torch.topk(logits, min(50, V)).values[:, -1:]
        logits = logits.masked_fill(logits < best, MASKED)
        joint = logits.log_softmax(dim=-1) + score[:, None]
        score, index = torch.topk(joint.reshape(-1), WIDTH)
        beam, token = index // V, index % V
        beams = torch.cat([beams[beam], token[:, None]], dim=1)
        state = state[beam]
    return torch.cat(rows), beams, score


@torch.no_grad()
def main() -> None:
    pool = make_pool()
    floats = {name: torch.tensor(value.astype(np.float32)) for name, value in pool.items()}
    variants, logits, beams, scores = [], [], [], []
    for rnn in (False, True):
        for width in (PLAIN, PROJECTED):
            for blocks in range(BLOCKS + 1):
                drafter = Drafter(rnn, width, blocks)
                weights_of(pool, drafter, width)
                root = torch.tensor(pool["root"])
                found = search(drafter, floats["context"], root, floats["embed"])
                variants.append(f"{'elman' if rnn else 'sum'}-{width}-{blocks}")
                for into, value in zip((logits, beams, scores), found, strict=True):
                    into.append(value.numpy())
    path = Path(__file__).with_name("drafters.npz")
    np.savez_compressed(
        path,
        **pool,
        variants=np.array(variants),
        logits=np.stack(logits),
        beams=np.stack(beams).astype(np.uint8),
        scores=np.stack(scores),
    )
    print(f"{path.name}: {len(variants)} variants, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
