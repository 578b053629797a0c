"""A machine that another one has started; what it is to do comes from there."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from mlx_redrafter.distributed.ending import End
from mlx_redrafter.distributed.noise import without_noise
from mlx_redrafter.distributed.wire import to_first
from mlx_redrafter.errors import RedrafterError


def main() -> None:
    """This process ends in here."""
    end, over = End(), threading.Event()
    without_noise()
    try:
        settings = json.loads(sys.stdin.buffer.readline())
    except ValueError:
        end.now("nothing was said of what to do: use mlx-redrafter generate --hosts")

    def watch() -> None:
        """Whoever started this one has ended when the input does."""
        sys.stdin.buffer.read()
        if not over.wait(2.0):
            end.now("the first machine has ended")

    threading.Thread(target=watch, daemon=True).start()
    try:
        work(settings, end)
    except RedrafterError as error:
        end.now(str(error))
    except Exception as error:
        from mlx_redrafter.cli.net import describe

        end.now(describe(error))
    over.set()
    os._exit(0)  # nothing of a collective is left to wait for


def work(settings: dict[str, Any], end: End) -> None:
    """Be there at once, then get ready, and follow."""
    wire = to_first(settings, end)
    from mlx_redrafter.distributed import cluster
    from mlx_redrafter.distributed.follow import follow

    alike = cluster.greeted(wire)
    rank = int(settings["rank"])
    link = cluster.join_ring(settings["environment"], settings["backend"], rank, end)
    link.alike = alike
    cluster.test(link)
    follow(link, wire, end)


if __name__ == "__main__":
    main()
