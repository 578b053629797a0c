"""How far a drafter can be trusted under sampling: fitted numbers that lie beside its weights.

The target chooses argmax(l + T g), with its logits l and noise g that the drafter knows too. The
drafter's own logits d miss l by about as much at every temperature T, so what it says of the choice
is

    share * softmax(sharpness * (d + noise * T g))

sharpness: how sure it may be; noise: how much of the draw it follows; share: what is left for it by
tokens that cannot be drafted. docs/decisions.md has the measurements. Nothing here decides a text,
only what is proposed, and which of it is checked.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from mlx_redrafter.errors import DrafterError

FILE = "calibration.json"


Number = float | mx.array


@dataclass(frozen=True)
class Calibration:
    """As it stands here the logits are taken as they are. Arrays (1,): while many are tried in one
    graph, whose kernels are then the same for all."""

    sharpness: Number = 1.0
    noise: Number = 1.0
    share: float = 1.0


def read(folder: Path) -> Calibration:
    """That of a drafter's folder, if it was fitted.

    Raises:
        DrafterError: a file that cannot be read.
    """
    file = folder / FILE
    try:
        found = Calibration(**json.loads(file.read_text(encoding="utf-8")))
        if 0 < found.sharpness < 1e3 and 0 < found.noise < 1e3 and 0 < found.share <= 1:
            return found
        raise ValueError(f"{found} is impossible")
    except FileNotFoundError:
        return Calibration()
    except (OSError, ValueError, TypeError) as error:
        raise DrafterError(
            f"{file} cannot be read ({type(error).__name__}): delete it, or record it again "
            "(mlx-redrafter bench acceptance --record --drafter DIR)"
        ) from None


def save(folder: Path, calibration: Calibration) -> None:
    (folder / FILE).write_text(json.dumps(asdict(calibration), indent=1) + "\n", encoding="utf-8")
