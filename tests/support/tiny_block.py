"""Tiny block drafters of every dialect, and what they say by plain NumPy.

The reference follows the formulas of arXiv 2602.06036 (DFlash), 2607.05147 (DSpark) and 2605.29707
(Domino) in float64: all contexts and the whole block are computed at once, without a cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from conftest import D, V
from tiny_heads import IDS, Weights, noise, write

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)
from mlx_redrafter.drafters.block import Block
from mlx_redrafter.drafters.loading import check_folder, load_drafter
from mlx_redrafter.models import Decoder

H, KV, DH, INNER, B, MASK, RANK, GRU = 4, 2, 12, 40, 5, 96, 6, 7
"""Heads, key/value heads, their size, feed-forward size, places, and the widths of a bias."""
LAYERS = (0, 2)
"""Whose outputs are read."""


@dataclass(frozen=True)
class Case:
    """A drafter in files, and what is meant by them.

    plain: the same tensors by DeepSpec's names. window: (size, counted from the root?) of layer 0.
    causal: by layer. out: its own output matrix, of the tokens ids. skip: levels without a bias.
    """

    config: dict[str, Any]
    weights: Weights
    plain: Weights
    after: bool
    bias: str = "none"
    ids: np.ndarray | None = None
    window: tuple[int, bool] | None = None
    causal: tuple[bool, bool] = (False, False)
    skip: int = 0
    theta: float = 300.0

    @property
    def levels(self) -> int:
        return B if self.after else B - 1


def one(rng: np.random.Generator, size: int) -> np.ndarray:
    return (1 + 0.2 * rng.standard_normal(size)).astype(np.float32)


def tensors(seed: int = 0) -> Weights:
    """Of a drafter of two layers, without a bias."""
    rng = np.random.default_rng(seed)
    n = lambda *shape: noise(rng, *shape, scale=1.8)  # noqa: E731
    weights = {"fc.weight": n(D, len(LAYERS) * D)}
    weights |= {f"{name}.weight": one(rng, D) for name in ("hidden_norm", "norm")}
    for i in range(2):
        weights |= {
            f"layers.{i}.self_attn.q_proj.weight": n(H * DH, D),
            f"layers.{i}.self_attn.k_proj.weight": n(KV * DH, D),
            f"layers.{i}.self_attn.v_proj.weight": n(KV * DH, D),
            f"layers.{i}.self_attn.o_proj.weight": n(D, H * DH),
            f"layers.{i}.self_attn.q_norm.weight": one(rng, DH),
            f"layers.{i}.self_attn.k_norm.weight": one(rng, DH),
            f"layers.{i}.mlp.gate_proj.weight": n(INNER, D),
            f"layers.{i}.mlp.up_proj.weight": n(INNER, D),
            f"layers.{i}.mlp.down_proj.weight": n(D, INNER),
            f"layers.{i}.input_layernorm.weight": one(rng, D),
            f"layers.{i}.post_attention_layernorm.weight": one(rng, D),
        }
    return weights


def head(bias: str, rows: int = V, seed: int = 1) -> Weights:
    """The tensors of a bias, and of DSpark's guess of acceptance, which nobody needs."""
    rng = np.random.default_rng(seed)
    n = lambda *shape: noise(rng, *shape, scale=3.0)  # noqa: E731
    if bias == "none":
        return {}
    if bias == "domino":
        return {
            "prefix_gru.weight_ih_l0": n(3 * GRU, D),
            "prefix_gru.weight_hh_l0": n(3 * GRU, GRU),
            "embed_proj.0.weight": n(RANK, D + GRU),
            "embed_proj.2.weight": n(rows, RANK),
        }
    part = "markov_head."
    weights = {
        f"{part}markov_w1.weight": n(V, RANK),
        f"{part}markov_w2.weight": n(rows, RANK),
        "confidence_head.proj.weight": n(1, D + RANK),
        "confidence_head.proj.bias": n(1),
    }
    if bias == "gated":
        weights |= {f"{part}gate_proj.weight": n(RANK, D + RANK), f"{part}gate_proj.bias": n(RANK)}
    if bias == "rnn":
        weights[f"{part}joint_proj.weight"] = n(3 * RANK, 2 * RANK + D)
        weights[f"{part}joint_proj.bias"] = n(3 * RANK)
    return weights


