"""The budget of a decode step, counted: dispatches, synchronisations, bytes, host time.

python -m mlx_redrafter.counts [--model M] [--drafter D] [--shape W,L,N,LOOKUP] [--json]
"""

from __future__ import annotations

import sys

import typer

from mlx_redrafter import console
from mlx_redrafter.counts.report import main
from mlx_redrafter.errors import RedrafterError

if __name__ == "__main__":
    try:
        typer.run(main)
    except RedrafterError as error:
        console.error(str(error))
        sys.exit(1)
