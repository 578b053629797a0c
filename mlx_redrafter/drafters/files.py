"""A drafter's folder: its configuration, its tensors, and how they get into a module.

What is wrong with either is one DrafterError, whatever kind of drafter it is.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import dequantize_model

from mlx_redrafter.errors import DrafterError, ModelError
from mlx_redrafter.models import Target
from mlx_redrafter.models.files import (
    SAFETENSORS,
    TORCH,
    heads_among,
    pickles_among,
    weight_files,
)
from mlx_redrafter.models.weights import (
    Shape,
    finite,
    misfit,
    parameters,
    preview,
    read_header,
    read_json,
    read_weights,
    shapes,
)

MOST = 2**28  # a larger size is damage, and MLX cannot count so far
VOCABULARY = "draft_vocab"
"""The tensor that holds the target's ids of a drafter's tokens, in every kind."""

Module = TypeVar("Module", bound=nn.Module)


class Description(NamedTuple):
    """What the files of a drafter say to people.

    facts: ``architecture`` in words, ``head`` (``target``: it reads the target's output rows
    besides), ``draft_vocabulary`` (None: the target's whole one), and more by kind. weights: the
    drafter's own tensors, not evaluated; one_level: those of them that a level reads. width: of
    an output row.
    """

    facts: dict[str, Any]
    weights: Mapping[str, mx.array]
    one_level: Mapping[str, mx.array]
    width: int


class Layout(NamedTuple, Generic[Module]):
    """How the folders of a kind of drafter become its modules.

    kind: what has such tensors, in words. files: where they are, of a folder; none: in all of its
    weights. renamed: tensors by stored names and config.json -> by the module's names. module:
    config.json, shapes, target, folder -> a module of that shape, if it is for the target.
    """

    kind: str
    files: Callable[[Path], Sequence[Path]]
    renamed: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    module: Callable[[Mapping[str, Any], Mapping[str, Shape], Target, Path], Module]

    def weights(self, folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
        """config.json, and the tensors by the module's names, not evaluated yet.
        Raises DrafterError."""
        raw = raw_config(folder)
        return raw, self.renamed(stored_weights(folder, self.files(folder)), raw)

    def load(self, folder: Path, target: Target) -> Module:
        """The module with its weights; see ``fill``.

        Raises:
            DrafterError: missing or broken files, or a drafter for another model.
        """
        raw, weights = self.weights(folder)
        module = quantised(self.module(raw, shapes(weights), target, folder), raw, weights, folder)
        return fill(module, weights, raw, target, folder, self.kind)

    def check(self, folder: Path, target: Target) -> None:
        """Configuration, names and shapes. Raises DrafterError."""
        raw = raw_config(folder)
        given = self.renamed(stored_shapes(folder, self.files(folder)), raw)
        module = quantised(self.module(raw, given, target, folder), raw, given, folder)
        check_tensors(module, given, folder, self.kind)


def raw_config(folder: Path) -> dict[str, Any]:
    """Raises DrafterError: there is none, or it is not readable."""
    try:
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json: give the folder of a drafter")
        return read_json(folder / "config.json")
    except ModelError as error:
        raise DrafterError(str(error)) from None


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json of a drafter's folder."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def refuse_pickles(folder: Path) -> None:
    """DrafterError, with what to run: the drafter in a folder is a PyTorch file."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    heads = heads_among(names, [kind.suffix for kind in (SAFETENSORS, *TORCH)])
    found = heads or pickles_among(names, folder)
    if found and not found[0].endswith(SAFETENSORS.suffix):
        raise DrafterError(
            f"the drafter in {folder} is a PyTorch file ({found[0]}); make a folder of it first: "
            f"mlx-redrafter convert {shlex.quote(str(folder))} --out FOLDER"
        )


def stored_shapes(folder: Path, files: Sequence[Path] = ()) -> dict[str, Shape]:
    """Every tensor's shape by name, from the files' headers. Raises DrafterError."""
    try:
        headers = [read_header(file) for file in files or weight_files(folder)]
        return {name: tuple(entry["shape"]) for header in headers for name, entry in header.items()}
    except (ModelError, OSError) as error:
        raise DrafterError(str(error)) from None


def stored_weights(folder: Path, files: Sequence[Path] = ()) -> dict[str, mx.array]:
    """The tensors by name, not evaluated yet. Raises DrafterError."""
    try:
        return read_weights(files or weight_files(folder))
    except ModelError as error:
        raise DrafterError(str(error)) from None


def size(name: str, value: Any, least: int = 1, most: int = MOST) -> int:
    """A size of a configuration. Raises DrafterError: no drafter can have it."""
    if not isinstance(value, int) or not least <= value <= most:
        raise DrafterError(f"the drafter's {name} {value!r} is an impossible size")
    return value


def drafted(given: Mapping[str, Shape]) -> int | None:
    """The size of the draft vocabulary; None: there is none. Raises DrafterError."""
    shape = given.get(VOCABULARY)
    return None if shape is None else size("draft_vocab_size", rows(shape))


def rows(shape: Shape) -> int:
    """Of a matrix, packed or not."""
    return shape[0] if shape else 0


def check_rows(stored: int, vocabulary: int, drafted: int | None, folder: Path) -> None:
    """Output matrices have a row for every token of the target or of the draft vocabulary.
    Raises DrafterError."""
    allowed = sorted({vocabulary, drafted or vocabulary})
    if stored not in allowed:
        raise DrafterError(
            f"the drafter in {folder} has output matrices of {stored} tokens; needed: "
            f"{' or '.join(map(str, allowed))}: use the drafter that was trained for this model, "
            "or --no-draft"
        )


def check_sizes(hidden: int, vocabulary: int, target: Target, folder: Path | str) -> None:
    """Is the drafter for a model of the target's sizes? Raises DrafterError, naming both."""
    for what, mine, theirs in [
        ("hidden size", hidden, target.config.hidden_size),
        ("vocabulary size", vocabulary, target.config.vocab_size),
    ]:
        if mine != theirs:
            raise DrafterError(
                f"the drafter in {folder} is for a model with {what} {mine}, but this model's is "
                f"{theirs}: use the drafter that was trained for this model, or --no-draft"
            )


def quantised(
    module: Module, raw: Mapping[str, Any], given: Mapping[str, Any], folder: Path
) -> Module:
    """The layers of which packed weights are given become quantised ones."""
    if quantization := packed(raw, given):
        try:
            nn.quantize(
                module,
                group_size=quantization["group_size"],
                bits=quantization["bits"],
                class_predicate=lambda path, module: f"{path}.scales" in given,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DrafterError(
                f"the quantization of the drafter in {folder} cannot be read ({error}); "
                "needed: a group_size and bits that its layers can have"
            ) from None
    return module


def packed(raw: Mapping[str, Any], given: Iterable[str]) -> dict[str, Any] | None:
    """What config.json says of packed weights; nothing where none are stored."""
    return raw.get("quantization") if any(name.endswith(".scales") for name in given) else None


def check_tensors(module: nn.Module, given: Mapping[str, Shape], folder: Path, kind: str) -> None:
    """Every tensor must be known, present and of its shape. ``kind`` is what has such tensors."""
    missing, unknown, wrong = misfit(shapes(parameters(module)), given)
    if missing:
        raise DrafterError(f"the drafter in {folder} lacks {preview(missing)}: download it again")
    if unknown:
        raise DrafterError(
            f"the drafter in {folder} has tensors that no {kind} has: {preview(unknown)}"
        )
    if wrong:
        raise DrafterError(f"tensors in {folder} do not fit its config.json: {preview(wrong)}")


def fill(
    module: Module,
    weights: Mapping[str, mx.array],
    raw: Mapping[str, Any],
    target: Target,
    folder: Path,
    kind: str,
) -> Module:
    """Put the weights into a module that is quantised as they are.

    On a CPU they become float32, quantised ones included: 16-bit and packed weights are several
    times slower there. Elsewhere they stay as stored, at the target's activation type.

    Raises:
        DrafterError: tensors that do not fit, that hold NaN or infinity, or tokens beyond the
            target's.
    """
    check_tensors(module, shapes(weights), folder, kind)
    weights = dict(weights)
    if VOCABULARY in weights:
        weights[VOCABULARY] = _vocabulary(weights[VOCABULARY], target, folder)
    weights = {
        name: value if value.dtype in (mx.uint32, mx.int32) else value.astype(target.dtype)
        for name, value in weights.items()
    }
    module.load_weights(list(weights.items()))
    flags = finite(weights)
    mx.eval(module.parameters(), flags)
    if broken := [name for name, flag in flags.items() if not flag.item()]:
        raise DrafterError(f"the drafter in {folder} holds NaN or infinity: {preview(broken)}")
    if packed(raw, weights) and mx.default_device() == mx.Device(mx.cpu):
        module = cast(Module, dequantize_model(module))
        mx.eval(module.parameters())  # or every compiled step would do it again
    return module


def save(folder: Path, config: Mapping[str, Any], weights: dict[str, mx.array]) -> None:
    """Write ``config.json`` and ``model.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def _vocabulary(ids: mx.array, target: Target, folder: Path) -> mx.array:
    values = cast(list[int], ids.tolist())
    whole = mx.issubdtype(ids.dtype, mx.integer)
    if not whole or not 0 <= min(values) <= max(values) < target.config.vocab_size:
        raise DrafterError(f"the draft vocabulary in {folder} holds tokens beyond the model's")
    return ids.astype(mx.int32)


def cut_rows(layer: nn.Module, ids: mx.array) -> None:
    """Keep these rows of an output matrix, as it is stored: packed rows are rows too."""
    for name in ("weight", "scales", "biases"):
        if layer.get(name) is not None:
            layer[name] = mx.take(layer[name], ids, axis=0)
    mx.eval(layer.parameters())


def target_logits(target: Target, drafted: mx.array | None) -> Any:
    """The target's head as a function (M, D) -> (M, Vd)."""
    if drafted is None:
        return target.logits
    rows = target.head_rows(drafted)
    mx.eval(rows)
    return lambda x: target.scaled(x @ rows.T)
