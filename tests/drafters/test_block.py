"""Block drafters of every dialect: against plain NumPy, in float64 and without a cache; broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
from block_calls import at_the_end, proposed, read, said
from conftest import D, V, prompt_of
from edits import Edit, edit_config, edit_entry, edit_file, edit_weights
from tiny_block import DIALECTS, MASK, B, Case, Reference, loaded
from tiny_heads import paths, quantise

from mlx_redrafter.cli import info
from mlx_redrafter.decoding import sampling
from mlx_redrafter.drafters import block, block_files, files, rollout
from mlx_redrafter.drafters.block import Block, Domino, Markov
from mlx_redrafter.drafters.calibration import Calibration
from mlx_redrafter.drafters.eagle import Attention
from mlx_redrafter.drafters.loading import load_drafter
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.models.weights import shapes
from mlx_redrafter.tree.shape import TreeShape

TEXT = prompt_of(17, seed=11)


def reference(case: Case, target: Decoder) -> Reference:
    shared = target.model.embed_tokens.weight, target.lm_head.weight
    return Reference(case, *(np.array(w) for w in shared))


def assert_says(drafter: Block, case: Case, target: Decoder, width: int = 3) -> None:
    """Logits along a draft, the greedy draft, and the costs of a tree."""
    assert drafter.features == (0, 2)
    place, levels = at_the_end(drafter, target, TEXT), case.levels
    meant = reference(case, target)
    drafted = meant.chain(TEXT[-1], place.read, levels)
    expected = meant.said(TEXT[-1], place.read, drafted)
    found = said(drafter, place, drafted)
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    (chain,) = proposed(drafter, place, TreeShape.chain(levels))
    assert chain.paths.tolist()[0][1 : levels + 1] == drafted
    tree = paths(proposed(drafter, place, TreeShape(width, 3, 1 + 3 * width)))
    assert len(tree) == 3 * width and len({tuple(path) for path, _ in tree}) == 3 * width
    for path, cost in tree:
        assert cost == pytest.approx(meant.cost(TEXT[-1], place.read, path), abs=1e-4)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_against_numpy(target: Decoder, tmp_path: Path, name: str) -> None:
    case = DIALECTS[name]
    drafter = loaded(tmp_path, case, target)
    assert drafter.config.bias == case.bias
    assert_says(drafter, case, target)


@pytest.mark.parametrize("name", ["deepspec-dspark", "speculators-dspark", "domino"])
@pytest.mark.parametrize("stay", [False, True])
def test_packed_weights(
    target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stay: bool
) -> None:
    """As MLX packs them, unpacked as on a CPU or left as they are."""
    if stay:
        monkeypatch.setattr(files, "dequantize_model", lambda model: model)
    case = DIALECTS[name]
    whole = {n: w for n, w in case.weights.items() if w.ndim == 2 and w.shape[1] % 32 == 0}
    packed, meant = quantise(whole, 8, ["fc.", "_proj", "lm_head"])
    case = replace(
        case,
        config=case.config | {"quantization": {"group_size": 32, "bits": 8}},
        weights=case.weights | packed,
        plain={n: meant.get(n, w) for n, w in case.plain.items()},
    )
    drafter = loaded(tmp_path, case, target)
    assert isinstance(drafter.fc, nn.QuantizedLinear) is stay
    assert_says(drafter, case, target)


@pytest.mark.parametrize("name", ["deepspec-gated", "specforge-dflash-sliding"])
def test_first_choices_at_every_position(target: Decoder, tmp_path: Path, name: str) -> None:
    """What the self-check counts: of one reading of the text, with its true tokens as roots."""
    case = DIALECTS[name]
    drafter = loaded(tmp_path, case, target)
    features, rows = read(drafter, target, TEXT)
    found = rollout.first_choices(drafter, features, mx.array(TEXT, mx.int32)).tolist()
    meant = reference(case, target)
    assert found == [meant.chain(TEXT[p + 1], rows[: p + 1], 1)[0] for p in range(len(TEXT) - 1)]


def test_sampled_drafts_are_calibrated(target: Decoder, tmp_path: Path) -> None:
    """At half the share the same drafts are worth half as much a level; greedy ones know of none.
    (A search that is not told of it fails.)"""
    drafter = loaded(tmp_path, DIALECTS["deepspec-dspark"], target)
    place, shape = at_the_end(drafter, target, TEXT), TreeShape.chain(2)
    known = {"seed": mx.array([5], mx.uint32), "temp": mx.array(0.7)}
    for draw, lost in [(sampling.draw(known, place.position + 1, 2), 2 * np.log(2)), (None, 0.0)]:
        costs = []
        for share in (1.0, 0.5):
            drafter.calibration = Calibration(share=share)
            (chain,) = proposed(drafter, place, shape, draw)
            costs.append(chain.costs.item())
        assert costs[1] - costs[0] == pytest.approx(lost, abs=1e-5)


def test_half_precision_stays_it(target_folder: Path, tmp_path: Path) -> None:
    """A target of 16 bits: nothing on the way becomes wider."""
    halved = load_model(target_folder, dtype=mx.bfloat16)
    for name in ("deepspec-rnn", "domino", "specforge-dflash-sliding"):
        drafter = loaded(tmp_path / name, DIALECTS[name], halved)
        place = at_the_end(drafter, halved, TEXT)
        root = mx.array([place.root], mx.int32)
        hidden = drafter.hidden(root, place.position, place.caches)
        cell = block.Places(drafter, hidden)
        logits, state = cell.level(1, mx.array([5, 60]), cell.first(hidden[:1], 3))
        kinds = {x.dtype for x in (hidden, logits, state, *place.caches)}
        assert kinds == {mx.bfloat16}


# Mistakes, and a dialect that shows each of them.


def other(dialect: str, **changes: Any) -> Callable[[pytest.MonkeyPatch], str]:
    """A switch of the configuration is not obeyed."""

    def mistake(patch: pytest.MonkeyPatch) -> str:
        config_of = block_files.config_of
        patch.setattr(
            block_files, "config_of", lambda *given: replace(config_of(*given), **changes)
        )
        return dialect

    return mistake


def positions_off(by: int, contexts: bool) -> Callable[[pytest.MonkeyPatch], str]:
    """Contexts, or queries, turned for another position."""

    def mistake(patch: pytest.MonkeyPatch) -> str:
        if contexts:
            rows = Block.rows
            patch.setattr(Block, "rows", lambda self, read, at: rows(self, read, at + by))
        else:
            queries = Attention.queries
            patch.setattr(Attention, "queries", lambda self, u, at: queries(self, u, at + by))
        return "z-lab"

    return mistake


def contexts_beyond_the_root(patch: pytest.MonkeyPatch) -> str:
    """The root's slot, which is empty yet, is seen."""
    hidden = Block.hidden

    def wrong(self: Block, root: mx.array, position: mx.array, slabs: Any) -> mx.array:
        return hidden(self, root, position + 1, slabs)

    patch.setattr(Block, "hidden", wrong)
    return "z-lab"


