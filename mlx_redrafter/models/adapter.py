"""Any model that mlx_lm runs, as a target: its own module, unmodified, over a draft tree.

The module gets caches that answer for every node, and a few functions of mlx_lm are exchanged while
a pass is traced (`patches`). Everything that varies is an array, so a step stays one graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.cache.layer import LayerCache, Pass
from mlx_redrafter.cache.packed import Packing, packed
from mlx_redrafter.errors import ModelError, OptionError
from mlx_redrafter.models import own_patches
from mlx_redrafter.models.attention import dense
from mlx_redrafter.models.decoder import DECODING, Functions, Part
from mlx_redrafter.models.observed import Observed, config_of, dequantised
from mlx_redrafter.models.patches import Place, capture, layers, patched
from mlx_redrafter.models.running import Layout, Running
from mlx_redrafter.models.stacked import StackPass
from mlx_redrafter.runtime.device import fused_kernels

_PROBE = 8  # tokens; more than a short convolution reads


class AdaptedModel(nn.Module):
    """An mlx_lm module as a `models.Target`.

    Args:
        module: as mlx_lm loads it.
        raw: its config.json.
        closed: recurrences in closed form, which reads a state once for all nodes; False: a step
            for every node, to the bit what single tokens give. None: as the device wants it.

    Raises:
        ModelError: the module does something that no tree can be drafted for.
    """

    def __init__(
        self, module: nn.Module, raw: Mapping[str, Any], closed: bool | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self._type = type(module).__module__.rpartition(".")[2]
        self._closed = fused_kernels() if closed is None else closed
        try:
            self._learn(raw)
        except ModelError:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError,
                StopIteration, TypeError, ValueError) as error:  # fmt: skip
            raise ModelError(
                f"model_type '{raw.get('model_type')}' cannot be run over a draft tree "
                f"({' '.join(str(error).split())[:160] or type(error).__name__}); "
                "run it with mlx_lm.generate, which does not draft"
            ) from error

    @property
    def dtype(self) -> mx.Dtype:
        """Of the activations."""
        return self._seen.dtype

    @property
    def caches(self) -> Sequence[LayerCache]:
        """What layers remember: keys, values and the arrays of a recurrence, one by one."""
        return self._caches

    def pack(self, packing: Packing) -> None:
        """As `Decoder.pack`. The module reads them unpacked: a layer's at a time, in every pass."""
        self._layout.kinds[:] = packed(self._caches, packing)

    @property
    def routes(self) -> int:
        """Experts that a token is sent to, over all layers, where mlx_lm's own parts hold them."""
        return self._routes

    @property
    def closed(self) -> bool:
        """Are recurrences computed in closed form?"""
        return self._closed

    def __call__(
        self,
        tokens: mx.array,
        positions: mx.array,
        mask: mx.array,
        key_positions: mx.array,
        caches: Pass,
        layers: Sequence[int] = (),
        functions: Functions = DECODING,
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        """Run N tokens; see `Decoder.__call__`. A pass without ancestors is a chunk of a prompt.

        Raises:
            OptionError: attention other than dense.
        """
        if functions.attend is not dense:
            raise OptionError(
                f"model_type '{self.config.model_type}' runs as mlx_lm's own module, whose "
                "attention cannot be made sparse; needed: --sparse-prefill off"
            )
        run = self._running(caches, positions, mask, key_positions)
        self._run(run, tokens, self._places)
        caches.settle(self._caches)
        if functions.routed is not None:
            for chosen in run.chosen:
                functions.routed(chosen)
        assert run.hidden is not None
        wanted = tuple(self._output(run, i) for i in layers)
        return run.hidden.reshape(positions.shape[0], -1), wanted

    stacks = False

    def common(self, *arrays: mx.array) -> Sequence[mx.array]:
        """What is given: one machine runs all of it."""
        return arrays

    def together(
        self,
        parts: Sequence[Part],
        layers: Sequence[int] = (),
        functions: Functions = DECODING,
        stacks: Sequence[StackPass] = (),
    ) -> list[tuple[mx.array, tuple[mx.array, ...]]]:
        """Run several sequences, one behind the other: a module of mlx_lm reads one."""
        return [self(*part, layers, functions) for part in parts]

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden (M, D) after the final norm -> logits (M, V)."""
        return self._logits(hidden, [])

    def _logits(self, hidden: mx.array, more: list[Place]) -> mx.array:
        rows = hidden.shape[0]

        def given(_: Running, stock: Any) -> Any:
            def call(module: Any, *args: Any, **options: Any) -> Any:
                return (
                    hidden[None]
                    if module is self._seen.backbone
                    else stock(module, *args, **options)
                )

            return call

        # Whatever else the module computes of these tokens is not read, and so never run.
        head = Place(type(self._seen.backbone), "__call__", given)
        with patched(cast(Running, None), [head, *more]):
            out: mx.array = self.module(mx.zeros((1, rows), mx.int32))
        return out.reshape(rows, -1)

    def scaled(self, out: mx.array) -> mx.array:
        """Products with output rows (M, *) -> logits, scaled and soft-capped."""
        found: list[mx.array] = []

        def given(_: Running, stock: Any) -> Any:
            def call(module: Any, x: mx.array) -> mx.array:
                if module is not self._seen.head or found:
                    result: mx.array = stock(module, x)
                    return result
                found.append(out * x.reshape(-1)[0])  # what the state was divided by before
                return found[0][None]

            return call

        name = "as_linear" if self.config.tied else "__call__"
        ones = mx.ones((out.shape[0], self.config.hidden_size), self._seen.dtype)
        logits = self._logits(ones, [Place(type(self._seen.head), name, given)])
        return logits.reshape(out.shape) if found else out

    def embed(self, tokens: mx.array) -> mx.array:
        """tokens (...,) -> rows of the input embedding (..., D), without the embedding scale."""
        return self._seen.embedding(tokens).astype(self.dtype)

    def head_rows(self, ids: mx.array) -> mx.array:
        """ids (K,) -> rows (K, D) of the output head or tied embedding, dequantised."""
        return dequantised(self._seen.head, ids).astype(self.dtype)

    def norm(self, x: mx.array) -> mx.array:
        """What the last layer puts out (..., D) -> what the head reads.

        Raises ModelError where the module has no norm of its own for it.
        """
        if self._seen.norm is None:
            raise ModelError(
                f"model_type '{self.config.model_type}' has no final norm that can be run alone; "
                "needed: a drafter that reads final hidden states only"
            )
        out: mx.array = self._seen.norm(x)
        return out

    def _running(
        self, caches: Pass, positions: mx.array, mask: mx.array, key_positions: mx.array
    ) -> Running:
        scalar = self._type in own_patches.SCALAR
        return Running(
            self._layout.kinds, caches, positions, mask, key_positions, self._closed, scalar
        )

    def _run(self, run: Running, tokens: mx.array, where: Sequence[Place]) -> None:
        stand_ins = self._layout.stand_ins(run)
        with patched(run, where):
            # A filler's token is below 0, and an embedding of several tokens counts with it.
            self.module(mx.maximum(tokens, 0)[None], cache=stand_ins)

    def _output(self, run: Running, layer: int) -> mx.array:
        out = run.outputs.get(layer)
        if out is None or out.ndim != 3 or out.shape[-1] != self.config.hidden_size:
            raise ModelError(
                f"model_type '{self.config.model_type}' does not say what layer {layer} puts out; "
                "needed: a drafter that reads final hidden states only"
            )
        return out[0]

    def _learn(self, raw: Mapping[str, Any]) -> None:
        """Run a few tokens without computing anything: what the module remembers, and where its
        parts are. Then a tree, which says who extends what."""
        caches = make_prompt_cache(self.module)
        seen = Observed(self.module, mx.zeros((1, _PROBE), mx.int32), caches)
        self._seen = seen  # not as parts of this module: their weights are counted once
        masked = any(type(m).__name__ == "KimiK3DeltaAttention" for m in self.module.modules())
        self._layout = Layout(caches, masked, own_patches.ROWS.get(self._type))
        blocks = list(getattr(self.module, "layers", ()))
        pairs = zip(self._layout.arrays, self._layout.kinds, strict=True)
        slabs = [array for array, kind in pairs if kind is not None]
        self.config = config_of(raw, seen, slabs, len(blocks))
        final = Place(type(self._seen.backbone), "__call__", capture(self._seen.backbone))
        self._places = [*own_patches.places(self.module), final]
        self._places += [Place(cls, "__call__", layers(blocks)) for cls in {*map(type, blocks)}]
        self._try()
        self._caches = cast(list[LayerCache], self._layout.kinds)
        self._layout.forget()

    def _try(self) -> None:
        kinds, n = self._layout.kinds, 3
        kept = [
            kind.empty(_PROBE, self._seen.dtype)
            if kind is not None
            else mx.zeros(array.shape, array.dtype)
            for kind, array in zip(kinds, self._layout.arrays, strict=True)
        ]
        ancestors = mx.array([[True, False, False], [True, True, False], [True, False, True]])
        run = Pass(kept, mx.array([0], mx.int32), ancestors)
        slots = mx.arange(_PROBE, dtype=mx.int32)
        mask = mx.pad(ancestors, [(0, 0), (0, _PROBE - n)])
        positions = mx.array([0, 1, 1], mx.int32)
        running = self._running(run, positions, mask, slots)
        self._run(running, mx.zeros((n,), mx.int32), self._places)
        self._routes = sum(chosen.size for chosen in running.chosen) // n
        for slot, kind in enumerate(kinds):
            if kind is None:
                raise TypeError(f"nothing says what becomes of state {slot} at a node")
