"""Tiny drafters in every format, as files; the numbers of the golden variants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli

D, V = 4, 11
GOLDEN = Path(__file__).parent / "golden" / "drafters.npz"
TRAINER = {"num_lookback_tokens": -1, "architectures": ["Drafter"], "torch_dtype": "float32"}
Weights = dict[str, mx.array]


def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file}


def apple_weights(variant: str, dtype: mx.Dtype = mx.float32) -> Weights:
    """The tensors of a golden variant "cell-E-blocks", in Apple's names."""
    pool = golden()
    cell, width, blocks = parts(variant)
    names = {f"lm_head.{blocks}.weight": f"E{width}.out"}
    for i in range(blocks):
        for part in ("weight", "bias"):
            names[f"lm_head.{i}.linear.{part}"] = f"E{width}.block.{i}.{part}"
    if cell == "elman":
        names |= {"rnn_u.weight": "rnn_u", "rnn_u.bias": "rnn_u_bias", "rnn_w.weight": "rnn_w"}
    if width != 2 * D:
        names |= {f"input_proj.{part}": f"input_proj.{part}" for part in ("weight", "bias")}
    return {
        name: mx.array(pool[key].astype(np.float32)).astype(dtype) for name, key in names.items()
    }


def parts(variant: str) -> tuple[str, int, int]:
    cell, width, blocks = variant.split("-")
    return cell, int(width), int(blocks)


def apple_config(variant: str, **changes: Any) -> dict[str, Any]:
    cell, width, blocks = parts(variant)
    return {
        "model_type": "recurrent_drafting_drafter",
        "vocab_size": V,
        "hidden_size": D,
        "exit_dim": width,
        "num_draft_layers": blocks,
        "rnn": cell == "elman",
        **TRAINER,
        **changes,
    }


def renamed(weights: Weights, names: str) -> Weights:
    """Apple's names in another of TensorRT-LLM's name sets: lm_heads or 0; or ModelOpt's."""
    result = {}
    for name, value in weights.items():
        if names == "modelopt":
            name = f"drafter.{name}"
        else:
            name = name.replace("lm_head.", f"{names}.", 1)
            if names == "lm_heads":
                name = name.replace("input_proj.", "input_projs.", 1)
        result[name] = value
    return result


def write(folder: Path, weights: Weights, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sharded(
    folder: Path, weights: Weights, config: dict[str, Any], pieces: int = 3
) -> list[Path]:
    """Numbered files and an index, as save_pretrained writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{i + 1:05d}-of-{pieces:05d}.safetensors" for i in range(pieces)]
    where = {tensor: names[i % pieces] for i, tensor in enumerate(weights)}
    for file in names:
        part = {tensor: weights[tensor] for tensor in weights if where[tensor] == file}
        mx.save_safetensors(str(folder / file), part)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / name for name in names]


def read(folder: Path) -> Weights:
    return dict(mx.load(str(folder / "model.safetensors")))  # type: ignore[arg-type]


def assert_same_bits(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert bytes(memoryview(found[name].view(mx.uint8))) == bytes(
            memoryview(value.view(mx.uint8))
        ), name


def torch_state(weights: Weights) -> Any:
    """As torch tensors; skips a test where torch is not installed."""
    torch = pytest.importorskip("torch")
    state = {}
    for name, value in weights.items():
        if value.dtype == mx.bfloat16:
            bits = torch.tensor(np.array(value.view(mx.int16)))
            state[name] = bits.view(torch.bfloat16)
        else:
            state[name] = torch.tensor(np.array(value))
    return state


def refused(source: Path, *more: str) -> str:
    """The one line that the command says; beside the source nothing has changed."""
    home = source.parent
    before = sorted(path for path in home.rglob("*"))
    arguments = ["convert", str(source), "--out", str(home / "new" / "out"), *more]
    result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert sorted(path for path in home.rglob("*")) == before
    return result.stderr.removeprefix("error: ").rstrip()