def contexts_normed_as_places(patch: pytest.MonkeyPatch) -> str:
    """The norm before a layer's attention is the places' alone."""

    def wrong(self: Block, read: Any, positions: mx.array) -> list[mx.array]:
        context = self.hidden_norm(self.fc(read.of(self.features)))
        return [x.self_attn.rows(x.input_layernorm(context), positions) for x in self.layers]

    patch.setattr(Block, "rows", wrong)
    return "z-lab"


def forgetful(kind: type[nn.Module], dialect: str) -> Callable[[pytest.MonkeyPatch], str]:
    """A recurrence that begins anew at every level."""

    def mistake(patch: pytest.MonkeyPatch) -> str:
        call = kind.__call__

        def wrong(self: Any, tokens: Any, hidden: Any, state: Any, embed: Any) -> Any:
            return call(self, tokens, hidden, 0 * state, embed)

        patch.setattr(kind, "__call__", wrong)
        return dialect

    return mistake


def the_root_before_all(patch: pytest.MonkeyPatch) -> str:
    """A bias of the first level's token at every level."""
    call = Markov.__call__

    def wrong(self: Any, tokens: Any, hidden: Any, state: Any, embed: Any) -> Any:
        return call(self, 0 * tokens + TEXT[-1], hidden, state, embed)

    patch.setattr(Markov, "__call__", wrong)
    return "deepspec-dspark"


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], str]] = {
    "predicts-after": other("z-lab", after=True, places=B - 1),
    "predicts-at": other("deepspec-dspark", after=False, places=B + 1),
    "a-shorter-block": other("z-lab", places=B - 1),
    "causal": other("z-lab", causal=(True, True)),
    "one-causal-layer": other("deepspec-dspark", causal=(False, True)),
    "two-way": other("specforge-causal", causal=(False, False)),
    "windows-two-way": other("specforge-dflash-sliding", causal=(False, False)),
    "no-window": other("specforge-dflash-sliding", windows=(0, 0)),
    "a-window-of-one-more": other("specforge-two-way-window", windows=(4, 0)),
    "window-from-the-root": other("specforge-two-way-window", root_windows=True),
    "window-from-the-place": other("speculators-dflash", root_windows=False),
    "another-mask": other("z-lab", mask=MASK - 1),
    "layers-in-another-order": other("deepspec-dspark", features=(2, 0)),
    "layers-one-on": other("speculators-dspark", features=(1, 2)),
    "a-bias-from-the-start": other("domino", plain_levels=0),
    "contexts-a-position-on": positions_off(1, contexts=True),
    "queries-a-position-on": positions_off(1, contexts=False),
    "contexts-beyond-the-root": contexts_beyond_the_root,
    "contexts-normed-as-places": contexts_normed_as_places,
    "forgetful-rnn": forgetful(Markov, "deepspec-rnn"),
    "forgetful-gru": forgetful(Domino, "domino-shifted"),
    "the-root-before-all": the_root_before_all,
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_caught(
    target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[pytest.MonkeyPatch], str],
) -> None:  # fmt: skip
    case = DIALECTS[mistake(monkeypatch)]
    drafter = loaded(tmp_path, case, target)
    with pytest.raises(AssertionError):
        assert_says(drafter, case, target)


