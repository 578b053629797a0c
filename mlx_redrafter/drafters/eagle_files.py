"""The files of EAGLE heads: names of tensors and configurations of every dialect that is read.

SafeAILab's, AngelSlim's, SpecForge's and SGLang's (``midlayer.*``), ModelOpt's and DeepSpec's
(``layers.0.*``), the speculators library's (a nested configuration), and EAGLE-1 and 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import mlx.core as mx

from mlx_redrafter.drafters import files
from mlx_redrafter.drafters.eagle import Eagle, EagleConfig
from mlx_redrafter.errors import DrafterError, ModelError
from mlx_redrafter.models import Target
from mlx_redrafter.models.families import rope_config
from mlx_redrafter.models.weights import Shape, shapes

KIND = "EAGLE head"
T = TypeVar("T")
Raw = Mapping[str, Any]

OFFSETS, MEMBERS = "d2t", "t2d"
"""A file's draft vocabulary: the target's id of its i-th token is i + d2t[i], and the flags by the
target's ids that say the same."""
LAYERS_ARE = "feature_layers_are"
"""Our key: are the layer numbers of config.json ``outputs`` of blocks, or ``inputs``?"""

TYPES = ("eagle", "eagle3")
"""Our model types: without inner layers, and with them."""

_BLOCK = re.compile(r"(?:midlayer|layers\.0)\.(.*)")
_IGNORED = re.compile(r"verifier_norm\..*|verifier_lm_head\..*|.*\.rotary_emb\.inv_freq")
_OTHERS = (
    (r"parallel_draft_heads\..*|mask_hidden|pard_token.*", "drafts several tokens at once"),
    (r".*lora_.*", "changes the model with LoRA weights"),
    (r".*kv_a_proj_with_mqa.*", "has latent attention"),
    (r"layers\.[1-9]\d*\..*", "has several blocks"),
)
_NORMS = ("hidden_norm", "input_layernorm")
"""Of an EAGLE-3 block alone."""
_IDS = ("target_layer_ids", "eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")

_KEYS = (
    "hidden_size", "target_hidden_size", "vocab_size", "draft_vocab_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps",
    "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "rope_traditional",
    "norm_before_residual", "norm_output", "embed_requires_grad", *_IDS, LAYERS_ARE,
)  # fmt: skip
"""Of a configuration, all that is read."""


def looks_so(stored: Mapping[str, Any]) -> bool:
    """Are tensors named as those of an EAGLE head are?"""
    names = {_bare(name) for name in stored}
    block = any(_BLOCK.match(name) for name in names)
    return block and "fc.weight" in names and "hidden_norm.weight" not in names


def says_so(raw: Raw) -> bool:
    """Does a configuration tell of an EAGLE head?"""
    architectures = str(raw.get("architectures"))
    return isinstance(raw.get("eagle_config"), dict) or "eagle" in architectures.lower()


def is_one(folder: Path, raw: Raw, names: Mapping[str, Any]) -> bool:
    """Do a folder's configuration or its tensors say that it holds an EAGLE head?"""
    return says_so(raw) or looks_so(names)


def alternatives(raw: Raw) -> list[dict[str, Any]]:
    """What a configuration leaves open, the likeliest first: changes of it to be tried. A model may
    lack the layers that one of them means."""
    if raw.get("model_type") == TYPES[0]:
        return [{}]
    first, flat = _layers_are(raw), _flat(raw)
    other = "outputs" if first == "inputs" else "inputs"
    layers: list[dict[str, Any]] = [{LAYERS_ARE: first}, {LAYERS_ARE: other}]
    if raw.get(LAYERS_ARE):
        layers = [{}]
    if flat.get("norm_before_residual") is not None:
        return layers
    return [{**a, "norm_before_residual": b} for a in layers for b in (False, True)]


