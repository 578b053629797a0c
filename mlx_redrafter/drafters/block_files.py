"""The files of block drafters: names of tensors and configurations of every dialect that is read.

DeepSpec's, z-lab's, SpecForge's (its older container ``logit_head`` too), the speculators library's
(a nested configuration), and ModelOpt's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, cast

import mlx.core as mx

from mlx_redrafter.drafters import eagle_files, files
from mlx_redrafter.drafters.block import Block, BlockConfig
from mlx_redrafter.drafters.eagle import EagleConfig
from mlx_redrafter.errors import DrafterError, ModelError
from mlx_redrafter.models import Target
from mlx_redrafter.models.families import decoder_config
from mlx_redrafter.models.weights import Shape, shapes

KIND = "block drafter"
T = TypeVar("T")
Raw = Mapping[str, Any]

TYPES = ("dflash", "dspark", "domino")
"""Our model types."""
PLACES = "places_predict"
"""Our key: does a place predict the token ``after`` it, or the one ``at`` it?"""

_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"(?:markov_head\.)?markov_w1(?:\.(\w+))?", "bias.previous.{}"),
        (r"(?:markov_head\.)?markov_w2(?:\.(\w+))?", "bias.out.{}"),
        (r"(?:markov_head\.)?gate_proj\.(\w+)", "bias.gate.{}"),
        (r"(?:markov_head\.)?joint_proj\.(\w+)", "bias.joint.{}"),
        (r"prefix_gru\.(\w+)_ih_l0", "bias.input.{}"),
        (r"prefix_gru\.(\w+)_hh_l0", "bias.recur.{}"),
        (r"embed_proj\.0\.(\w+)", "bias.down.{}"),
        (r"embed_proj\.2\.(\w+)", "bias.out.{}"),
    )
]
_BIASES = {"recur": "domino", "joint": "rnn", "gate": "gated", "previous": "vanilla"}
"""By the matrix that no other has."""
_IGNORED = re.compile(
    r"confidence_(?:head|proj)\b.*|embed_tokens\..*|t2d|verifier_.*|.*rotary_emb\.inv_freq"
)
_OTHERS = (
    (r".*(conv|selector).*", "is a DFlash2"),
    (r".*(kv_a_proj|lora_).*", "has latent attention or LoRA weights"),
    (r".*\.experts\..*", "has experts"),
)
_ATTENTION = ("full_attention", "sliding_attention")
_SHIFTS = ("sample_from_anchor", "shift_label")
_METHODS = ("dflash_config", "dspark_config")
_INPUTS = "aux_hidden_state_layer_ids"
_KEYS = (
    "architectures", "speculators_model_type", "projector_type", "block_size", "mask_token_id",
    "markov_rank", "markov_head_type", "emb_dim", "pure_draft_prefix_len", "hidden_size",
    "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_theta",
    "rope_scaling", "rope_parameters", "rope_traditional", "layer_types", "sliding_window",
    "swa_window_size", "use_swa", "sliding_window_non_causal", "is_causal", "causal",
    "target_layer_ids", _INPUTS, eagle_files.LAYERS_ARE, PLACES, *_SHIFTS,
)  # fmt: skip
"""Of a configuration, all that is read."""


def is_one(folder: Path, raw: Raw, names: Mapping[str, Any]) -> bool:
    """Do a folder's tensors say that it holds a block drafter?"""
    return looks_so(names)


def looks_so(stored: Mapping[str, Any]) -> bool:
    """Are tensors named as those of a block drafter are?"""
    return {"fc.weight", "hidden_norm.weight"} <= {_bare(name) for name in stored}


def alternatives(raw: Raw) -> list[dict[str, Any]]:
    """What a configuration leaves open, the likeliest first: changes of it to be tried."""
    places: list[dict[str, Any]] = [{}]
    layers = places
    if raw.get(PLACES) is None and not _shifts(_flat(raw)):
        first, other = ("after", "at") if _after(raw) else ("at", "after")
        places = [{PLACES: first}, {PLACES: other}]
    if raw.get(eagle_files.LAYERS_ARE) is None and _layers_are(raw) == "inputs":
        layers = [{eagle_files.LAYERS_ARE: which} for which in ("inputs", "outputs")]
    return [{**a, **b} for a, b in product(layers, places)]