SIZES: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": D, "num_attention_heads": H, "num_key_value_heads": KV,
    "head_dim": DH, "intermediate_size": INNER, "rms_norm_eps": 1e-5, "vocab_size": V,
    "num_hidden_layers": 2, "max_position_embeddings": 2048, "hidden_act": "silu",
    "rope_theta": 300.0,
}  # fmt: skip
MAP = {"d2t": IDS - np.arange(IDS.size), "t2d": np.isin(np.arange(V), IDS)}
COPIES = {
    f"{name}.weight": noise(np.random.default_rng(6), V, D) for name in ("embed_tokens", "lm_head")
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}


def of(bias: str, config: dict[str, Any], after: bool, rows: int = V, **more: Any) -> Case:
    plain = tensors() | head(bias, rows)
    return Case({**SIZES, **config}, plain, plain, after, bias, **more)


def deep_spec(bias: str) -> Case:
    """Everything at the top; copies of the target's embedding and head."""
    config: dict[str, Any] = {
        "architectures": ["Qwen3DSparkModel"], "block_size": B, "mask_token_id": MASK,
        "target_layer_ids": list(LAYERS), "num_target_layers": 3, "num_anchors": 8,
        "markov_rank": RANK if bias != "none" else 0, "enable_confidence_head": bias != "none",
    }  # fmt: skip
    if bias != "none":
        config |= {"markov_head_type": bias, "confidence_head_with_markov": True}
    case = of(bias, config, True)
    return replace(case, weights=case.weights | COPIES)


def nested(kind: str, name: str = "DFlashDraftModel", **method: Any) -> dict[str, Any]:
    """z-lab's and SpecForge's: the method's keys have a dictionary of their own."""
    inner = {"mask_token_id": MASK, "target_layer_ids": list(LAYERS), **method}
    return {"architectures": [name], "block_size": B, "num_target_layers": 3, kind: inner}


def speculators(kind: str, bias: str, after: bool, **more: Any) -> Case:
    """The layers' sizes are nested; numbers of layers are of inputs; an output matrix of its own
    for the draft vocabulary."""
    config = {
        "speculators_model_type": kind, "architectures": [f"{kind}DraftModel"],
        "transformer_layer_config": {
            **SIZES, "rope_theta": None, "rope_parameters": {"rope_theta": 70.0}, **SLIDING,
        },
        "block_size": B, "mask_token_id": MASK, "draft_vocab_size": IDS.size,
        "aux_hidden_state_layer_ids": [i + 1 for i in LAYERS], "target_hidden_size": None,
        "speculators_config": {"verifier": {"name_or_path": "org/base"}},
        **({"markov_rank": RANK, "markov_head_type": bias} if bias != "none" else {}), **more,
    }  # fmt: skip
    own = {"lm_head.weight": noise(np.random.default_rng(8), IDS.size, D, scale=3.0)}
    plain = tensors() | head(bias, IDS.size) | own
    extra = {"verifier_norm.weight": np.ones(D, np.float32), **MAP}
    return Case(
        config, plain | extra, plain, after, bias, IDS, (3, True),
        (not more.get("sliding_window_non_causal"), False), theta=70.0,
    )  # fmt: skip


def renamed(case: Case, old: str, new: str) -> Case:
    return replace(case, weights={n.replace(old, new): w for n, w in case.weights.items()})


