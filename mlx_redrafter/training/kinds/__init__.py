"""The kinds of drafters that can be trained. A kind is a file here, a line below, and what is said
of it in ``config``."""

from __future__ import annotations

from mlx_redrafter.training.config import TrainConfig
from mlx_redrafter.training.kinds.eagle import EagleTrainee
from mlx_redrafter.training.kinds.medusa import MedusaTrainee
from mlx_redrafter.training.kinds.redrafter import ReDrafterTrainee
from mlx_redrafter.training.kinds.trainee import Trainee

TRAINEES: dict[str, type[Trainee]] = {
    "redrafter": ReDrafterTrainee,
    "medusa": MedusaTrainee,
    "eagle3": EagleTrainee,
}


def of(config: TrainConfig) -> type[Trainee]:
    """The kind of drafter that a run trains."""
    return TRAINEES[config.kind]