def renamed(stored: Mapping[str, T], raw: Raw) -> dict[str, T]:
    """Canonical names -> tensors, but for what nobody needs: copies of the target's embedding and
    head, the set of the draft vocabulary, what predicts acceptance, buffers.

    Raises:
        DrafterError: the tensors of a drafter that only looks like one, or a draft vocabulary that
            its file contradicts.
    """
    result: dict[str, T] = {}
    names = {_bare(name): value for name, value in stored.items()}
    own_head = {eagle_files.OFFSETS, files.VOCABULARY} & set(names)
    for name, value in names.items():
        for pattern, what in _OTHERS:
            if re.fullmatch(pattern, name):
                raise DrafterError(
                    f"the drafter {what} ({name}), which is not read here; needed: DFlash, DSpark "
                    "or Domino over the model's hidden states"
                )
        if _IGNORED.fullmatch(name) or (name.startswith("lm_head.") and not own_head):
            continue
        if name == eagle_files.OFFSETS:
            name = files.VOCABULARY
            if isinstance(value, mx.array):
                value = cast(T, eagle_files.target_ids(value))
        result[_canonical(name)] = value
    ids, members = result.get(files.VOCABULARY), names.get(eagle_files.MEMBERS)
    if isinstance(ids, mx.array) and isinstance(members, mx.array):
        eagle_files.check_members(ids, members)
    return result


def _bare(name: str) -> str:
    return name.removeprefix("model.").removeprefix("logit_head.")


def _canonical(name: str) -> str:
    for pattern, form in _NAMES:
        if match := pattern.fullmatch(name):
            return form.format(match[1] or "weight")
    return name


def _flat(raw: Raw) -> dict[str, Any]:
    """config.json with what it nests: the method's own keys, and the layers' sizes."""
    flat: dict[str, Any] = {}
    for part in (*(raw.get(key) for key in (*_METHODS, "transformer_layer_config")), raw):
        said = part.items() if isinstance(part, Mapping) else ()
        flat |= {key: value for key, value in said if value is not None}
    return flat


def _shifts(flat: Raw) -> list[bool]:
    """What a configuration says about the tokens that places predict."""
    return [bool(flat[key]) for key in _SHIFTS if flat.get(key) is not None]


def _after(raw: Raw) -> bool:
    """Does a place predict the token after it? DSpark's do, and everything of DeepSpec's; those of
    DFlash and Domino predict their own, unless a file says otherwise. Raises DrafterError."""
    if said := raw.get(PLACES):
        if said not in ("after", "at"):
            raise DrafterError(f"the drafter's {PLACES} {said!r} is unknown: after or at")
        return bool(said == "after")
    flat = _flat(raw)
    if shifts := _shifts(flat):
        return any(shifts)
    kinds = (flat.get(key) for key in ("projector_type", "speculators_model_type", "model_type"))
    return "dspark" in kinds or "DSpark" in str(flat.get("architectures"))


def _layers_are(raw: Raw) -> str:
    """The speculators library counts inputs of layers, all others outputs. Raises DrafterError."""
    if said := raw.get(eagle_files.LAYERS_ARE):
        if said not in ("inputs", "outputs"):
            raise DrafterError(
                f"the drafter's {eagle_files.LAYERS_ARE} {said!r} is unknown: inputs or outputs"
            )
        return str(said)
    flat = _flat(raw)
    return "inputs" if flat.get(_INPUTS) and not flat.get("target_layer_ids") else "outputs"


def _layer_ids(raw: Raw) -> list[int]:
    flat = _flat(raw)
    found = flat.get("target_layer_ids") or flat.get(_INPUTS) or []
    if not isinstance(found, list) or not all(isinstance(i, int) for i in found):
        raise DrafterError(f"the drafter's layer ids {found!r} are no list of numbers")
    return found


