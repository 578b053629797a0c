"""A chat in a process of its own, on a model that says what it is told: for pipes and terminals.

python terminal_chat.py SECONDS ARGUMENT ...    SECONDS between the words of an answer
python terminal_chat.py --job SECONDS ARGUMENT ...    the same, as a job of a shell
"""

from __future__ import annotations

import os
import signal
import sys
import termios


def echo() -> bool:
    return bool(termios.tcgetattr(0)[3] & termios.ECHO)


def job(arguments: list[str]) -> None:
    """A shell with one job: it says when that was stopped, whether the terminal echoes then, and
    lets it go on."""
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, __file__, *arguments])
    _, status = os.waitpid(child, os.WUNTRACED)
    print(f"stopped {os.WIFSTOPPED(status)}, echo {echo()}", flush=True)
    os.tcsetpgrp(0, child)
    os.kill(child, signal.SIGCONT)
    _, status = os.waitpid(child, 0)
    os.tcsetpgrp(0, os.getpid())
    print(f"left {os.waitstatus_to_exitcode(status)}, echo {echo()}", flush=True)


def main(arguments: list[str]) -> None:
    import time

    import pytest
    from fakes import FakeModel, install

    from mlx_redrafter.cli.main import main

    pause = float(arguments[0])
    model = FakeModel(answers=[[f"word{i} " for i in range(20)]])
    model.before_piece = lambda index: time.sleep(pause)
    install(pytest.MonkeyPatch(), model)
    sys.argv = ["mlx-redrafter", *arguments[1:]]
    main()


if __name__ == "__main__":
    if sys.argv[1] == "--job":
        job(sys.argv[2:])
    else:
        main(sys.argv[1:])
