"""The budget of a decode step, counted: dispatches, synchronisations, bytes, host time.

python -m mlx_redrafter.counts [--model M] [--drafter D] [--shape W,L,N,LOOKUP] [--json]
"""

from __future__ import annotations

from mlx_redrafter import net
from mlx_redrafter.counts.report import main

if __name__ == "__main__":
    net.run_module(main)
