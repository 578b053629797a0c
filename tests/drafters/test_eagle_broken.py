"""EAGLE heads that are broken, of another kind or for another model: one line each; and info."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from conftest import D, V
from eagle_fitted import plain_head
from edits import Edit, edit_config, edit_entry, edit_file, edit_weights, edits
from tiny_eagle import DIALECTS, INNER, KV, MAP, H, tensors
from tiny_heads import IDS, write
from typer.testing import CliRunner

from mlx_redrafter.cli import info
from mlx_redrafter.cli import main as cli
from mlx_redrafter.drafters.loading import check_folder, kind_of, load_drafter
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.hub import kept
from mlx_redrafter.models import Decoder


def head(folder: Path) -> Path:
    """SpecForge's, with a draft vocabulary."""
    return write(folder, plain_head().config, tensors() | MAP)


def without(*names: str) -> Edit:
    return edit_weights(lambda w: [w.pop(name) for name in names])


def more(**tensors: Any) -> Edit:
    """Further tensors, or others; ``__`` stands for a dot."""
    changed = {name.replace("__", "."): mx.array(value) for name, value in tensors.items()}
    return edit_weights(lambda w: w.update(changed))


def in_map(change: Callable[[np.ndarray], Any], name: str = "d2t") -> Edit:
    """Another map of the draft vocabulary."""

    def edit(w: dict[str, mx.array]) -> None:
        values = np.array(w[name])
        change(values)
        w[name] = mx.array(values)

    return edit_weights(edit)


def put(index: int, value: Any) -> Callable[[np.ndarray], Any]:
    return lambda values: values.__setitem__(index, value)


SMALL = np.zeros((2, 2), np.float32)
ATTENTION = "midlayer__self_attn__"
BROKEN: dict[str, tuple[Edit, str]] = {
    "missing norm": (without("midlayer.input_layernorm.weight"), "lacks midlayer.input_layernorm"),
    "other missing norm": (without("midlayer.hidden_norm.weight"), "lacks midlayer.hidden_norm"),
    "missing projection": (
        without("midlayer.self_attn.v_proj.weight"), "lacks midlayer.self_attn.v_proj.weight",
    ),
    "missing fc": (without("fc.weight"), "lacks the tensors of an EAGLE head: needed are fc.w"),
    "missing queries": (without("midlayer.self_attn.q_proj.weight"), "lacks the tensors of an EA"),
    "unknown": (more(extra=SMALL), "tensors that no EAGLE head has: extra"),
    "wrong width": (
        more(**{ATTENTION + "k_proj__weight": np.zeros((16, D), np.float32)}),
        r"k_proj.weight \(16, 32\) instead of \(16, 64\)",
    ),
    "a vector for a matrix": (more(fc__weight=np.zeros(D, np.float32)), "lacks the tensors"),
    "another number of layers": (
        more(fc__weight=np.zeros((D, 2 * D), np.float32)), "reads 2 layers.*names .1, 0, 2.",
    ),
    "d2t beyond the vocabulary": (
        edits(without("t2d"), in_map(put(-1, V))), "tokens beyond the model's",
    ),
    "d2t below it": (edits(without("t2d"), in_map(put(0, -1))), "tokens beyond the model's"),
    "d2t does not rise": (
        in_map(put(9, MAP["d2t"][8] - 1)), "d2t names a token twice or out of order",
    ),
    "d2t falls": (in_map(put(9, MAP["d2t"][8] - 7)), "d2t names a token twice or out of order"),
    "d2t of fractions": (more(d2t=np.zeros(60, np.float32)), "d2t is no list of whole numbers"),
    "d2t of rows": (more(d2t=MAP["d2t"][None]), "d2t is no list of whole numbers"),
    "d2t of nothing": (edits(without("t2d"), more(d2t=MAP["d2t"][:0])), "impossible size"),
    "t2d of one more": (
        in_map(put(int(np.setdiff1d(np.arange(V), IDS)[0]), True), "t2d"),
        "t2d names 61 tokens, and not the 60 of d2t",
    ),
    "t2d of one less": (in_map(put(int(IDS[3]), False), "t2d"), "t2d names 59 tokens"),
    "t2d of others": (in_map(np.roll, "t2d"), ""),
    "rows of neither": (more(lm_head__weight=np.zeros((50, D), np.float32)), "50 tokens; needed"),
    "a scalar": (more(lm_head__weight=np.float32(1)), "no EAGLE head has: lm_head.weight"),
    "parallel heads": (more(parallel_draft_heads__0__weight=SMALL), "drafts several tokens at"),
    "P-EAGLE": (more(mask_hidden=SMALL), r"drafts several tokens at once \(mask_hidden\)"),
    "LoRA": (more(**{ATTENTION + "q_proj__lora_A__weight": SMALL}), "with LoRA weights"),
    "MLA": (more(**{ATTENTION + "kv_a_proj_with_mqa__weight": SMALL}), "has latent attention"),
    "several blocks": (more(layers__1__mlp__up_proj__weight=SMALL), "has several blocks"),
    "packed by others": (
        edit_config(quantization_config={"quant_method": "fp8"}), "quantization_config",
    ),
    "drafts in parallel": (
        edit_config(eagle_config={"parallel_draft_step": 4}), "parallel_draft_step 4",
    ),
    "no inner layers": (
        edit_config(eagle_config={"use_aux_hidden_state": False}), "use_aux_hidden_state false",
    ),
    "no inner layers, no fc": (
        edits(without("fc.weight"), edit_config(eagle_config={"use_aux_hidden_state": False})),
        "use_aux_hidden_state false",
    ),
    "another width": (edit_config(hidden_size=64, head_dim=8), "reads 1 layers|instead of"),
    "another base": (
        edits(more(fc__weight=np.zeros((D, 144), np.float32)), edit_config(target_hidden_size=48)),
        "hidden size 48, but this model's is 32",
    ),
    "another vocabulary": (edit_config(vocab_size=98), "vocabulary size 98.*97"),
    "no vocabulary": (edit_config(vocab_size=None), "vocab_size None is an impossible"),
    "layers beyond": (
        edit_config(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 17, 32]}),
        r"names \[1, 17, 32\], and this model has 3",
    ),
    "layers of a larger model": (edit_config(eagle_config=None), "this model has 3: use"),
    "layers in words": (
        edit_config(eagle_config={"eagle_aux_hidden_state_layer_ids": "all"}), "no list of numbers",
    ),
    "a convention": (edit_config(feature_layers_are="both"), "'both' is unknown: inputs or outp"),
    "no heads": (edit_config(num_attention_heads=None), "num_attention_heads None"),
    "odd heads": (edit_config(num_key_value_heads=3), "4 attention heads of 8 numbers and 3 key"),
    "a head of an odd size": (edit_config(head_dim=7), "needed: a multiple, and an even size"),
    "another activation": (edit_config(hidden_act="gelu"), "hidden_act 'gelu' is unknown"),
    "eps in words": (edit_config(rms_norm_eps="small"), "rope or eps cannot be read"),
    "a rope of another kind": (
        edit_config(rope_scaling={"rope_type": "mrope"}), "the drafter in .*'mrope'",
    ),
    "a rope without its numbers": (
        edit_config(rope_scaling={"rope_type": "llama3"}), "the drafter in .*is incomplete",
    ),
    "a rope in words": (edit_config(rope_scaling="yarn"), "rope or eps cannot be read"),
    "packed, and nothing said": (
        more(fc__scales=np.zeros((D, 1), np.float32)), "no quantization block",
    ),
    "NaN": (edit_entry("fc.weight", np.nan), "NaN.*fc.weight"),
    "truncated": (edit_file("model.safetensors", lambda b: b[:-100]), "truncated"),
}  # fmt: skip
BROKEN["t2d of others"] = (
    edits(
        in_map(put(int(IDS[3]), False), "t2d"),
        in_map(put(int(np.setdiff1d(np.arange(V), IDS)[0]), True), "t2d"),
    ),
    "t2d names 60 tokens, and not the 60 of d2t",
)