def dialects() -> dict[str, Case]:
    older = of(
        "vanilla", nested("dflash_config", "DSparkDraftModel", projector_type="dspark"), True
    )
    model_opt = of(
        "rnn", nested("dflash_config", "DFlashDraftModel", shift_label=True, markov_rank=RANK), True
    )
    domino = nested(
        "dflash_config", projector_type="domino", emb_dim=RANK, gru_hidden_dim=GRU,
        pure_draft_prefix_len=1,
    )  # fmt: skip
    shifted = {**domino, "dflash_config": {**domino["dflash_config"], "shift_label": True}}
    drafted = of("vanilla", nested("dspark_config", "DSparkDraftModel"), True, ids=IDS)
    sliding = {**nested("dflash_config"), **SLIDING}
    return {
        "deepspec-dspark": deep_spec("vanilla"),
        "deepspec-gated": deep_spec("gated"),
        "deepspec-rnn": deep_spec("rnn"),
        "deepspec-dflash": deep_spec("none"),
        "z-lab": of("none", {**nested("dflash_config"), "block_size": None, "dflash_config": {
            **nested("dflash_config")["dflash_config"], "block_size": B}}, False),
        "specforge-dflash-sliding": of("none", sliding, False, window=(3, False),
                                       causal=(True, False)),
        "specforge-two-way-window": of(
            "none", {**sliding, "is_causal": False}, False, window=(3, False)
        ),
        "specforge-causal": of(
            "gated", {**nested("dflash_config", "DSparkDraftModel"), "is_causal": True}, True,
            causal=(True, True),
        ),
        "specforge-older": renamed(
            renamed(older, "markov_head", "logit_head.markov_head"), "confidence_head",
            "logit_head.confidence_head",
        ),
        "specforge-rows-of-the-target": replace(drafted, weights=drafted.weights | MAP),
        "domino": of("domino", domino, False, skip=1),
        "domino-shifted": renamed(
            renamed(of("domino", shifted, True, skip=1), "prefix_gru", "logit_head.prefix_gru"),
            "embed_proj", "logit_head.embed_proj",
        ),
        "speculators-dflash": speculators("dflash", "none", False),
        "speculators-dflash-two-way": speculators(
            "dflash", "none", True, sample_from_anchor=True, sliding_window_non_causal=True
        ),
        "speculators-dspark": speculators("dspark", "vanilla", True),
        "speculators-dspark-at": speculators("dspark", "rnn", False, sample_from_anchor=False),
        "modelopt": renamed(
            renamed(model_opt, "markov_head.", ""), "confidence_head.proj", "confidence_proj"
        ),
    }  # fmt: skip


DIALECTS = dialects()


