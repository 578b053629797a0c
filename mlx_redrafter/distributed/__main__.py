"""A machine that another one has started; what it is to do comes from there."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from typing import Any

from mlx_redrafter.distributed.wire import End, to_first
from mlx_redrafter.errors import RedrafterError
from mlx_redrafter.terminal import console

_HELD = 120.0  # seconds that no thread of this process may run


def main() -> int:
    """The exit code."""
    end = End()
    settings = json.loads(sys.stdin.buffer.readline() or b"{}")
    if not settings:
        console.error("nothing was said of what to do: use mlx-redrafter generate --hosts")
        return 1
    over = threading.Event()

    def watch() -> None:
        """Whoever started this one has ended when the input does."""
        sys.stdin.buffer.read()
        if not over.wait(2.0):
            end.now("the first machine has ended")

    threading.Thread(target=watch, daemon=True).start()
    threading.Thread(target=_end_if_held, daemon=True).start()
    try:
        work(settings, end)
        code = 0
    except RedrafterError as error:
        console.error(str(error))
        code = 1
    except Exception as error:
        from mlx_redrafter.cli.net import describe

        console.error(describe(error))
        code = 1
    over.set()
    sys.stderr.flush()
    os._exit(code)  # nothing of a collective is left to wait for


def _end_if_held() -> None:
    """MLX holds Python's lock in some calls: where one of these waits for ever, no thread can end
    the process. This does, without the lock."""
    with open(os.devnull, "w") as nowhere:
        while True:
            faulthandler.dump_traceback_later(_HELD, exit=True, file=nowhere)
            time.sleep(1)


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
    sys.exit(main())