def renamed(stored: Mapping[str, T], raw: Raw) -> dict[str, T]:
    """Canonical names -> tensors, but for what nobody needs: copies of the target's embedding and
    head, the flags of the draft vocabulary, buffers.

    Raises:
        DrafterError: the tensors of a drafter that only looks like one, or a draft vocabulary that
            its file contradicts.
    """
    result: dict[str, T] = {}
    members = None
    for name, value in stored.items():
        bare = _bare(name)
        for pattern, what in _OTHERS:
            if re.fullmatch(pattern, bare):
                raise DrafterError(
                    f"the drafter is an EAGLE head that {what} ({name}); needed: one block over "
                    "the model's hidden states"
                )
        if bare == MEMBERS:
            members = value
        if bare == MEMBERS or _IGNORED.fullmatch(bare) or _is_copy(bare, raw):
            continue
        if match := _BLOCK.fullmatch(bare):
            bare = f"midlayer.{match[1]}"
        if bare == OFFSETS:
            bare = files.VOCABULARY
            if isinstance(value, mx.array):
                value = cast(T, target_ids(value))
        result[bare] = value
    ids = result.get(files.VOCABULARY)
    if isinstance(ids, mx.array) and isinstance(members, mx.array):
        check_members(ids, members)
    return result


def written(name: str) -> str:
    """A canonical name -> the one that is written: a draft vocabulary is stored as it was."""
    return OFFSETS if name == files.VOCABULARY else name


def _bare(name: str) -> str:
    return name.removeprefix("model.")


def _is_copy(name: str, raw: Raw) -> bool:
    """Is a tensor one of the target's, stored once more?"""
    flat = _flat(raw)
    if name.startswith("lm_head."):
        return _deep_spec(raw)
    narrow = flat.get("target_hidden_size") not in (None, flat.get("hidden_size"))
    own = narrow or flat.get("embed_requires_grad")
    return name.startswith("embed_tokens.") and not own


def target_ids(offsets: mx.array) -> mx.array:
    """The target's ids of the draft vocabulary. Raises DrafterError."""
    if not mx.issubdtype(offsets.dtype, mx.integer) or offsets.ndim != 1:
        raise DrafterError(f"the drafter's {OFFSETS} is no list of whole numbers")
    ids = offsets.astype(mx.int64) + mx.arange(offsets.size, dtype=mx.int64)
    if not mx.all(ids[1:] > ids[:-1]).item():
        raise DrafterError(
            f"the drafter's {OFFSETS} names a token twice or out of order: download it again"
        )
    return ids


def check_members(ids: mx.array, members: mx.array) -> None:
    """Do the flags of a vocabulary (V,) say the same as its ids (Vd,)? Raises DrafterError."""
    flagged = [i for i, flag in enumerate(cast(list[int], members.reshape(-1).tolist())) if flag]
    if flagged != ids.tolist():
        raise DrafterError(
            f"the drafter's {MEMBERS} names {len(flagged)} tokens, and not the {ids.size} of "
            f"{OFFSETS}: download it again"
        )


def _flat(raw: Raw) -> dict[str, Any]:
    """config.json with what it nests: the block's sizes, and ModelOpt's and DeepSpec's own."""
    inner = (raw.get(key) for key in ("transformer_layer_config", "eagle_config"))
    merged = dict(raw)
    for part in inner:
        merged |= part if isinstance(part, dict) else {}
    # What stands outside is about the head, what is nested about its block.
    outside = ("model_type", "draft_vocab_size", "target_hidden_size", LAYERS_ARE)
    return merged | {key: raw[key] for key in outside if raw.get(key) is not None}


def _deep_spec(raw: Raw) -> bool:
    return any("Eagle3Model" in str(name) for name in raw.get("architectures") or ())


def _layers_are(raw: Raw) -> str:
    """What layer numbers mean: the speculators library's and vLLM's count inputs of blocks, those
    of trainers outputs. The files of both are alike."""
    if said := raw.get(LAYERS_ARE):
        if said not in ("inputs", "outputs"):
            raise DrafterError(f"the drafter's {LAYERS_ARE} {said!r} is unknown: inputs or outputs")
        return str(said)
    ids = _layer_ids(raw)
    if _flat(raw).get("target_layer_ids"):
        return "outputs"
    return "inputs" if _from_speculators(raw) or not ids or ids[0] == 2 else "outputs"


def _from_speculators(raw: Raw) -> bool:
    return bool(raw.get("speculators_model_type") or raw.get("speculators_config"))


def _layer_ids(raw: Raw) -> list[int]:
    flat = _flat(raw)
    found: Any = next((flat[key] for key in _IDS if flat.get(key)), [])
    if not isinstance(found, list) or not all(isinstance(i, int) for i in found):
        raise DrafterError(f"the drafter's layer ids {found!r} are no list of numbers")
    return found


