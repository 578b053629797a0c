"""Tiny EAGLE heads of every dialect, and what they say by plain NumPy.

The reference follows arXiv 2401.15077 and 2503.01840: for every token of a draft all pairs of the
text are computed again, with causal attention over all of them, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from conftest import D, V
from tiny_heads import IDS, Weights, noise, write

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)
from mlx_redrafter.drafters.eagle import Eagle
from mlx_redrafter.drafters.loading import check_folder, load_drafter
from mlx_redrafter.models import Decoder

H, KV, DH, INNER = 4, 2, 8, 64
LAYERS = 8
"""Of the target that the dialects are for: 1, 3, 4 are the layers where no file names any."""
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Head:
    """A head in files, and what is meant by them.

    block: what the block's tensors are called. layers: whose outputs are read, of EAGLE-3.
    meant: the weights that count, where those that are stored are packed.
    """

    config: dict[str, Any]
    weights: Weights
    layers: tuple[int, ...] = (1, 3, 4)
    block: str = "midlayer."
    base: float = 10000.0
    scaling: dict[str, Any] = field(default_factory=dict)
    before_residual: bool = False
    norm_output: bool = False
    own_embedding: bool = False
    own_head: bool = True
    meant: Weights = field(default_factory=dict)

    @property
    def ids(self) -> np.ndarray:
        """The target's ids of its tokens."""
        return IDS if "d2t" in self.weights else np.arange(V)


def one(rng: np.random.Generator, size: int) -> np.ndarray:
    return (1 + 0.2 * rng.standard_normal(size)).astype(np.float32)


def tensors(
    count: int = 3, block: str = "midlayer.", width: int = D, rows: int = IDS.size, seed: int = 0
) -> Weights:
    """Of an EAGLE-3 head that reads so many layers; 0: of an EAGLE-1 head."""
    rng = np.random.default_rng(seed)
    n = lambda *shape: noise(rng, *shape, scale=2.2)  # noqa: E731
    # Scores of a few units: every pair that is seen counts.
    look = lambda *shape: noise(rng, *shape, scale=1.0 if count else 0.6)  # noqa: E731
    wide = 2 * width if count else width
    weights = {
        "fc.weight": n(width, count * D or 2 * D),
        f"{block}self_attn.q_proj.weight": look(H * DH, wide),
        f"{block}self_attn.k_proj.weight": look(KV * DH, wide),
        f"{block}self_attn.v_proj.weight": n(KV * DH, wide),
        f"{block}self_attn.o_proj.weight": n(width, H * DH),
        f"{block}mlp.gate_proj.weight": n(INNER, width),
        f"{block}mlp.up_proj.weight": n(INNER, width),
        f"{block}mlp.down_proj.weight": n(width, INNER),
        f"{block}post_attention_layernorm.weight": one(rng, width),
    }
    if not count:
        return weights | {"embed_tokens.weight": n(V, D)}
    weights |= {
        f"{block}{name}.weight": one(rng, width) for name in ("hidden_norm", "input_layernorm")
    }
    weights["norm.weight"] = one(rng, width)
    if rows:
        weights["lm_head.weight"] = noise(rng, rows, width, scale=3.0)
    return weights


def biases(weights: Weights, *parts: str, seed: int = 9) -> Weights:
    """A bias beside every matrix whose name holds one of the parts."""
    rng = np.random.default_rng(seed)
    return {
        name.replace(".weight", ".bias"): noise(rng, value.shape[0])
        for name, value in weights.items()
        if value.ndim == 2 and any(part in name for part in parts)
    }


def qk_norms(block: str) -> Weights:
    rng = np.random.default_rng(4)
    return {f"{block}self_attn.{x}_norm.weight": one(rng, DH) for x in "qk"}


MAP = {"d2t": IDS - np.arange(IDS.size), "t2d": np.isin(np.arange(V), IDS)}
SIZES: dict[str, Any] = {
    "model_type": "llama", "hidden_size": D, "num_attention_heads": H, "num_key_value_heads": KV,
    "intermediate_size": INNER, "rms_norm_eps": 1e-5, "vocab_size": V, "num_hidden_layers": 1,
    "max_position_embeddings": 2048, "hidden_act": "silu",
}  # fmt: skip
CLASS = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": IDS.size}


def specforge(**named: Any) -> Head:
    """SpecForge's, AngelSlim's, SGLang's; numbers of layers are those of outputs."""
    nested = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}}
    return Head({**SIZES, **CLASS, **nested, **named}, tensors() | MAP)


def speculators(layer: dict[str, Any], weights: Weights, **named: Any) -> Head:
    """The speculators library's: the block's sizes are nested, numbers of layers are of inputs."""
    config = {
        "speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": IDS.size, "target_hidden_size": None, "norm_before_residual": False,
        "transformer_layer_config": {**SIZES, **layer}, "eagle_aux_hidden_state_layer_ids": None,
        "speculators_config": {"verifier": {"name_or_path": "org/base"}},
    }  # fmt: skip
    block = "layers.0."
    extra = {"verifier_norm.weight": np.ones(D, np.float32), **MAP}
    return Head({**config, **named}, weights | extra, block=block)


