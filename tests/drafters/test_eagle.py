"""EAGLE heads of every dialect: against plain NumPy, in float64 and without a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
import tiny_eagle
from conftest import prompt_of, write_target
from eagle_calls import at_the_end, proposed, read, said
from tiny_eagle import DIALECTS, Head, Reference, loaded
from tiny_heads import paths, quantise

from mlx_redrafter.drafters import eagle_files, files, rollout
from mlx_redrafter.drafters.eagle import Attention, Branches, Eagle
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.models.weights import shapes
from mlx_redrafter.tree.shape import TreeShape

TEXT = prompt_of(23, seed=11)
DEPTH = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("deep"), num_hidden_layers=tiny_eagle.LAYERS)


@pytest.fixture(scope="module")
def deep(folder: Path) -> Decoder:
    return load_model(folder)


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, np.ndarray]:
    weights = mx.load(str(folder / "model.safetensors"))
    return {name: np.array(value) for name, value in weights.items()}


def assert_says(
    drafter: Eagle, head: Head, target: Decoder, stored: dict[str, np.ndarray], width: int = 3
) -> None:
    """Logits along a draft, the greedy draft, and the costs of a tree."""
    assert drafter.features == head.layers
    place = at_the_end(drafter, target, TEXT)
    meant = Reference(head, stored["model.embed_tokens.weight"], stored["lm_head.weight"])
    drafted = meant.chain(TEXT, place.read, DEPTH)
    expected, found = meant.said(TEXT, place.read, drafted), said(drafter, place, drafted)
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    (chain,) = proposed(drafter, place, TreeShape.chain(DEPTH))
    assert chain.paths.tolist()[0][1 : DEPTH + 1] == drafted
    tree = paths(proposed(drafter, place, TreeShape(width, 3, 1 + 3 * width)))
    assert len(tree) == 3 * width and len({tuple(path) for path, _ in tree}) == 3 * width
    near = 1e-5 * max(10.0, np.abs(expected).max())
    for path, cost in tree:
        assert cost == pytest.approx(meant.cost(TEXT, place.read, path), abs=near)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_against_numpy(
    deep: Decoder, stored: dict[str, np.ndarray], tmp_path: Path, name: str
) -> None:
    head = DIALECTS[name]
    assert_says(loaded(tmp_path, head, deep), head, deep, stored)


@pytest.mark.parametrize("name", ["speculators-llama", "eagle-1"])
def test_first_choices_at_every_position(
    deep: Decoder, stored: dict[str, np.ndarray], tmp_path: Path, name: str
) -> None:
    """What the self-check counts: of one reading of the text, with its true tokens as roots."""
    head = DIALECTS[name]
    drafter = loaded(tmp_path, head, deep)
    features = read(deep, TEXT, head.layers)
    found = rollout.first_choices(drafter, features, mx.array(TEXT, mx.int32)).tolist()
    meant = Reference(head, stored["model.embed_tokens.weight"], stored["lm_head.weight"])
    g = np.array(features.of(head.layers))
    assert found == [meant.chain(TEXT[: p + 2], g[: p + 1], 1)[0] for p in range(len(TEXT) - 1)]


@pytest.mark.parametrize("name", ["specforge", "deepspec", "eagle-1-biased", "narrower"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stay", [False, True])
def test_packed_weights(
    deep: Decoder, stored: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, bits: int, stay: bool,
) -> None:  # fmt: skip
    """As MLX packs them, unpacked as on a CPU or left as they are; an own embedding too."""
    if stay:
        monkeypatch.setattr(files, "dequantize_model", lambda model: model)
    head = next(head for known, head in DIALECTS.items() if known.startswith(name))
    parts = ["fc.", "_proj", "lm_head", "embed_tokens"]
    whole = {n: w for n, w in head.weights.items() if w.ndim != 2 or w.shape[1] % 32 == 0}
    packed, meant = quantise(whole, bits, parts)
    config = head.config | {"quantization": {"group_size": 32, "bits": bits}}
    head = replace(head, config=config, weights=head.weights | packed, meant=meant)
    drafter = loaded(tmp_path, head, deep)
    assert isinstance(drafter.fc, nn.QuantizedLinear) is (stay and "fc.scales" in packed)
    assert_says(drafter, head, deep, stored)


def test_half_precision_stays_it(
    folder: Path, stored: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """A target of 16 bits: nothing on the way becomes wider."""
    halved, head = load_model(folder, dtype=mx.bfloat16), DIALECTS["specforge"]
    drafter = loaded(tmp_path, head, halved)
    place = at_the_end(drafter, halved, TEXT)
    cell = Branches(drafter, place.own.settled(0, drafter.caches[0]), place.position)
    state, fixed = cell.start(place.state[0])
    for token in (5, 60, 7):
        logits, state = cell.step(mx.array([token]), state, fixed)
        assert {logits.dtype, state[0].dtype, place.own.caches[0].dtype} == {mx.bfloat16}
    meant = Reference(head, stored["model.embed_tokens.weight"], stored["lm_head.weight"])
    expected = meant.said(TEXT, place.read, [60, 7, 1])
    found = said(drafter, at_the_end(drafter, halved, TEXT), [60, 7, 1])
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


# Mistakes, and a dialect that shows each of them.


def tokens_that_were_read(patch: pytest.MonkeyPatch) -> str:
    """Pairs of a hidden state and its own token."""
    absorb = Eagle.absorb

    def wrong(self: Eagle, chunk: Any, own: Any) -> None:
        absorb(self, chunk._replace(following=chunk.tokens), own)

    patch.setattr(Eagle, "absorb", wrong)
    return "specforge"


def rollouts_a_position_on(patch: pytest.MonkeyPatch) -> str:
    """The root's pair at the root's position and not at the one before."""
    init = Branches.__init__

    def wrong(self: Branches, head: Eagle, slab: mx.array, position: mx.array) -> None:
        init(self, head, slab, position)
        self._position = position + 1

    patch.setattr(Branches, "__init__", wrong)
    return "specforge"


def every_branch_is_seen(patch: pytest.MonkeyPatch) -> str:
    attended = Attention.attended

    def wrong(self: Attention, u: Any, positions: Any, slab: Any, seen: Any, branches: Any) -> Any:
        if branches is not None:
            branches = branches[0], mx.ones_like(branches[1])
        return attended(self, u, positions, slab, seen, branches)

    patch.setattr(Attention, "attended", wrong)
    return "specforge"


def a_pair_does_not_see_itself(patch: pytest.MonkeyPatch) -> str:
    attended = Attention.attended

    def wrong(self: Attention, u: Any, positions: Any, slab: Any, seen: Any, branches: Any) -> Any:
        if branches is not None:
            rows, above = branches
            branches = (
                rows,
                mx.concatenate(
                    [above[:, : -u.shape[0]], mx.zeros((u.shape[0],) * 2, mx.bool_)], axis=1
                ),
            )
        return attended(self, u, positions, slab, seen, branches)

    patch.setattr(Attention, "attended", wrong)
    return "specforge"


def the_root_is_not_seen(patch: pytest.MonkeyPatch) -> str:
    init = Branches.__init__

    def wrong(self: Branches, head: Eagle, slab: mx.array, position: mx.array) -> None:
        init(self, head, slab, position)
        self._seen = (mx.arange(slab.shape[2]) < position - 1)[None]

    patch.setattr(Branches, "__init__", wrong)
    return "eagle-1"


def other(dialect: str, **changes: Any) -> Any:
    """A switch of the configuration is not obeyed."""

    def mistake(patch: pytest.MonkeyPatch) -> str:
        config_of = eagle_files.config_of
        patch.setattr(
            eagle_files, "config_of", lambda *given: replace(config_of(*given), **changes)
        )
        return dialect

    return mistake


MISTAKES = {
    f.__name__: f
    for f in (tokens_that_were_read, rollouts_a_position_on, every_branch_is_seen,
              a_pair_does_not_see_itself, the_root_is_not_seen)
} | {
    "residual": other("speculators-llama", norm_before_residual=False),
    "rollout": other("speculators-qwen3", norm_output=False),
    "rollout-of-another": other("specforge", norm_output=True),
    "layers": other("deepspec", features=(1, 2, 3, 6, 5)),
    "eps": other("fc-norm", norm_eps=1e-2),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_caught(
    deep: Decoder, stored: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    mistake: Any,
) -> None:  # fmt: skip
    head = DIALECTS[mistake(monkeypatch)]
    drafter = loaded(tmp_path, head, deep)
    with pytest.raises(AssertionError):
        assert_says(drafter, head, deep, stored)


# What files leave open.


@pytest.mark.parametrize("name", DIALECTS)
def test_every_alternative_is_another_head(name: str) -> None:
    """The first is what is taken without a word; one may mean layers that a model has not."""
    head = DIALECTS[name]
    given = eagle_files.renamed(
        shapes({n: mx.array(w) for n, w in head.weights.items()}), head.config
    )

    def config(raw: Any) -> Any:
        return eagle_files.config_of(raw, given, 64, Path("there"))

    tried = [config({**head.config, **keys}) for keys in eagle_files.alternatives(head.config)]
    assert tried[0] == config(head.config)
    open_residual = not name.startswith(("speculators", "norm-", "fc-"))
    assert len(tried) == (4 if open_residual else 2)
    if head.layers:
        assert all(a != b for i, a in enumerate(tried) for b in tried[:i])
    said = {**head.config, "feature_layers_are": "outputs", "norm_before_residual": True}
    assert eagle_files.alternatives(said) == [{}]
    assert config(said).norm_before_residual
