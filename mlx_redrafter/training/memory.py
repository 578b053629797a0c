"""The memory of a training run, by arithmetic: before a model is loaded, and for the guide.

Symbols: V vocabulary, D hidden size, B answers at once, P prompt tokens, T answer tokens, R
positions of an optimiser step, K its draft steps, S candidates, L layers whose outputs are kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlx_redrafter.models import Decoder, DecoderConfig, Loaded
from mlx_redrafter.models.batched import ROWS_PER_PASS
from mlx_redrafter.models.weights import parameters
from mlx_redrafter.runtime.device import machine
from mlx_redrafter.training import kinds
from mlx_redrafter.training.config import TrainConfig
from mlx_redrafter.training.data import READ_TOKENS
from mlx_redrafter.training.fit import SUPPORT

LONGEST = 1024  # tokens of a prompt from a file, at most
USABLE = 0.75  # share of a machine's memory that a run may fill
_WAVE, _WAVE_BATCHES = 192, 3
_CHUNK, _TEXT = 512, 1024  # tokens of a prompt that decoding reads at once, and of a text
_TEMPLATE = 64  # tokens that a chat template puts around a prompt, at most
# Parts that are there all the time; then those that come in turn.
WRITING = (("keys and values", "pass over prompts", "sampling", "features of a batch"),)
FITTING = (
    ("drafter", "Adam"), ("update", "optimiser step", "target rows"), ("reading features",),
)  # fmt: skip
EVALUATING = (("drafter as written", "decoding"),)
STAGES = (WRITING, FITTING, EVALUATING)


def usable_bytes() -> float:
    """Memory of this machine that a run may fill."""
    return float(USABLE * machine()["memory_gb"] * 2**30)


def weights_of(target: Loaded) -> int:
    """Bytes of the target's weights as they are loaded."""
    return sum(value.nbytes for value in parameters(target).values())


def wave(config: TrainConfig) -> int:
    """Prompts that the model writes at once: they are short, and take as much as a batch."""
    return min(_WAVE, _WAVE_BATCHES * config.batch)


def target_parameters(target: DecoderConfig) -> int:
    """Weights of the target, without the norms."""
    # No array of it is ever made.
    return sum(value.size for value in parameters(Decoder(target)).values() if value.ndim > 1)


def longest_prompt(config: TrainConfig) -> int:
    """P, the most tokens of a prompt in its template."""
    if config.prompts is not None:
        return LONGEST
    return _TEMPLATE + config.prompt_tokens + len((config.system_prompt or "").encode()) // 2


def memory(
    config: TrainConfig,
    target: DecoderConfig,
    shape: Any,
    *,
    weights: float,
    on_gpu: bool = True,
    together: bool = True,
) -> dict[str, int]:
    """Bytes by part: the target's weights, then the parts of STAGES.

    Args:
        shape: of the drafter.
        weights: bytes of the target's weights as loaded; 4-bit ones take about 4.5 bits each.
        on_gpu: 16-bit activations and fused attention; on a CPU neither.
        together: a pass of the target runs a batch, else one sequence.
    """
    item, size, batch = (2 if on_gpu else 4), target.hidden_size, config.batch
    at_once = batch if together else 1
    kind = kinds.of(config)
    layers = len(kind.layers_of(shape, target))
    written = 0 if kind.whole else layers  # layers whose outputs are kept on the way
    prompt = longest_prompt(config)
    per_token = target.kept_per_token * item
    slots = prompt + config.max_tokens
    most = at_once * slots
    if config.prompts is None and together:
        most = max(most, wave(config) * prompt)
    # One layer's slab exists twice while finished answers are dropped.
    slabs = most * per_token * (1 + 1 / target.num_layers)
    drafter = sum(p.size for p in parameters(kind.build(shape)).values())
    rows = config.batch_positions * config.rollout
    seen = 1 + (prompt / config.max_tokens if kind.whole else 0)  # and what is before answers
    support = shape.draft_vocab_size or min(SUPPORT, shape.vocab_size)
    reading = READ_TOKENS * per_token + _pass(target, layers, slots, on_gpu)
    return {
        "target": round(weights),
        "keys and values": round(slabs),
        "pass over prompts": _pass(target, written, prompt, on_gpu),
        # float32: logits, exponentials, their sums, and what is compared.
        "sampling": at_once * target.vocab_size * 4 * 4,
        # float16; once while written and once in one piece for the file.
        "features of a batch": batch * max(prompt, 2 * config.max_tokens) * written * size * 2,
        "drafter": 4 * drafter,
        "Adam": 2 * 4 * drafter,
        # Gradients and clipped ones; weights and moments are made anew beside the old.
        "update": 5 * 4 * drafter,
        # Per draft step: the drafter; logits, both distributions, two gradients.
        "optimiser step": rows * 4 * (kind.row_floats(shape) + 5 * config.candidates)
        + 2 * config.batch_positions * 4 * support
        + round(seen * config.batch_positions) * layers * size * (2 + 4) * 2,
        "target rows": support * size * item,
        "reading features": reading,
        "drafter as written": round(drafter * (config.bits / 8 if on_gpu else 4)),
        # A part of a prompt, what is remembered of a text, and logits of a tree, a few times.
        "decoding": _pass(target, layers, _TEXT, on_gpu) * _CHUNK // ROWS_PER_PASS
        + _TEXT * per_token
        + 64 * target.vocab_size * 4,
    }


def of_stage(parts: dict[str, int], stage: tuple[tuple[str, ...], ...]) -> int:
    """Bytes of one of the STAGES, with the target."""
    always, *turns = (sum(parts[name] for name in names) for names in stage)
    return parts["target"] + always + max(turns, default=0)


def peak(parts: dict[str, int]) -> int:
    """Bytes of the stage that needs most."""
    return max(of_stage(parts, stage) for stage in STAGES)


def fitting_batch(
    config: TrainConfig,
    target: DecoderConfig,
    shape: Any,
    available: float,
    *,
    weights: float,
    on_gpu: bool = True,
    together: bool = True,
) -> int:
    """The largest batch of answers, up to ``config.batch``, that fits in so many bytes, or 1."""

    def fits(batch: int) -> bool:
        parts = memory(
            replace(config, batch=batch), target, shape,
            weights=weights, on_gpu=on_gpu, together=together,
        )  # fmt: skip
        return of_stage(parts, WRITING) <= available

    low, high = 1, config.batch
    while low < high:  # the memory grows with the batch
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _pass(target: DecoderConfig, layers: int, slots: int, on_gpu: bool) -> int:
    """Activations of ROWS_PER_PASS tokens: one layer's, and the outputs that are kept."""
    item, size = (2 if on_gpu else 4), target.hidden_size
    heads = target.num_heads + target.num_kv_heads
    row = item * (6 * size + 2 * heads * target.head_dim + 3 * target.widest_row)
    row += layers * size * (item + 4 + 2)
    scores = 0 if on_gpu else 3 * target.num_heads * slots * item
    return ROWS_PER_PASS * (row + scores)
