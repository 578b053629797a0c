"""What answers: a loaded model, as the engine thread sees it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from typing import Any, Protocol

from mlx.utils import tree_reduce

from mlx_redrafter import api
from mlx_redrafter.cache.layer import bytes_of
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.prefill.reading import Progress
from mlx_redrafter.runtime.device import memory_bytes
from mlx_redrafter.runtime.paths import json_or_nothing
from mlx_redrafter.server.requests import Generation
from mlx_redrafter.text.answer import GenerationResponse
from mlx_redrafter.text.grammar import Grammars

USABLE = 0.9  # share of a machine's memory that a server may fill
Responses = Generator[GenerationResponse, None, None]


class Engine(Protocol):
    """A model. Only the engine thread calls `answer`; the rest is plain data that any thread reads.

    Attributes:
        name: as clients see it.
        tokenizer: mlx_lm's, or what looks like it.
        context: the most tokens that prompt and answer can have together.
        vocab_size: of the model's logits.
        facts: about the model, for lists of models.
        loaded: when, in seconds of the epoch.
        sampling: what the model's own files say of sampling, by the names of `SamplingParams`.
        keeps_rows: does a drafter keep rows of the text, which an answer needs from a session?
    """

    name: str
    tokenizer: Any
    context: int
    vocab_size: int
    facts: dict[str, Any]
    loaded: float
    sampling: dict[str, Any]
    keeps_rows: bool

    @property
    def graphs(self) -> int:
        """Steps that were traced so far: what runs steadily traces none."""
        ...

    def room(self) -> int:
        """Bytes that sessions may fill, and more."""
        ...

    def grammars(self) -> Grammars:
        """What makes grammars; any thread may. Raises OptionError where nothing can."""
        ...

    def answer(self, asked: Generation, session: Session, progress: Progress) -> Responses:
        """One response per token; closing it ends the answer between two steps. Whatever
        `progress` raises while the prompt is read comes out of it."""
        ...


class ModelEngine:
    """An `Engine` of a model that `mlx_redrafter.load` returned."""

    def __init__(self, model: api.Model, tokenizer: Any, context: int | None = None) -> None:
        config = model.target.config
        self.model, self.tokenizer = model, tokenizer
        self.name = model.name.rstrip("/").rpartition("/")[2] or model.folder.name
        self.context = min(config.max_positions, context or config.max_positions)
        self.vocab_size = config.vocab_size
        self.facts, self.loaded = _facts(model, self.context), time.time()
        self.sampling = _sampling(json_or_nothing(model.folder / "generation_config.json"))
        self.keeps_rows = bool(model.engine.keeping) and model.drafting

    @property
    def graphs(self) -> int:
        """See `Engine`."""
        return self.model.engine.traces

    def room(self) -> int:
        """Bytes that this machine has beside the model."""
        return max(0, int(USABLE * memory_bytes()) - self._weights())

    def _weights(self) -> int:
        weights = self.model.target.parameters()
        size: int = tree_reduce(lambda total, array: total + array.nbytes, weights, 0)
        return size

    def warning(self) -> str | None:
        """What to say where the longest request does not fit this machine beside the model."""
        needed = self._weights() + self.facts["cache_bytes"]
        there = USABLE * memory_bytes()
        if needed <= there:
            return None
        return (
            f"model and cache of a request of {self.context} tokens take {needed / 1e9:.1f} GB, "
            f"and this machine has {there / 1e9:.1f}: start with a smaller --context"
        )

    def grammars(self) -> Grammars:
        """See `Engine.grammars`."""
        return self.model.grammars(self.tokenizer)

    def answer(self, asked: Generation, session: Session, progress: Progress) -> Responses:
        """See `Engine.answer`."""
        return api.stream_generate(
            self.model, self.tokenizer, asked.prompt, asked.max_tokens,
            **options(asked, session, progress),
        )  # fmt: skip


def options(asked: Generation, session: Session, progress: Progress) -> dict[str, Any]:
    """An answer's options by the names of `stream_generate`."""
    sampling = {name: getattr(asked.sampling, name) for name in vars(asked.sampling)}
    return {
        "draft": asked.draft,
        "tree": asked.tree,
        "stop": asked.stop or None,
        "session": session,
        "prompt_progress_callback": progress,
        "sparse_prefill": asked.sparse_prefill,
        "prediction": asked.prediction,
        "grammar": asked.grammar,
        "trees": asked.trees,
        **sampling,
    }


def _facts(model: api.Model, context: int) -> dict[str, Any]:
    size = tree_reduce(lambda total, array: total + array.size, model.target.parameters(), 0)
    drafter = model.drafter_folder.name if model.drafter_folder is not None else None
    quantised = json_or_nothing(model.folder / "config.json").get("quantization")
    bits = quantised.get("bits") if isinstance(quantised, dict) else None
    return {
        "n_ctx_train": model.target.config.max_positions,
        "n_params": None if bits else size,  # of a quantised model they are packed
        "drafter": drafter,
        "quantization": f"{bits} bits" if bits else None,
        "cache_bytes": bytes_of(model.engine.kinds, context, model.target.dtype),
    }


def _sampling(config: dict[str, Any]) -> dict[str, Any]:
    """What generation_config.json wants where nobody says anything: nothing if it does not sample.

    What it has of impossible values is left out.
    """
    if config.get("do_sample") is not True:
        return {}
    names = {"temperature": "temp"} | {
        name: name for name in ("top_p", "top_k", "min_p", "repetition_penalty")
    }
    found: dict[str, Any] = {"temp": 1.0}
    for theirs, ours in names.items():
        if (value := config.get(theirs)) is not None:
            with contextlib.suppress(OptionError):
                SamplingParams(**{ours: value})
                found[ours] = value
    return found