def eagle_1(*parts: str) -> Head:
    """No norms but one, no output matrix, a copy of the embedding."""
    weights = tensors(0, "layers.0.")
    return Head(
        {**SIZES, "bias": bool(parts)}, weights | biases(weights, *parts), (), "layers.0.",
        own_head=False,
    )  # fmt: skip


def dialects() -> dict[str, Head]:
    three, layer_0 = tensors(), tensors(block="layers.0.")
    whole = tensors(rows=V)
    rng = np.random.default_rng(6)
    narrow = tensors(width=24) | {"embed_tokens.weight": noise(rng, V, 24)}
    each = {f"fc_norm.{i}.weight": one(rng, D) for i in range(3)}
    deep_spec = tensors(5, "layers.0.", rows=V) | qk_norms("layers.0.")
    copies = {"embed_tokens.weight": noise(rng, V, D), "lm_head.weight": noise(rng, V, D)}
    model_opt = {n: w for n, w in tensors(block="layers.0.", rows=V).items() if n != "norm.weight"}
    return {
        "safeailab": Head(
            dict(SIZES), three | MAP | {n: w for n, w in copies.items() if "embed" in n}
        ),
        "specforge": specforge(),
        "specforge-inside": replace(
            specforge(), weights={f"model.{n}": w for n, w in specforge().weights.items()
                                  if n not in MAP} | MAP, block="model.midlayer.",
        ),
        "sglang-target-head": Head(
            {**SIZES, **CLASS, "draft_vocab_size": None}, tensors(rows=0), own_head=False
        ),
        "drafted-target-head": Head(dict(SIZES), tensors(rows=0) | MAP, own_head=False),
        "rows-of-all-tokens": Head(dict(SIZES), whole | MAP),
        "modelopt": Head(
            {**SIZES, **CLASS, "draft_vocab_size": V, "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": [1, 2, 6], "use_aux_hidden_state": True,
                "use_last_layernorm": False, "use_input_layernorm_in_first_layer": True,
                "parallel_draft_step": 1,
            }}, model_opt, (1, 2, 6), "layers.0.",
        ),
        "speculators-llama": replace(
            speculators(
                {"rope_theta": 500.0}, layer_0, norm_before_residual=True,
                eagle_aux_hidden_state_layer_ids=[2, 5, 7],
            ), layers=(1, 4, 6), base=500.0, before_residual=True,
        ),
        "speculators-qwen3": replace(
            speculators(
                {"model_type": "qwen3", "head_dim": DH, "rope_parameters": {"rope_theta": 300.0}},
                layer_0 | qk_norms("layers.0."), norm_output=True,
            ), base=300.0, norm_output=True,
        ),
        "norm-before-fc": replace(
            speculators({}, layer_0 | {"input_norm.weight": one(rng, 3 * D)}
                        | biases(layer_0, "self_attn"), norm_before_fc=True),
        ),
        "fc-norm": replace(
            speculators({}, layer_0 | each, fc_norm=True, norm_output=True), norm_output=True
        ),
        "narrower-than-the-target": Head(
            {**SIZES, **CLASS, "hidden_size": 24, "head_dim": DH, "target_hidden_size": D,
             "rope_scaling": LLAMA3, "rope_theta": 50.0}, narrow | MAP,
            base=50.0, scaling=LLAMA3, own_embedding=True,
        ),
        "deepspec": Head(
            {**SIZES, "architectures": ["Qwen3Eagle3Model"], "target_layer_ids": [1, 2, 3, 5, 6],
             "ttt_length": 7, "num_target_layers": LAYERS}, deep_spec | copies, (1, 2, 3, 5, 6),
            "layers.0.", own_head=False,
        ),
        "inputs-up-to-the-end": replace(
            specforge(eagle_config={"eagle_aux_hidden_state_layer_ids": [4, 6, 8]}),
            layers=(3, 5, 7),
        ),
        "eagle-1": eagle_1(),
        "eagle-1-biased": eagle_1("fc.", "q_proj", "k_proj", "v_proj"),
        "feed-forward-biases": replace(specforge(), weights=three | MAP | biases(three, "mlp")),
    }  # fmt: skip


DIALECTS = dialects()


def loaded(folder: Path, head: Head, target: Decoder) -> Eagle:
    drafter = load_drafter(write(folder, head.config, head.weights), target)
    check_folder(folder, target)
    assert isinstance(drafter, Eagle)
    return drafter


