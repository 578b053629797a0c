"""Folders with one machine's share, and what a machine holds and reads of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapter_cases import TYPES, module_of
from conftest import hidden_states
from delta_cases import DELTA_CASES
from mlx.utils import tree_flatten
from shared_in_threads import on_all
from tiny_models import BASE, build, save

from mlx_redrafter.distributed.link import Link
from mlx_redrafter.distributed.sharding import Seat, shard
from mlx_redrafter.distributed.split import Planned, Split
from mlx_redrafter.errors import ModelError, OptionError
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.models.weights import parameters

TOKENS = [5, 3, 8, 1, 9, 2, 7]
CASES = [
    ("llama", "tensor"), ("gemma3_text", "tensor"), ("gemma3_text", "pipeline"),
    ("qwen3_next", "tensor"), ("mixtral", "pipeline"), ("gpt_oss", "tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_a_share_is_what_a_machine_cuts_itself(case: str, kind: str, tmp_path: Path) -> None:
    """Seen to fail: a share is arranged once more when it is read."""
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    if case in DELTA_CASES:
        raw = DELTA_CASES[case]
        save(model, raw, dict(tree_flatten(module_of(raw, lively=True).parameters())))
    else:
        build(model, case)
    shard(model, out, 2, Split(kind))
    (whole, stored) = ([model, model], [out / "rank-0", out / "rank-1"])

    def work(folders: list[Path]) -> Any:
        def on(link: Link) -> np.ndarray:
            target = load_model(folders[link.rank], plan=Planned(link, Split()))
            return hidden_states(target, TOKENS)

        return on

    def cut(link: Link) -> np.ndarray:
        return hidden_states(load_model(model, plan=Planned(link, Split(kind))), TOKENS)

    assert np.array_equal(on_all(2, work(stored)), on_all(2, cut))
    assert whole[0].joinpath("config.json").read_text() != stored[0].joinpath("config.json")


def test_shares_are_refused_where_they_do_not_belong(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    build(model, "llama")
    shard(model, out, 2, Split("pipeline"))
    with pytest.raises(OptionError, match="is there already"):
        shard(model, out, 2, Split("pipeline"))
    with pytest.raises(OptionError, match="give 2 or more"):
        shard(model, tmp_path / "new", 1, Split())
    with pytest.raises(ModelError, match="one machine's share already"):
        shard(out / "rank-0", tmp_path / "new", 2, Split("pipeline"))
    with pytest.raises(ModelError, match="4 machines cannot share"):
        shard(model, tmp_path / "new", 4, Split("pipeline"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ModelError, match="load it with --hosts"):
        load_model(out / "rank-0")
    with pytest.raises(ModelError, match="machine 0 of 2, and this is machine 1 of 2"):
        load_model(out / "rank-0", plan=Planned(Seat(1, 2), Split()))
    with pytest.raises(ModelError, match="cut for --split pipeline"):
        load_model(out / "rank-0", plan=Planned(Seat(0, 2), Split("tensor")))
    raw = TYPES["gpt2"]
    save(model, raw, dict(tree_flatten(module_of(raw).parameters())))
    with pytest.raises(ModelError, match="mlx_lm's own module"):
        shard(model, tmp_path / "new", 2, Split("pipeline"))


LARGE = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 48,
    "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are nearly all of it."""
    folder = tmp_path_factory.mktemp("large")
    build(folder, "llama", **LARGE)
    return folder


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    "split", [Split("tensor"), Split("tensor", (3, 2, 1)), Split("pipeline", (2, 1, 1))]
)
def test_memory_is_the_share_while_loading_too(
    split: Split, stored: bool, large: Path, tmp_path: Path
) -> None:
    """Seen to fail: the parts of a cut that keep all of it; a model that is read at once."""
    shares = split.for_size(3)
    whole = sum(v.nbytes for n, v in read(large).items() if n.startswith("model.layers."))
    rest = sum(v.nbytes for n, v in read(large).items() if not n.startswith("model.layers."))
    if stored:
        shard(large, tmp_path / "out", 3, split)
    for rank, share in enumerate(shares):
        folder = tmp_path / "out" / f"rank-{rank}" if stored else large
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        target = load_model(folder, plan=Planned(Seat(rank, 3), split))
        peak, held = mx.get_peak_memory() - before, mx.get_active_memory() - before
        expected = whole * share / sum(shares) + rest
        assert held == pytest.approx(expected, rel=0.1)
        # What is cut here is read whole, a layer at a time.
        assert held <= peak < 1.1 * expected + (0 if stored else whole / LARGE["num_hidden_layers"])
        assert sum(v.nbytes for v in parameters(target).values()) == pytest.approx(held, rel=0.05)
        assert isinstance(target, Decoder)
        del target


def read(folder: Path) -> dict[str, mx.array]:
    found = mx.load(str(folder / "model.safetensors"))
    assert isinstance(found, dict)
    return found


def test_the_config_says_what_is_stored(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    build(model, "llama", **BASE)
    found = shard(model, tmp_path / "out", 2, Split("pipeline", (1, 1)))
    sizes = [size for _, size in found]
    alone = sum(value.nbytes for value in read(model).values())
    assert max(sizes) < alone < sum(sizes)
    said = json.loads((tmp_path / "out" / "rank-1" / "config.json").read_text())
    assert said["mlx_redrafter_share"]["rank"] == 1