def loaded(folder: Path, case: Case, target: Decoder) -> Block:
    drafter = load_drafter(write(folder, case.config, case.weights), target)
    check_folder(folder, target)
    assert isinstance(drafter, Block)
    return drafter


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class Reference:
    """A drafter in float64 over a target's embedding (V, D) and output matrix (V, D)."""

    def __init__(self, case: Case, embedding: np.ndarray, matrix: np.ndarray) -> None:
        self.case = case
        self.w = {name: value.astype(np.float64) for name, value in case.plain.items()}
        self.embedding = embedding.astype(np.float64)
        self.ids = np.arange(V) if case.ids is None else case.ids
        own = self.w.get("lm_head.weight")
        self.rows = matrix.astype(np.float64)[self.ids] if own is None else own

    def rms(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * self.w[f"{name}.weight"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def turned(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding of (P, heads, DH), row p by position p."""
        half = DH // 2
        angle = np.arange(x.shape[0])[:, None, None] * self.case.theta ** (
            -2 * np.arange(half) / DH
        )
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def sees(self, layer: int, place: int, root: int) -> list[int]:
        """The positions that a place of the block attends to, of ``root`` contexts and B places."""
        found = []
        for position in range(root + B):
            own = root + place
            if self.case.window is not None and layer == 0:
                size, from_root = self.case.window
                if from_root and position < root - size:
                    continue
                if not from_root and position <= own - size:
                    continue
            if position >= root and self.case.causal[layer] and position > own:
                continue
            found.append(position)
        return found

    def layer(self, i: int, contexts: np.ndarray, x: np.ndarray) -> np.ndarray:
        """contexts (P, D), x (B, D) at the positions that follow -> (B, D)."""
        name, root = f"layers.{i}.", contexts.shape[0]
        u = self.rms(x, f"{name}input_layernorm")
        every, attn = np.concatenate([contexts, u]), f"{name}self_attn."
        q = self.linear(every, f"{attn}q_proj").reshape(-1, H, DH)
        k = self.linear(every, f"{attn}k_proj").reshape(-1, KV, DH)
        v = self.linear(every, f"{attn}v_proj").reshape(-1, KV, DH)
        q = self.turned(self.rms(q, f"{attn}q_norm"))
        k = self.turned(self.rms(k, f"{attn}k_norm"))
        out = np.zeros((B, H, DH))
        for place in range(B):
            seen = self.sees(i, place, root)
            for h in range(H):
                shared = h // (H // KV)
                scores = k[seen, shared] @ q[root + place, h] / math.sqrt(DH)
                mass = np.exp(scores - scores.max())
                out[place, h] = mass / mass.sum() @ v[seen, shared]
        x = x + self.linear(out.reshape(B, H * DH), f"{attn}o_proj")
        z = self.rms(x, f"{name}post_attention_layernorm")
        gate = self.linear(z, f"{name}mlp.gate_proj")
        inner = gate * sigmoid(gate) * self.linear(z, f"{name}mlp.up_proj")
        return x + self.linear(inner, f"{name}mlp.down_proj")

    def hidden(self, root: int, read: np.ndarray) -> np.ndarray:
        """(B, D), behind contexts of what is read (P, layers * D)."""
        contexts = self.rms(self.linear(read.astype(np.float64), "fc"), "hidden_norm")
        x = self.embedding[[root] + [MASK] * (B - 1)]
        for i in range(2):
            x = self.layer(i, contexts, x)
        return self.rms(x, "norm")

    def biases(self, hidden: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        """(levels, Vd): hidden (levels, D), and the tokens before each level."""
        kind, rows, s = self.case.bias, [], np.zeros(GRU if self.case.bias == "domino" else RANK)
        for h, token in zip(hidden, tokens, strict=True):
            if kind == "domino":
                x = np.split(self.w["prefix_gru.weight_ih_l0"] @ self.embedding[token], 3)
                y = np.split(self.w["prefix_gru.weight_hh_l0"] @ s, 3)
                r, z = sigmoid(x[0] + y[0]), sigmoid(x[1] + y[1])
                s = (1 - z) * np.tanh(x[2] + r * y[2]) + z * s
                g = self.linear(np.concatenate([h, s]), "embed_proj.0")
                rows.append(self.linear(g * sigmoid(g), "embed_proj.2"))
                continue
            w = self.w["markov_head.markov_w1.weight"][token]
            if kind == "gated":
                w = w * sigmoid(self.linear(np.concatenate([h, w]), "markov_head.gate_proj"))
            if kind == "rnn":
                every = self.linear(np.concatenate([s, w, h]), "markov_head.joint_proj")
                gate, candidate, out = np.split(every, 3)
                s = sigmoid(gate) * s + (1 - sigmoid(gate)) * np.tanh(candidate)
                w = np.tanh(out)
            rows.append(self.linear(w, "markov_head.markov_w2"))
        return np.stack(rows)

    def said(self, root: int, read: np.ndarray, drafted: Sequence[int]) -> np.ndarray:
        """Logits after the root and after every drafted token but the last: (levels, Vd)."""
        levels, first = len(drafted), 0 if self.case.after else 1
        hidden = self.hidden(root, read)[first : first + levels]
        logits = hidden @ self.rows.T
        if self.case.bias != "none":
            bias = self.biases(hidden, [root, *drafted[:-1]])
            bias = bias[:, self.ids] if bias.shape[1] != self.ids.size else bias
            logits[self.case.skip :] += bias[self.case.skip :]
        return logits

    def chain(self, root: int, read: np.ndarray, depth: int) -> list[int]:
        """The greedy draft."""
        found: list[int] = []
        for _ in range(depth):
            found.append(int(self.ids[self.said(root, read, [*found, 0])[-1].argmax()]))
        return found

    def cost(self, root: int, read: np.ndarray, path: Sequence[int]) -> float:
        """Minus the log-probability of a drafted path."""
        place = {int(token): i for i, token in enumerate(self.ids)}
        total = 0.0
        for row, token in zip(self.said(root, read, path), path, strict=True):
            top = row.max()
            total += top + math.log(np.exp(row - top).sum()) - row[place[token]]
        return total