# What files leave open, and what can be wrong with them.


def canonical(case: Case) -> dict[str, tuple[int, ...]]:
    stored = {name: mx.array(value) for name, value in case.weights.items()}
    return shapes(block_files.renamed(stored, case.config))


OPEN = {
    "deepspec-dspark": [("after", None), ("at", None)],
    "z-lab": [("at", None), ("after", None)],
    "modelopt": [(None, None)],
    "speculators-dspark": [
        (p, layers) for layers in ("inputs", "outputs") for p in ("after", "at")
    ],
    "speculators-dspark-at": [(None, "inputs"), (None, "outputs")],
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_alternatives(name: str) -> None:
    """Each is another drafter, and the first is what is taken without a word."""
    case = DIALECTS[name]
    given = canonical(case)
    tried = block_files.alternatives(case.config)
    configs = [
        block_files.config_of({**case.config, **keys}, given, 64, Path("there")) for keys in tried
    ]
    assert configs[0] == block_files.config_of(case.config, given, 64, Path("there"))
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])
    if name in OPEN:
        names = ("places_predict", "feature_layers_are")
        assert [tuple(keys.get(n) for n in names) for keys in tried] == OPEN[name]
    said = {**case.config, "places_predict": "at", "feature_layers_are": "outputs"}
    assert block_files.alternatives(said) == [{}]


def test_layers_that_no_file_names_are_spread(target: Decoder, tmp_path: Path) -> None:
    """As SpecForge spreads them; a model of three layers is too small for it."""
    case = DIALECTS["deepspec-dspark"]
    given = canonical(case)
    config = {**case.config, "target_layer_ids": None}
    assert block_files.config_of(config, given, 36, tmp_path).features == (1, 33)


def test_what_its_files_say(target: Decoder, target_folder: Path, tmp_path: Path) -> None:
    loaded(tmp_path, DIALECTS["speculators-dspark"], target)
    facts = info.collect(str(target_folder), str(tmp_path))["drafter"]
    assert facts["fits"] is True and facts["base"] == "org/base"
    assert facts["architecture"] == f"DSpark drafter, 2 layers over {B} places"
    assert (facts["head"], facts["draft_vocabulary"]) == ("own", 60)
    assert (facts["places_predict"], facts["context_layers"]) == ("after", [1, 3])


def tensor(name: str, shape: tuple[int, ...] | None) -> Edit:
    """A tensor of another shape; None: without it."""
    if shape is None:
        return edit_weights(lambda w: w.pop(name))
    return edit_weights(lambda w: w.update({name: mx.zeros(shape)}))


