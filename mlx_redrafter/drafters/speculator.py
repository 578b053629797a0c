"""Speculators: recurrent drafters on the target's last hidden state (arXiv 2404.19124).

IBM's and Arctic's MLP speculator (``mlp``, ``sum_rnn``) and Arctic's LSTM (``sum_lstm``). Level i
consumes a token t, from the root on, with s from the level before; the first s is h, or h without
its scale, rms(h) / sqrt(2):

    mlp     s' = gelu(ln(P s + a E t))
    lstm    f, g, o = sigmoid(F s + a E t), sigmoid(I s + a E t), sigmoid(O s + a E t)
            c' = c f + gelu(cell_ln(C s + a E t)) g;  s' = gelu(state_ln(c')) o;  the first c is 0
    logits  U s'

ln divides by the root mean square, scales and shifts. E is an embedding of the drafter's own.
a = sqrt((1 - w^2) D / 2) / w with w = 0.5^(0.5 / n) for the n levels that it was trained for,
however many are drafted. Every level has weights of its own, or all share them but for P, which is
another one at the first level.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.drafters import files
from mlx_redrafter.drafters.levels import LevelDrafter
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.models import Target
from mlx_redrafter.models.fuse import fuse
from mlx_redrafter.models.weights import Shape, shapes
from mlx_redrafter.tree.nodes import integers

KIND = "speculator"
GATES = ("forget", "input", "output", "cell")
T = TypeVar("T")

_EPS = 1e-6
_PARTS = re.compile(r"((?:\w+_)?(?:emb|proj|ln)|head)\.(\d+)\.(?:0\.)?(weight|bias|scales|biases)")


@dataclass(frozen=True)
class SpeculatorConfig:
    """Shape of a speculator.

    Args:
        hidden_size: ``H`` of the target.
        vocab_size: ``V`` of the target.
        width: ``D`` of the state.
        trained: levels ``n`` that it was trained for.
        cell: ``mlp`` | ``lstm``.
        tied: do all levels share their weights?
        scale_input: is the first state h without its scale?
        embeddings: how many the LSTM has, 1 or one a gate.
        rows: of a stored output matrix.
        draft_vocab_size: None: the target's whole vocabulary.
    """

    hidden_size: int
    vocab_size: int
    width: int
    trained: int
    cell: str
    tied: bool
    scale_input: bool
    embeddings: int
    rows: int
    draft_vocab_size: int | None = None

    @classmethod
    def of(
        cls, raw: Mapping[str, Any], given: Mapping[str, Shape], folder: Path
    ) -> SpeculatorConfig:
        """From config.json and shapes by canonical names.

        Raises:
            DrafterError: incomplete, or what no speculator can have.
        """
        lstm = "forget_proj.0.weight" in given or raw.get("method") == "sum_lstm"
        if raw.get("method", "sum_rnn") not in ("sum_rnn", "sum_lstm"):
            raise DrafterError(
                f"the drafter's method {raw['method']!r} is unknown: it is sum_rnn or sum_lstm"
            )
        inputs = raw.get("input_hidden_dim", raw.get("emb_dim"))
        hidden = _size("input_hidden_dim or emb_dim", inputs)
        width = _size("inner_dim", raw.get("inner_dim") or hidden)
        for name in ("emb_dim", "proj_dim"):
            if "input_hidden_dim" in raw and _size(name, raw.get(name, width)) != width:
                raise DrafterError(
                    f"the drafter's {name} {raw[name]!r} is not its inner_dim {width}, as it is "
                    "in every speculator that is read here"
                )
        tied = bool(raw.get("tie_weights", "head.1.weight" not in given))
        trained = files.size("n_predict", raw.get("n_predict"), 2 if tied else 1, 1000)
        if lstm and not tied:
            raise DrafterError("the drafter's tie_weights is false, but its method is sum_lstm")
        one = bool(raw.get("tie_lstm_embs", "input_emb.0.weight" not in given))
        vocabulary = files.size("vocab_size", raw.get("vocab_size"))
        output = given.get("head.0.weight")
        return cls(
            hidden,
            vocabulary,
            width,
            trained,
            "lstm" if lstm else "mlp",
            tied,
            bool(raw.get("scale_input", False)),
            len(GATES) if lstm and not one else 1,
            vocabulary if output is None else files.rows(output),
            files.drafted(given),
        )


def _size(name: str, value: Any) -> int:
    """A number, or Arctic's text of one. Its lists of several stand for more layers."""
    text = str(value)
    if re.fullmatch(r"\d+(\.\d+)+", text) and not isinstance(value, float):
        raise DrafterError(
            f"the drafter's {name} {value!r} stands for several layers, of which only one is "
            "read here"
        )
    return files.size(name, int(text) if re.fullmatch(r"\d{1,12}", text) else value)


