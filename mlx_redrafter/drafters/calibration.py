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

from mlx_redrafter.errors import DrafterError

FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """As it stands here the logits are taken as they are. Raises ValueError: impossible numbers."""

    sharpness: float = 1.0
    noise: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.sharpness < 1e3 and 0 < self.noise < 1e3 and 0 < self.share <= 1):
            raise ValueError(f"{self} is impossible")


def read(folder: Path) -> Calibration:
    """That of a drafter's folder, if it was fitted.

    Raises:
        DrafterError: a file that cannot be read.
    """
    file = folder / FILE
    try:
        return Calibration(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Calibration()
    except (OSError, ValueError, TypeError) as error:
        raise DrafterError(
            f"{file} cannot be read ({type(error).__name__}): delete it, or record it again "
            "(mlx-redrafter bench acceptance --record --drafter DIR)"
        ) from None


def save(folder: Path, calibration: Calibration) -> None:
    (folder / FILE).write_text(json.dumps(asdict(calibration), indent=1) + "\n", encoding="utf-8")
