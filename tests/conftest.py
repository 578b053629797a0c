"""Shared by the tests: a tiny random target, drafters that guess well or badly, a tokenizer."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
from browsing import browser
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_mlx_lm
from tiny_gguf import write_gguf

from mlx_redrafter.budget.chunks import Chunks
from mlx_redrafter.budget.costs import Costs
from mlx_redrafter.budget.machine import Budget
from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.policy import Policy
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.drafters.beam import BeamDrafter
from mlx_redrafter.drafters.lookup import Lookup
from mlx_redrafter.drafters.recurrent import ReDrafter, ReDrafterConfig
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

V, D = 97, 32
os.environ["MLX_ENABLE_TF32"] = "0"  # float32 is compared as such, on every GPU

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # MLX writes the kernels that it compiles into the temporary folder under fixed names: two
    # processes that make the same one at once would load a half-written library.
    own = f"mlx-redrafter-{os.getuid()}-{worker}"
    tempfile.tempdir = os.environ["TMPDIR"] = str(Path(tempfile.gettempdir(), own))
    Path(tempfile.tempdir).mkdir(parents=True, exist_ok=True)

# A shell starts background jobs with these ignored, and their children would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

SHAPES = {
    "chain": TreeShape.chain(4),
    "beam-3x4-8": TreeShape(3, 4, 8),
    "beam-4x5-16": TreeShape(4, 5, 16),
    "beams-3x4-8": TreeShape(3, 4, 8, "beams"),
    "beams-all": TreeShape(3, 3, 10, "beams"),
    "lookup": TreeShape(1, 0, 6, lookup=5),
    "beam-and-lookup": TreeShape(3, 3, 9, lookup=6),
}
COSTS = Costs({1: 10e-3, 2: 10.5e-3, 4: 11e-3, 8: 14e-3, 16: 22e-3}, (1e-6, 2e-6),
              {w: (0.3e-3, 0.3e-3 * w) for w in (1, 2, 3, 4)}, 0.5e-3)  # fmt: skip
CHUNKS = Chunks(dict.fromkeys((128, 512, 1024), 1e-5), {128: 3e-5, 512: 2e-5, 1024: 4e-5}, 2)
# The right token is first, second or third choice, or none: long runs, side branches, rejections.
RANKS = (0, 1, 0, 0, 2, 0, 0, 0, 1, 9, 0)
PENALTIES = SamplingParams(
    repetition_penalty=1.4, repetition_context_size=7, presence_penalty=0.8,
    presence_context_size=30, frequency_penalty=0.6, frequency_context_size=12,
    logit_bias={3: 2.5, 40: -3.0},
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def own_data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test finds or leaves a drafter in the data folder of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_REDRAFTER_DATA", str(tmp_path_factory.mktemp("data")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A GPU has other kernels for one row than for several, and adds in no fixed order."""
    if mx.default_device() == mx.Device(mx.gpu):
        skipped = pytest.mark.skip(reason="MLX computes on the GPU: its last bits are not asserted")
        for item in items:
            if "bits" in item.keywords:
                item.add_marker(skipped)


@pytest.fixture(autouse=True)
def known_costs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of other things need not measure the machine: drafting a little always pays."""
    if "measured" not in request.keywords:
        costs = lambda *_, **__: Costs.from_dict(COSTS.as_dict())  # noqa: E731
        monkeypatch.setattr(Budget, "costs", costs)
        monkeypatch.setattr(Budget, "chunks", lambda *_, **__: CHUNKS)


def write_target(folder: Path, seed: int = 7, **changes: Any) -> Path:
    """A model folder with random float32 weights, large enough that the context matters."""
    from mlx_lm import utils

    config = {**TINY, **changes}
    model_class, args_class = utils._get_classes(config)
    model = model_class(args_class.from_dict(json.loads(json.dumps(config))))
    rng = np.random.default_rng(seed)
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        noise = rng.standard_normal(value.shape)
        scale = 3.0 if name.startswith("lm_head") else 1.8
        is_norm = name.endswith("norm.weight")
        weights[name] = 1 + 0.2 * noise if is_norm else noise * scale / value.shape[-1] ** 0.5
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {name: mx.array(value.astype(np.float32)) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    return folder


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def target(target_folder: Path) -> Decoder:
    return load_model(target_folder)


@pytest.fixture(scope="session")
def mlx_lm_model(target_folder: Path) -> nn.Module:
    """The same weights in mlx_lm's own implementation."""
    return load_mlx_lm(target_folder)[0]