class Norm(nn.Module):
    """x / rms(x) * weight + bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = mx.ones((size,)), mx.zeros((size,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, _EPS) + self.bias


class Speculator(nn.Module, LevelDrafter):
    """An MLP or LSTM speculator; a ``drafters.Drafter``."""

    def __init__(self, config: SpeculatorConfig) -> None:
        super().__init__()
        self.config = config
        width, lstm = config.width, config.cell == "lstm"
        stages = 1 if config.tied else config.trained
        inputs = [config.hidden_size, *[width] * ((2 if config.tied else stages) - 1)]
        gates = [f"{gate}_" for gate in GATES] if lstm else [""]
        for gate in gates[: config.embeddings]:
            self[f"{gate}emb"] = [nn.Embedding(config.vocab_size, width) for _ in range(stages)]
        for gate in gates:
            self[f"{gate}proj"] = [nn.Linear(size, width, bias=False) for size in inputs]
        for name in ("cell_ln", "state_ln") if lstm else ("ln",):
            self[name] = [Norm(width) for _ in range(stages)]
        self.head = [nn.Linear(width, config.rows, bias=False) for _ in range(stages)]
        if config.draft_vocab_size:
            self.draft_vocab = mx.zeros((config.draft_vocab_size,), mx.int32)
        w = 0.5 ** (0.5 / config.trained)
        self._mixed = math.sqrt((1 - w**2) * width / 2) / w

    @property
    def levels(self) -> int | None:  # type: ignore[override]
        return None if self.config.tied else self.config.trained

    def bind(self, target: Target) -> Speculator:
        """Leave only the draft vocabulary's output rows, and join what reads the same input."""
        every = integers(range(target.config.vocab_size))
        self._vocabulary = self.draft_vocab if self.config.draft_vocab_size else every
        if self.config.rows != self._vocabulary.shape[0]:
            for layer in self.head:
                files.cut_rows(layer, self._vocabulary)
        if self.config.cell == "lstm":
            every_gate = zip(*(self.pop(f"{gate}_proj") for gate in GATES), strict=True)
            joined = [(fuse(gates), gates) for gates in every_gate]
            self.gates = [[one] if one is not None else list(gates) for one, gates in joined]
            mx.eval(self.parameters())
        return self

    @property
    def vocabulary(self) -> mx.array:  # type: ignore[override]
        return self._vocabulary

    def first(self, context: mx.array, depth: int) -> mx.array:
        """(1, H) -> (1, H)."""
        if not self.config.scale_input:
            return context
        return mx.fast.rms_norm(context, None, _EPS) * math.sqrt(0.5)

    def level(self, index: int, tokens: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
        """state: h at level 0; then s (R, D), and c beside it in an LSTM (R, 2 D)."""
        stage = 0 if self.config.tied else index
        if self.config.cell == "mlp":
            projection = self.proj[min(index, len(self.proj) - 1)]
            token = self.emb[stage](tokens) * self._mixed
            state = nn.gelu(self.ln[stage](projection(state) + token))
            return self.head[stage](state), state
        state, before = (state, None) if index == 0 else mx.split(state, 2, axis=-1)
        forget, enter, leave, new = self._sums(index, tokens, state)
        cell = nn.gelu(self.cell_ln[0](new)) * mx.sigmoid(enter)
        if before is not None:
            cell = cell + before * mx.sigmoid(forget)
        state = nn.gelu(self.state_ln[0](cell)) * mx.sigmoid(leave)
        return self.head[0](state), mx.concatenate([state, cell], axis=-1)

    def _sums(self, index: int, tokens: mx.array, state: mx.array) -> list[mx.array]:
        """What goes into the LSTM's four gates, (R, D) each; added in the kernels that use it."""
        layers = self.gates[min(index, len(self.gates) - 1)]
        products = [
            part for x in layers for part in mx.split(x(state), len(GATES) // len(layers), -1)
        ]
        embeddings = [self[f"{gate}_emb"][0] for gate in GATES[: self.config.embeddings]]
        rows = [embedding(tokens) * self._mixed for embedding in embeddings]
        pairs = zip(products, rows * (len(GATES) // len(rows)), strict=True)
        return [product + row for product, row in pairs]


def is_one(folder: Path, raw: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    """Do a folder's tensors' names say that it holds a speculator?"""
    return looks_so(names, raw)


def looks_so(stored: Mapping[str, Any], raw: Mapping[str, Any]) -> bool:
    """Are tensors named as a speculator's are?"""
    names = renamed(stored, raw)
    return "forget_proj.0.weight" in names or {"emb.0.weight", "proj.0.weight"} <= names.keys()


def renamed(stored: Mapping[str, T], raw: Mapping[str, Any]) -> dict[str, T]:
    """Canonical names -> tensors; without the copies of what levels or gates share."""
    result: dict[str, T] = {}
    tied = raw.get("tie_weights", False)
    for name, value in stored.items():
        inner = name.removeprefix("speculator.")
        match = _PARTS.fullmatch(inner)
        if match is None:
            result[inner] = value
            continue
        part, number, last = match.groups()
        copied = tied and int(number) > (1 if part.endswith("proj") else 0)
        if raw.get("tie_lstm_embs") and part in ("input_emb", "cell_emb", "output_emb"):
            copied = True
        if not copied:
            result[f"{part}.{int(number)}.{last}"] = value
    return result


def _module(
    raw: Mapping[str, Any], given: Mapping[str, Shape], target: Target, folder: Path
) -> Speculator:
    """A speculator of this shape, if it is for the target."""
    config = SpeculatorConfig.of(raw, given, folder)
    files.check_sizes(config.hidden_size, config.vocab_size, target, folder)
    files.check_rows(config.rows, config.vocab_size, config.draft_vocab_size, folder)
    return Speculator(config)


LAYOUT = files.Layout(KIND, lambda folder: (), renamed, _module)


def load(folder: Path, target: Target) -> Speculator:
    """The speculator in a folder, bound to its target; see ``files.Layout.load``."""
    return LAYOUT.load(folder, target).bind(target)


def describe(folder: Path) -> files.Description:
    """What the files say of a speculator. Raises DrafterError."""
    raw, weights = LAYOUT.weights(folder)
    config = SpeculatorConfig.of(raw, shapes(weights), folder)
    later = 1 if config.tied or config.trained == 1 else 0
    # Of an embedding a level reads a row a beam. A level after the first is what counts.
    one = {
        name: value
        for name, value in weights.items()
        if (match := _PARTS.fullmatch(name)) and not match[1].endswith("emb")
        and int(match[2]) == (later if match[1].endswith("proj") and config.tied else 0)
    }  # fmt: skip
    weights_shared = "shared by all levels" if config.tied else "of every level's own"
    facts = {
        "architecture": f"{config.cell} speculator for {config.trained} levels, weights "
        f"{weights_shared}",
        "cell": config.cell,
        "head": "own",
        "head_width": config.width,
        "levels": config.trained,
        "base": raw.get("base_model_name_or_path"),
        "draft_vocabulary": config.draft_vocab_size or config.vocab_size,
    }
    return files.Description(facts, weights, one, config.hidden_size)