@pytest.mark.parametrize("case", BROKEN)
def test_what_can_be_wrong_with_a_folder(target: Decoder, tmp_path: Path, case: str) -> None:
    load_drafter(head(tmp_path), target)
    spoil, words = BROKEN[case]
    spoil(tmp_path)
    with pytest.raises(DrafterError, match=words) as caught:
        load_drafter(tmp_path, target)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "case",
    ["missing norm", "wrong width", "P-EAGLE", "another base", "rows of neither", "no heads"],
)
def test_much_of_it_is_seen_before_the_weights_are_read(
    target: Decoder, tmp_path: Path, case: str
) -> None:
    check_folder(head(tmp_path), target)
    BROKEN[case][0](tmp_path)
    with pytest.raises(DrafterError, match=BROKEN[case][1]):
        check_folder(tmp_path, target)


def test_info(target_folder: Path, tmp_path: Path) -> None:
    folder = head(tmp_path / "head")
    edit_config(base_model_name_or_path="org/base")(folder)
    assert kept.problem(folder, target_folder) is None
    facts = info.collect(str(target_folder), str(folder))["drafter"]
    assert facts["fits"] and facts["problem"] is None
    assert facts["architecture"] == "EAGLE-3 head, one block of 4 heads"
    assert (facts["head"], facts["draft_vocabulary"], facts["base"]) == ("own", 60, "org/base")
    assert (facts["context_layers"], facts["feature_layers_are"]) == ([1, 0, 2], "outputs")
    shown = CliRunner().invoke(cli.app, ["info", str(target_folder), "-d", str(folder)])
    assert re.search(r"made for +org/base\b", shown.stdout), shown.output
    assert "EAGLE-3 head, one block of 4 heads" in shown.stdout
    assert re.search(r"fits +yes", shown.stdout)
    # What a level reads: the block, the norms and the output rows, and not fc.
    block = (H * 8 + 2 * KV * 8) * 2 * D + D * H * 8 + 3 * D * INNER
    assert facts["bytes_per_draft_step"] == 4 * (block + 4 * D + 60 * D) + 8 * 60
    edit_config(vocab_size=98)(folder)
    assert "vocabulary size 98" in str(kept.problem(folder, target_folder))


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_is_described(tmp_path: Path, name: str) -> None:
    """Without the model, from the files alone."""
    known = DIALECTS[name]
    folder = write(tmp_path, known.config, known.weights)
    facts = kind_of(folder).describe(folder).facts
    assert f"EAGLE-{3 if known.layers else 1} head" in facts["architecture"]
    assert facts["head"] == ("own" if known.own_head else "target")
    assert facts["draft_vocabulary"] == len(known.ids)
    assert facts["base"] == ("org/base" if "speculators_config" in known.config else None)
    ways = {"speculators": "inputs", "norm-b": "inputs", "fc-nor": "inputs", "safeai": "inputs"}
    assert known.layers or facts["feature_layers_are"] is None
    for start, way in ways.items():
        assert not name.startswith(start) or facts["feature_layers_are"] == way
