"""The built-in model's GGUF file in MLX layout: weights, configuration, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_redrafter.errors import ConvertError, HubError
from mlx_redrafter.hub.gguf.blocks import GROUP
from mlx_redrafter.hub.gguf.model import GgufModel, mlx_name, quantisation_block, unpermute

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["GROUP", "Gguf", "mlx_name", "quantise", "unpermute"]


class Gguf:
    """SmolLM2's GGUF file. Raises HubError for another one: that is not the built-in model."""

    def __init__(self, path: Path) -> None:
        try:
            self.model = GgufModel(path)
        except ConvertError as error:
            raise HubError(f"only a SmolLM2 GGUF is converted here: {error}") from error
        found = self.model.architecture, self.model.tokenizer.style
        if found != ("llama", "smollm"):
            raise HubError(
                f"{path.name} holds architecture and splitter {found}; "
                "only a SmolLM2 GGUF ('llama', 'smollm') is converted here"
            )

    def config(self) -> dict[str, Any]:
        """`config.json` as transformers and mlx-lm write it for this model."""
        return self.model.config()

    def weights(self, quantised: bool) -> tuple[dict[str, mx.array], dict[str, Any] | None]:
        """Tensors under MLX names, and the `quantization` block of `config.json`.

        quantised=True keeps the packed blocks with float16 scales (everything else float16 too);
        otherwise all is float32 and the block is None.
        """
        import mlx.core as mx

        tensors = self.model.converted(quantised, mx.float16 if quantised else mx.float32)
        weights = {f"{t.base}.{part}": value for t in tensors for part, value in t.parts.items()}
        return weights, self.model.quantisation() if quantised else None

    def save_tokenizer(self, folder: Path) -> dict[str, Any]:
        """Write `tokenizer.json`; returns what belongs in `tokenizer_config.json`."""
        self.model.tokenizer.save(folder)
        return self.model.tokenizer.config(self.model.context_length)


def quantise(weights: dict[str, mx.array]) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Full-precision tensors -> the same widths as in the GGUF file, and the block that says so.

    Matrices get 4 bits; the embedding, which is also the output head, gets 8. Rest: float16.
    """
    import mlx.core as mx

    out: dict[str, mx.array] = {}
    bits: dict[str, int] = {}
    for name, value in weights.items():
        value = value.astype(mx.float16)
        if value.ndim != 2:
            out[name] = value
            continue
        base = name[: -len(".weight")]
        bits[base] = 8 if base == "model.embed_tokens" else 4
        packed = mx.quantize(value, group_size=GROUP, bits=bits[base])
        for part, array in zip(("weight", "scales", "biases"), packed, strict=True):
            out[f"{base}.{part}"] = array
    return out, quantisation_block(bits)