def _features(raw: Raw, count: int, num_layers: int) -> tuple[int, ...]:
    """The layers of the target whose outputs are read. Without numbers they are spread over it, one
    for each of the drafter's ``count`` layers, as z-lab's and SpecForge's. Raises DrafterError."""
    layers = [i - (_layers_are(raw) == "inputs") for i in _layer_ids(raw)]
    if not layers:
        last = num_layers - 3
        spread = (1 + i * (last - 1) / max(count - 1, 1) for i in range(count))
        layers = [num_layers // 2] if count == 1 else [round(at) for at in spread]
    if -1 in layers:
        raise DrafterError(
            "the drafter reads the model's embeddings (layer -1 in its config.json), which is not "
            "done here; needed: one that reads outputs of layers"
        )
    if any(not 0 <= i < num_layers for i in layers):
        raise DrafterError(
            f"the drafter's config.json names layers {layers}, and this model has {num_layers}: "
            "use the drafter that was trained for this model"
        )
    return tuple(layers)


def config_of(raw: Raw, given: Mapping[str, Shape], num_layers: int, folder: Path) -> BlockConfig:
    """The shape of a drafter, from config.json and shapes by canonical names.

    Args:
        num_layers: of the target.

    Raises:
        DrafterError: no drafter is there, or what none can have.
    """
    flat = _flat(raw)
    if not looks_so(given) or "layers.0.self_attn.k_proj.weight" not in given:
        raise DrafterError(
            f"the drafter in {folder} lacks the tensors of a {KIND}: needed are fc.weight, "
            "hidden_norm.weight and layers.*"
        )
    _check_known(flat, folder)
    layer, count = _layer(flat, given, folder)
    mask = flat.get("mask_token_id")
    if not isinstance(mask, int) or not 0 <= mask < layer.vocab_size:
        raise DrafterError(
            f"the drafter's mask_token_id {mask!r} is none of the model's {layer.vocab_size} tokens"
        )
    places = files.size("block_size", flat.get("block_size"), 2, 256)
    windows, causal = _windows(flat, count, folder)
    bias = next((kind for key, kind in _BIASES.items() if f"bias.{key}.weight" in given), "none")
    out = given.get("bias.out.weight", ())
    if flat.get("markov_rank") and bias == "none":
        raise DrafterError(f"the drafter in {folder} lacks its Markov head: download it again")
    rank = flat.get("emb_dim" if bias == "domino" else "markov_rank") or (out or (0,))[-1]
    plain = files.size("pure_draft_prefix_len", flat.get("pure_draft_prefix_len", 0), 0)
    return BlockConfig(
        layer=layer,
        features=_features(raw, count, num_layers),
        places=places,
        mask=mask,
        after=_after(raw),
        windows=windows,
        causal=causal,
        root_windows=flat.get("speculators_model_type") is not None,
        bias=bias,
        rank=files.size("markov_rank", rank, 0) if bias != "none" else 0,
        bias_rows=files.rows(out),
        state_size=files.rows(given.get("bias.recur.weight", ())) // 3,
        plain_levels=plain if bias == "domino" else 0,
    )


def _check_known(flat: Raw, folder: Path) -> None:
    """Raise DrafterError for what a configuration says that is not computed here."""
    known = {
        "quantization_config": ({},),
        "hidden_act": ("silu",),
        "projector_type": ("dflash", "dspark", "domino"),
        "attention_mode": ("gqa", "mha"),
        "markov_head_type": ("vanilla", "gated", "rnn"),
        "enable_qwen35_gated_q_proj": (False,),
        "partial_rotary_factor": (1,),
    }
    for key, values in known.items():
        if flat.get(key) is not None and flat[key] not in values:
            raise DrafterError(
                f"the drafter in {folder} has {key} {flat[key]!r}, which is not read here; needed: "
                f"{' or '.join(map(str, values))}, or none"
            )


def _layer(flat: Raw, given: Mapping[str, Shape], folder: Path) -> tuple[EagleConfig, int]:
    """One of the drafter's layers, and their number. They are Qwen3's. Raises DrafterError."""
    try:
        sizes = decoder_config({**flat, "model_type": "qwen3"})
    except ModelError as error:
        raise DrafterError(f"the drafter in {folder} cannot be read: {error}") from None
    head = given.get("lm_head.weight")
    found = {name.split(".")[1] for name in given if name.startswith("layers.")}
    if len(found) != sizes.num_layers:
        raise DrafterError(
            f"the drafter in {folder} has {len(found)} layers, and its config.json names "
            f"{sizes.num_layers}: download it again"
        )
    layer = EagleConfig(
        hidden_size=sizes.hidden_size,
        target_size=sizes.hidden_size,
        vocab_size=sizes.vocab_size,
        features=(),
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size=sizes.intermediate_size,
        norm_eps=sizes.norm_eps,
        rope=sizes.ropes[0],
        rows=0 if head is None else files.rows(head),
        draft_vocab_size=files.drafted(given),
        fc_bias="fc.bias" in given,
        attention_bias="layers.0.self_attn.q_proj.bias" in given,
        qk_norm="layers.0.self_attn.q_norm.weight" in given,
    )
    return layer, sizes.num_layers


def _windows(flat: Raw, count: int, folder: Path) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Windows, and whether places see only those before them, of every layer. Those of a window do,
    unless the file says otherwise, and no others. Raises DrafterError."""
    types = flat.get("layer_types") or [_ATTENTION[0]] * count
    if not isinstance(types, list) or len(types) != count or not set(types) <= set(_ATTENTION):
        raise DrafterError(
            f"the drafter in {folder} has layer_types {types!r}; needed: {' or '.join(_ATTENTION)}"
            f" for each of its {count} layers"
        )
    windows = [0] * count
    if _ATTENTION[1] in types:
        window = flat.get("swa_window_size") or flat.get("sliding_window")
        window = files.size("sliding_window", window)
        windows = [window * (kind == _ATTENTION[1]) for kind in types]
    said = flat.get("is_causal", flat.get("causal"))
    free = flat.get("sliding_window_non_causal") or flat.get("use_swa")
    causal = [bool(w) and not free if said is None else bool(said) for w in windows]
    return tuple(windows), tuple(causal)


def _module(raw: Raw, given: Mapping[str, Shape], target: Target, folder: Path) -> Block:
    """A drafter of this shape, if it is for the target."""
    config = config_of(raw, given, target.config.num_layers, folder)
    layer, vocabulary = config.layer, target.config.vocab_size
    files.check_sizes(layer.hidden_size, layer.vocab_size, target, folder)
    for rows in {layer.rows, config.bias_rows} - {0}:
        files.check_rows(rows, vocabulary, config.draft_vocab_size, folder)
    try:
        return Block(config)
    except ModelError as error:  # its rotary embedding
        raise DrafterError(f"the drafter in {folder} cannot be read: {error}") from None


LAYOUT = files.Layout(KIND, lambda folder: (), renamed, _module)


def load(folder: Path, target: Target) -> Block:
    """The drafter in a folder, bound to its target; see ``files.Layout.load``."""
    return LAYOUT.load(folder, target).bind(target)


def describe(folder: Path) -> files.Description:
    """What the files say of the drafter. Raises DrafterError."""
    raw, weights = LAYOUT.weights(folder)
    config = shape_of(raw, shapes(weights), folder)
    layer = config.layer
    name = {"none": "DFlash", "domino": "Domino"}.get(config.bias, "DSpark")
    facts = {
        "architecture": f"{name} drafter, {len(config.windows)} layers over {config.places} places",
        "head": "own" if layer.rows else "target",
        "bias": config.bias,
        "places_predict": "after" if config.after else "at",
        "context_layers": _layer_ids(raw),
        "feature_layers_are": _layers_are(raw),
        "head_width": layer.hidden_size,
        "base": eagle_files.base_model(raw),
        "draft_vocabulary": layer.draft_vocab_size or layer.vocab_size,
    }
    one = {name: value for name, value in weights.items() if name.startswith("bias.")}
    return files.Description(facts, weights, one, layer.hidden_size)


def shape_of(raw: Raw, given: Mapping[str, Shape], folder: Path) -> BlockConfig:
    """As `config_of`, where no model is at hand: any layer is in it. Raises DrafterError."""
    return config_of(raw, given, 1 << 20, folder)


def flat_config(config: BlockConfig, raw: Raw) -> dict[str, Any]:
    """A config.json that says on its top level what `config_of` reads, and leaves open what was."""
    flat, base = _flat(raw), eagle_files.base_model(raw)
    return {
        "model_type": flat["model_type"] if flat.get("model_type") in TYPES else TYPES[0],
        **{key: flat[key] for key in _KEYS if flat.get(key) is not None},
        **({"base_model_name_or_path": base} if base else {}),
    }