def _features(raw: Raw, count: int, num_layers: int) -> tuple[int, ...]:
    """The blocks of the target whose outputs are read. Raises DrafterError."""
    ids = _layer_ids(raw) or [2, num_layers // 2, num_layers - 3]
    # Where the files do not say it: there is no output behind the last one.
    beyond = not raw.get(LAYERS_ARE) and max(ids) == num_layers
    shift = 1 if beyond or _layers_are(raw) == "inputs" else 0
    layers = tuple(i - shift for i in ids)
    if len(layers) != count or any(not 0 <= i < num_layers for i in layers):
        raise DrafterError(
            f"the drafter reads {count} layers, its config.json names {list(layers)}, and this "
            f"model has {num_layers}: use the drafter that was trained for this model"
        )
    return layers


def config_of(raw: Raw, given: Mapping[str, Shape], num_layers: int, folder: Path) -> EagleConfig:
    """The shape of a head, from config.json and shapes by canonical names.

    Args:
        num_layers: of the target.

    Raises:
        DrafterError: no head is there, or what no head can have.
    """
    flat = _flat(raw)
    _refuse(flat, given, folder)
    fc = given["fc.weight"]
    hidden = files.size("hidden_size", flat.get("hidden_size") or fc[0])
    size = files.size("target_hidden_size", flat.get("target_hidden_size") or hidden)
    output = given.get("lm_head.weight")
    norms = [name for name in given if name.startswith("fc_norm.")]
    three = any(f"midlayer.{norm}.weight" in given for norm in _NORMS)
    packed = given.get("fc.scales")
    count = (fc[1] if packed is None else _unpacked(raw, packed, folder)) // size
    return EagleConfig(
        hidden_size=hidden,
        target_size=size,
        vocab_size=files.size("vocab_size", flat.get("vocab_size")),
        features=_features(raw, count, num_layers) if three else (),
        intermediate_size=files.size("intermediate_size", flat.get("intermediate_size")),
        rows=0 if output is None else files.rows(output),
        draft_vocab_size=files.drafted(given),
        own_embedding="embed_tokens.weight" in given,
        fc_bias="fc.bias" in given,
        attention_bias="midlayer.self_attn.q_proj.bias" in given,
        output_bias="midlayer.self_attn.o_proj.bias" in given,
        mlp_bias="midlayer.mlp.up_proj.bias" in given,
        feature_norm="each" if norms else "all" if "input_norm.weight" in given else "none",
        qk_norm="midlayer.self_attn.q_norm.weight" in given,
        norm_before_residual=bool(flat.get("norm_before_residual", False)),
        norm_output=bool(flat.get("norm_output", False)),
        last_norm="norm.weight" in given,
        **_attention(flat, hidden, folder),
    )


def _attention(flat: Raw, hidden: int, folder: Path) -> dict[str, Any]:
    """Heads, rotary embedding and eps, which are the head's own and not the target's."""
    heads = files.size("num_attention_heads", flat.get("num_attention_heads"), 1, 1024)
    kv_heads = files.size("num_key_value_heads", flat.get("num_key_value_heads") or heads, 1, heads)
    head_dim = files.size("head_dim", flat.get("head_dim") or hidden // heads, 2)
    if heads % kv_heads or head_dim % 2:
        raise DrafterError(
            f"the drafter in {folder} has {heads} attention heads of {head_dim} numbers and "
            f"{kv_heads} key/value heads; needed: a multiple, and an even size"
        )
    eps, positions = flat.get("rms_norm_eps") or 1e-6, flat.get("max_position_embeddings") or 2048
    try:
        rope, eps = rope_config(flat, head_dim, 10000.0, int(positions)), float(eps)
        if not isinstance(rope.scaling or {}, Mapping):
            raise ValueError(f"rope_scaling {rope.scaling!r} is no object")
    except (TypeError, ValueError, AttributeError) as error:
        raise DrafterError(f"the drafter's rope or eps cannot be read: {error}") from None
    return {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "norm_eps": eps,
        "rope": rope,
    }


def _refuse(flat: Raw, given: Mapping[str, Shape], folder: Path) -> None:
    """What is no head, or none that is read here. Raises DrafterError."""
    for key in ("quantization_config", "parallel_draft_step"):
        if flat.get(key) not in (None, 1, {}):
            raise DrafterError(
                f"the drafter in {folder} has {key} {flat[key]!r}, which is not read here; needed: "
                "unpacked weights, and a head that drafts token by token"
            )
    if flat.get("use_aux_hidden_state") is False:
        raise DrafterError(
            f"the drafter in {folder} has use_aux_hidden_state false: it reads no inner layers of "
            "the model; needed: an EAGLE-3 head that does, or an EAGLE-1 head"
        )
    if len(given.get("fc.weight", ())) != 2 or "midlayer.self_attn.q_proj.weight" not in given:
        raise DrafterError(
            f"the drafter in {folder} lacks the tensors of an EAGLE head: needed are fc.weight and "
            "a block (midlayer.* or layers.0.*)"
        )
    if str(flat.get("hidden_act") or "silu") != "silu":
        raise DrafterError(f"the drafter's hidden_act {flat['hidden_act']!r} is unknown: silu")


def _unpacked(raw: Raw, scales: Shape, folder: Path) -> int:
    """Inputs of a layer with packed weights."""
    block = raw.get("quantization")
    group = block.get("group_size") if isinstance(block, dict) else None
    if not isinstance(group, int):
        raise DrafterError(f"the drafter in {folder} has packed weights and no quantization block")
    return scales[-1] * group


def _module(raw: Raw, given: Mapping[str, Shape], target: Target, folder: Path) -> Eagle:
    """A head of this shape, if it is for the target."""
    config = config_of(raw, given, target.config.num_layers, folder)
    files.check_sizes(config.target_size, config.vocab_size, target, folder)
    if config.rows:
        files.check_rows(config.rows, target.config.vocab_size, config.draft_vocab_size, folder)
    elif config.hidden_size != config.target_size:
        raise DrafterError(f"the drafter in {folder} lacks lm_head.weight: download it again")
    try:
        return Eagle(config)
    except ModelError as error:
        raise DrafterError(f"the drafter in {folder}: {error}") from None


LAYOUT = files.Layout(KIND, lambda folder: (), renamed, _module)


def load(folder: Path, target: Target) -> Eagle:
    """The head in a folder, bound to its target; see ``files.Layout.load``."""
    return LAYOUT.load(folder, target).bind(target)


def describe(folder: Path) -> files.Description:
    """What the files say of the head. Raises DrafterError."""
    raw, weights = LAYOUT.weights(folder)
    config = shape_of(raw, shapes(weights), folder)
    three = bool(config.features)
    once = ("embed_tokens.",) + (("fc.", "fc_norm.", "input_norm.") if three else ())
    facts = {
        "architecture": f"EAGLE-{3 if three else 1} head, one block of {config.num_heads} heads",
        "head": "own" if config.rows else "target",
        "context_layers": _layer_ids(raw),
        "feature_layers_are": _layers_are(raw) if three else None,
        "head_width": config.hidden_size,
        "base": base_model(raw),
        "draft_vocabulary": config.draft_vocab_size or config.vocab_size,
    }
    one = {name: value for name, value in weights.items() if not name.startswith(once)}
    return files.Description(facts, weights, one, config.hidden_size)


def shape_of(raw: Raw, given: Mapping[str, Shape], folder: Path) -> EagleConfig:
    """As `config_of`, where no model is at hand: any layer is in it. Raises DrafterError."""
    return config_of(raw, given, 1 << 20, folder)


def flat_config(config: EagleConfig, raw: Raw) -> dict[str, Any]:
    """A config.json that says on its top level what `config_of` reads, and leaves open what was."""
    flat, base = _flat(raw), base_model(raw)
    return {
        "model_type": TYPES[bool(config.features)],
        **{key: flat[key] for key in _KEYS if flat.get(key) is not None},
        **({"speculators_model_type": "eagle3"} if _from_speculators(raw) else {}),
        **({"base_model_name_or_path": base} if base else {}),
    }


def base_model(raw: Raw) -> str | None:
    """The model that the head was made for, where its files name it."""
    verifier: Any = raw
    for key in ("speculators_config", "verifier"):
        verifier = verifier.get(key) if isinstance(verifier, dict) else None
    named = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    return named or raw.get("base_model_name_or_path")