def random_drafter(target: Decoder, seed: int = 1, **config: Any) -> ReDrafter:
    """A ReDrafter with random weights, bound to ``target``."""
    size = target.config.hidden_size
    values: dict[str, Any] = {"exit_dim": 2 * size, "num_draft_layers": 1, **config}
    drafter = ReDrafter(ReDrafterConfig(size, target.config.vocab_size, **values))
    rng = np.random.default_rng(seed)
    weights = []
    for name, value in tree_flatten(drafter.parameters()):
        if name == "draft_vocab":
            ids = np.sort(rng.permutation(target.config.vocab_size)[: value.size])
            weights.append((name, mx.array(ids.astype(np.int32))))
        else:
            noise = rng.standard_normal(value.shape) * 1.5 / value.shape[-1] ** 0.5
            weights.append((name, mx.array(noise.astype(np.float32))))
    drafter.load_weights(weights)
    return drafter.bind(target)


@pytest.fixture(scope="session")
def drafter(target: Decoder) -> ReDrafter:
    return random_drafter(target)


def hidden_states(target: Decoder, tokens: Sequence[int]) -> np.ndarray:
    """Final hidden state after every token of a sequence, from one causal pass: (T, D)."""
    n = len(tokens)
    capacity = capacity_for(n)
    slots, zero = mx.arange(capacity, dtype=mx.int32), mx.array([0], mx.int32)
    positions = slots[:n]
    run = Pass(new_caches(target.caches, capacity, target.dtype), zero)
    ids, mask = mx.array(list(tokens), mx.int32), slots[None] <= positions[:, None]
    return np.array(target(ids, positions, mask, slots, run)[0])


class Scripted(BeamDrafter):
    """A drafter of the target's whole vocabulary that takes its step by the hidden state."""

    def context(self, read: mx.array) -> mx.array:
        return read

    def follow(
        self, picks: mx.array, state: mx.array, fixed: mx.array
    ) -> tuple[mx.array, mx.array]:
        return self.step(picks, state, fixed)

    def token_ids(self, picks: mx.array) -> mx.array:
        return picks


class Oracle(Scripted):
    """A drafter that knows how answers go on; it recognises the place by the hidden state.

    Args:
        target: the model.
        texts: whole sequences, prompt and plain answer.
        ranks: the right token of a place is the drafter's choice number ``ranks[i % len(ranks)]``
            there, behind wrong ones; a number of ``FAN`` and more: not among its choices at all.
    """

    FAN = 6

    def __init__(
        self, target: Decoder, texts: Sequence[Sequence[int]], ranks: Sequence[int] = (0,)
    ) -> None:
        vocab = target.config.vocab_size
        self.vocabulary = mx.arange(vocab, dtype=mx.int32)
        rng = np.random.default_rng(0)
        hidden, rows = [], []
        for text in texts:
            hidden.append(hidden_states(target, text))
            for place in range(len(text)):
                right = text[place + 1] if place + 1 < len(text) else 0
                order = [t for t in rng.permutation(vocab) if t != right][: self.FAN]
                order.insert(ranks[len(rows) % len(ranks)], right)
                row = np.full(vocab, -1000.0, np.float32)
                # Gaps far above any noise: the ranks hold in sampled runs too.
                row[order[: self.FAN]] = -60.0 * np.arange(min(self.FAN, len(order)))
                rows.append(row)
        # One size for all, as it is a constant of the compiled step: kernels serve every oracle.
        more = -len(rows) % 512
        places = np.pad(np.concatenate(hidden), ((0, more), (0, 0)), constant_values=np.inf)
        self._hidden = mx.array(places)
        self._rows = mx.array(np.pad(np.stack(rows), ((0, more), (0, 0)), mode="edge"))
        mx.eval(self._hidden, self._rows)

    def start(self, context: mx.array) -> tuple[mx.array, mx.array]:
        place = mx.argmin(mx.square(self._hidden - context[None]).sum(-1))
        return place.astype(mx.float32).reshape(1, 1), context

    def step(self, tokens: mx.array, state: mx.array, fixed: mx.array) -> tuple[mx.array, mx.array]:
        state = state + 1  # the root's own place
        place = mx.clip(state[:, 0].astype(mx.int32), 0, self._rows.shape[0] - 1)
        return mx.take(self._rows, place, axis=0), state