W1, W2 = "markov_head.markov_w1.weight", "markov_head.markov_w2.weight"
BROKEN: dict[str, tuple[Edit, str]] = {
    "missing tensor": (tensor("layers.1.mlp.up_proj.weight", None), "lacks.*layers.1.mlp.up_proj"),
    "missing layer": (
        edit_weights(lambda w: [w.pop(n) for n in list(w) if "layers.1." in n]),
        "has 1 layers, and its config.json names 2",
    ),
    "missing Markov head": (
        edit_weights(lambda w: [w.pop(n) for n in list(w) if "markov" in n]), "lacks its Markov",
    ),
    "wrong rank": (edit_config(markov_rank=7), "do not fit"),
    "rows of neither": (tensor(W2, (50, 6)), "50 tokens; needed: 97"),
    "previous tokens of a draft vocabulary": (tensor(W1, (60, 6)), "do not fit"),
    "a scalar": (tensor(W2, ()), "0 tokens; needed: 97|bias.out.weight"),
    "rotary": (edit_config(rope_scaling={"type": "odd"}), "rope type 'odd'"),
    "rotary of a number": (edit_config(rope_scaling=5), "cannot be read"),
    "another base": (edit_config(hidden_size=64), "hidden size 64.*32"),
    "another vocabulary": (edit_config(vocab_size=98), "vocabulary size 98.*97"),
    "no block": (edit_config(block_size=None), "block_size None is an impossible"),
    "block of one": (edit_config(block_size=1), "block_size 1 is an impossible"),
    "no mask": (edit_config(mask_token_id=None), "mask_token_id None is none of the model's 97"),
    "mask beyond": (edit_config(mask_token_id=V), "mask_token_id 97 is none"),
    "embeddings": (edit_config(target_layer_ids=[-1, 2]), r"embeddings \(layer -1"),
    "layers beyond": (edit_config(target_layer_ids=[0, 3]), r"layers \[0, 3\].*has 3"),
    "a layer too many": (edit_config(target_layer_ids=[0, 1, 2]), r"fc.weight \(32, 64\)"),
    "layers as text": (edit_config(target_layer_ids="all"), "no list of numbers"),
    "packed by others": (edit_config(quantization_config={"bits": 4}), "quantization_config"),
    "activation": (edit_config(hidden_act="gelu"), "hidden_act 'gelu'.*silu"),
    "Markov of another kind": (edit_config(markov_head_type="fir"), "markov_head_type 'fir'"),
    "projector": (edit_config(projector_type="dspine"), "projector_type 'dspine'"),
    "attention": (edit_config(attention_mode="kda"), "attention_mode 'kda'"),
    "half-turned": (edit_config(partial_rotary_factor=0.25), "partial_rotary_factor 0.25"),
    "no heads": (edit_config(num_attention_heads=None), "lacks 'num_attention_heads'"),
    "odd heads": (edit_config(num_key_value_heads=3), "4 attention heads and 3"),
    "eps": (edit_config(rms_norm_eps=0), "norm_eps"),
    "kinds of layers": (edit_config(layer_types=["linear_attention"] * 2), "layer_types"),
    "too few kinds": (edit_config(layer_types=["full_attention"]), "each of its 2 layers"),
    "no window": (
        edit_config(layer_types=["sliding_attention"] * 2), "sliding_window None is an impossible",
    ),
    "conventions": (edit_config(places_predict="before"), "'before' is unknown: after or at"),
    "layers are": (edit_config(feature_layers_are="x"), "'x' is unknown: inputs or outputs"),
    "DFlash2": (tensor("layers.0.conv.weight", (4, 4)), "is a DFlash2.*conv"),
    "latent attention": (tensor("layers.0.self_attn.kv_a_proj.weight", (4, 4)), "latent"),
    "experts": (tensor("layers.0.mlp.experts.0.up_proj.weight", (4, 4)), "has experts"),
    "unknown": (tensor("layers.0.extra.weight", (4, 4)), "no block drafter has.*extra"),
    "NaN": (edit_entry("fc.weight", np.nan), "NaN.*fc.weight"),
    "truncated": (edit_file("model.safetensors", lambda b: b[:-100]), "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_can_be_wrong_with_a_folder(target: Decoder, tmp_path: Path, case: str) -> None:
    loaded(tmp_path, DIALECTS["deepspec-dspark"], target)
    spoil, words = BROKEN[case]
    spoil(tmp_path)
    with pytest.raises(DrafterError, match=words) as caught:
        load_drafter(tmp_path, target)
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")


@pytest.mark.parametrize("value", [5, "x", [], {"a": 1}, [None], True, -1, 1.5])
@pytest.mark.parametrize(
    "key", ["architectures", "dflash_config", "transformer_layer_config", "target_layer_ids",
            "block_size", "mask_token_id", "markov_rank", "layer_types", "rope_scaling", "head_dim",
            "rms_norm_eps", "rope_theta", "shift_label", "num_hidden_layers", "is_causal"],
)  # fmt: skip
def test_any_value_of_a_key_is_read_or_one_line(
    target: Decoder, tmp_path: Path, key: str, value: Any
) -> None:
    case = DIALECTS["deepspec-dspark"]
    given, config = canonical(case), {**case.config, key: value}
    try:
        block_files._module(config, given, target, tmp_path)
        block_files.alternatives(config)
    except DrafterError as error:
        assert "\n" not in str(error)


def test_a_draft_vocabulary_that_is_none(target: Decoder, tmp_path: Path) -> None:
    loaded(tmp_path, DIALECTS["speculators-dspark"], target)
    edit_entry("d2t", 50)(tmp_path)
    with pytest.raises(DrafterError, match="names a token twice"):
        load_drafter(tmp_path, target)
    edit_entry("d2t", -D)(tmp_path)
    with pytest.raises(DrafterError, match=r"beyond|t2d names"):
        load_drafter(tmp_path, target)