class Reference:
    """A head in float64 over a target's embedding (V, D) and output matrix (V, D)."""

    def __init__(self, head: Head, embedding: np.ndarray, matrix: np.ndarray) -> None:
        self.head = head
        self.w = {n.removeprefix("model."): v.astype(np.float64)
                  for n, v in {**head.weights, **head.meant}.items()}  # fmt: skip
        self.block = head.block.removeprefix("model.")
        own = self.w.get("embed_tokens.weight")
        self.embedding = (own if head.own_embedding and own is not None else embedding).astype(
            float
        )
        rows = self.w["lm_head.weight"] if head.own_head else matrix.astype(float)
        self.rows = rows[head.ids] if rows.shape[0] == V else rows
        flat = {**head.config, **head.config.get("transformer_layer_config", {})}
        self.eps = flat["rms_norm_eps"]

    def rms(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * self.w[name]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def mixed(self, g: np.ndarray) -> np.ndarray:
        """What the first pairs have for f: (P, layers * D) -> (P, H)."""
        if not self.head.layers:
            return g
        if "input_norm.weight" in self.w:
            g = self.rms(g, "input_norm.weight")
        if "fc_norm.0.weight" in self.w:
            parts = [self.rms(g[:, i * D : (i + 1) * D], f"fc_norm.{i}.weight") for i in range(3)]
            g = np.concatenate(parts, axis=-1)
        return self.linear(g, "fc")

    def turned(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding of (P, heads, DH), row p by position p."""
        half = DH // 2
        frequencies = np.array([self.head.base ** (-2 * i / DH) for i in range(half)])
        if rope := self.head.scaling:
            original = rope["original_max_position_embeddings"]
            for i, f in enumerate(frequencies):
                ratio = original * f / (2 * math.pi)  # turns within the original length
                low, high = rope["low_freq_factor"], rope["high_freq_factor"]
                smooth = min(max((ratio - low) / (high - low), 0.0), 1.0)
                frequencies[i] = smooth * f + (1 - smooth) * f / rope["factor"]
        angle = np.arange(x.shape[0])[:, None, None] * frequencies
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attention(self, u: np.ndarray) -> np.ndarray:
        """Every pair over itself and all before it."""
        length, name = u.shape[0], f"{self.block}self_attn."
        q = self.linear(u, f"{name}q_proj").reshape(length, H, DH)
        k = self.linear(u, f"{name}k_proj").reshape(length, KV, DH)
        v = self.linear(u, f"{name}v_proj").reshape(length, KV, DH)
        if f"{name}q_norm.weight" in self.w:
            q, k = self.rms(q, f"{name}q_norm.weight"), self.rms(k, f"{name}k_norm.weight")
        q, k = self.turned(q), self.turned(k)
        heads = []
        for i in range(H):
            shared = i // (H // KV)
            scores = q[:, i] @ k[:, shared].T / math.sqrt(DH)
            scores[np.triu_indices(length, 1)] = -np.inf
            mass = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(mass / mass.sum(-1, keepdims=True) @ v[:, shared])
        return self.linear(np.concatenate(heads, axis=-1), f"{name}o_proj")

    def last(self, tokens: Sequence[int], f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of pairs of f (P, H) and tokens (P,): the last one's logits (Vd,), and its f (H,)."""
        e, block = self.embedding[list(tokens)], self.block
        if self.head.layers:
            normed = self.rms(f, f"{block}hidden_norm.weight")
            u = np.concatenate([self.rms(e, f"{block}input_layernorm.weight"), normed], axis=-1)
            residual = normed if self.head.before_residual else f
        else:
            residual = u = self.linear(np.concatenate([e, f], axis=-1), "fc")
        y = residual + self.attention(u)
        z = self.rms(y, f"{block}post_attention_layernorm.weight")
        gate = self.linear(z, f"{block}mlp.gate_proj")
        inner = gate / (1 + np.exp(-gate)) * self.linear(z, f"{block}mlp.up_proj")
        out = (y + self.linear(inner, f"{block}mlp.down_proj"))[-1]
        normed = self.rms(out, "norm.weight") if "norm.weight" in self.w else out
        return self.rows @ normed, normed if self.head.norm_output else out

    def said(self, text: Sequence[int], g: np.ndarray, drafted: Sequence[int]) -> np.ndarray:
        """Logits after the root and after every drafted token but the last: (levels, Vd).

        text: to the root. g: what is read of all its tokens but the root.
        """
        tokens, f, rows = list(text[1:]), self.mixed(g.astype(np.float64)), []
        for token in [*drafted, 0]:
            logits, following = self.last(tokens, f)
            rows.append(logits)
            tokens, f = [*tokens, token], np.concatenate([f, following[None]])
        return np.stack(rows[: max(1, len(drafted))])

    def chain(self, text: Sequence[int], g: np.ndarray, depth: int) -> list[int]:
        """The greedy draft."""
        found: list[int] = []
        for _ in range(depth):
            logits = self.said(text, g, [*found, 0])[-1]
            found.append(int(self.head.ids[logits.argmax()]))
        return found

    def cost(self, text: Sequence[int], g: np.ndarray, path: Sequence[int]) -> float:
        """Minus the log-probability of a drafted path."""
        place = {int(token): i for i, token in enumerate(self.head.ids)}
        total = 0.0
        for row, token in zip(self.said(text, g, path), path, strict=True):
            top = row.max()
            total += top + math.log(np.exp(row - top).sum()) - row[place[token]]
        return total