class Constant(Scripted):
    """A drafter with the same logits whatever happens: ties, infinities, NaN."""

    def __init__(self, target: Decoder, row: np.ndarray) -> None:
        self.vocabulary = mx.arange(target.config.vocab_size, dtype=mx.int32)
        self._row = mx.array(row.astype(np.float32))

    def start(self, context: mx.array) -> tuple[mx.array, mx.array]:
        return mx.zeros((1, 1)), context

    def step(self, tokens: mx.array, state: mx.array, fixed: mx.array) -> tuple[mx.array, mx.array]:
        return mx.broadcast_to(self._row[None], (tokens.shape[0], self._row.size)), state


def engine_of(target: Decoder, drafter: Drafter | None = None, compiled: bool = True) -> Engine:
    """An engine that drafts from the text and with a drafter."""
    return Engine(target, [Lookup(), *([drafter] if drafter is not None else [])], compiled)


def asked(
    prompt: Sequence[int],
    params: SamplingParams | None = None,
    shape: TreeShape | Policy | None = None,
    max_tokens: int = 24,
    **more: Any,
) -> Request:
    """A request; plain and greedy unless told otherwise, and without what is None."""
    params = SamplingParams() if params is None else params
    shape = TreeShape.plain() if shape is None else shape
    given = {name: value for name, value in more.items() if value is not None}
    return Request(prompt, params, shape, max_tokens, **given)


def one_pass(
    target: Decoder,
    tokens: mx.array,
    positions: mx.array,
    mask: mx.array,
    key_positions: mx.array,
    caches: Sequence[Any],
    at: mx.array,
    **more: Any,
) -> tuple[mx.array, tuple[mx.array, ...], list[Any]]:
    """hidden, wanted outputs and the caches after a pass whose rows go to the slots from ``at``."""
    run = Pass(caches, at)
    hidden, outputs = target(tokens, positions, mask, key_positions, run, **more)
    return hidden, outputs, run.caches


def run(
    engine: Engine,
    prompt: Sequence[int],
    params: SamplingParams | None = None,
    shape: TreeShape | None = None,
    max_tokens: int = 24,
    session: Session | None = None,
    stats: DraftStats | None = None,
    **more: Any,
) -> list[int]:
    """All tokens of an answer."""
    request = asked(prompt, params, shape, max_tokens, session=session, stats=stats, **more)
    return [token for step in engine.generate(request) for token in step.tokens]


def prompt_of(length: int, seed: int = 0, vocab: int = V) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


def plainly(
    target: Decoder, prompt: list[int], n: int = 24, params: SamplingParams | None = None
) -> list[int]:
    """The answer without a drafter; uncompiled, which for a few tokens is quicker."""
    return run(engine_of(target, None, compiled=False), prompt, params, None, n)


@pytest.fixture(scope="session")
def texts(target: Decoder) -> list[tuple[list[int], list[int]]]:
    """A few prompts and their plain greedy answers."""
    prompts = [prompt_of(n, seed=n) for n in (2, 3, 9, 20, 33)]
    return [(prompt, plainly(target, prompt, 40)) for prompt in prompts]


@pytest.fixture(scope="session")
def oracle(target: Decoder, texts: list[tuple[list[int], list[int]]]) -> Oracle:
    return Oracle(target, [p + a for p, a in texts], RANKS)


def assert_holds(session: Session, target: Decoder, tokens: list[int]) -> None:
    """The session says it holds ``tokens``, and its slabs are those of reading them afresh."""
    assert session.tokens == tokens
    fresh = Session()
    run(engine_of(target, None, compiled=False), [*tokens, 0], max_tokens=1, session=fresh)
    for mine, theirs in zip(session.caches, fresh.caches, strict=True):
        rows = np.array(mine)[:, :, : len(tokens)], np.array(theirs)[:, :, : len(tokens)]
        assert np.allclose(*rows, atol=1e-4)


class ByteTokenizer:
    """One token per byte, three special ones behind; the slice of mlx_lm's wrapper we use."""

    BOS, EOS, PAD = 256, 257, 258
    vocab_size = 259
    bos_token, eos_token_id = "<bos>", EOS

    def __init__(self) -> None:
        self.eos_token_ids = {self.EOS}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.BOS] * add_special_tokens + list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")

    @property
    def detokenizer(self) -> Any:
        from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer

        return NaiveStreamingDetokenizer(self)


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def byte_target(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("byte_target")
    return load_model(write_target(folder, vocab_size=ByteTokenizer.vocab_size))


@pytest.fixture(name="cache")
def models_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="module", name="chromium")
def running_chromium() -> Iterator[Any]:
    with browser() as found:
        yield found
