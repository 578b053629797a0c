"""What holds under every command line: whatever goes wrong is one line and an exit code."""

from __future__ import annotations

import contextvars
import io
import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from mlx_redrafter.cli import help_page
from mlx_redrafter.errors import OptionError, RedrafterError
from mlx_redrafter.terminal import console, modes

INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + the signal, as a shell has it
SHORT = 300  # characters that are shown of an error that is not ours

_debugging = contextvars.ContextVar("debugging", default=False)
# typer brings a copy of click, or uses click itself, by its version.
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = typer.BadParameter.__mro__[2]
_OUT_OF_MEMORY = ("malloc", "unable to allocate", "insufficient memory", "outofmemory",
                  "out of memory")  # fmt: skip


def _set_debug(value: bool) -> bool:
    if value:
        _debugging.set(True)
    return value


def debugging() -> bool:
    """Was --debug given?"""
    return _debugging.get()


def _debug_option() -> Any:
    """--debug, which every command takes and no command is told of."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def declare(
        debug: Annotated[
            bool,
            typer.Option(
                "--debug",
                callback=_set_debug,
                is_eager=True,
                expose_value=False,
                rich_help_panel=help_page.OTHER,
                help="Show the traceback of errors.",
            ),
        ] = False,
    ) -> None: ...

    return typer.main.get_command(app).params[0]


_DEBUG = _debug_option()


class _Net:
    """What a command line does besides what typer does."""

    def main(self, *given: Any, **more: Any) -> NoReturn:
        """Run, and leave with an exit code; under ``--debug`` an error is raised instead."""
        context = contextvars.copy_context()
        run: Callable[..., Any] = super().main  # type: ignore[misc]
        modes.drop_unknown_size()
        with modes.kept():
            try:
                found = context.run(run, *given, **{**more, "standalone_mode": False})
                code = found if isinstance(found, int) else 0
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else 1
            except KeyboardInterrupt:
                code = INTERRUPTED
            except Exception as error:
                if context.get(_debugging) and not isinstance(error, _ClickException):
                    raise
                code = _told(error)
            code = _flushed(code)
        sys.exit(code)

    def get_params(self, ctx: Any) -> list[Any]:
        *own, shown_help = super().get_params(ctx)  # type: ignore[misc]
        return [*own, _DEBUG, shown_help]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc, no-any-return]
        except _UsageError as error:
            error.ctx = error.ctx or ctx  # whose --help is the one to see
            raise

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print it; nothing is left to the formatter."""
        help_page.show(self, ctx, self.rows(ctx))

    def rows(self, ctx: Any) -> dict[str, list[help_page.Row]]:
        """The commands of a group with what they do, by section."""
        return {}

    def invoke(self, ctx: Any) -> Any:
        """What typer would answer in its own way is taken before it."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)  # type: ignore[misc]
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _discard_output()  # whoever read it has left
            raise typer.Exit(PIPE_CLOSED) from None


class Commands(_Net, TyperGroup):
    """A program of several commands."""

    def rows(self, ctx: Any) -> dict[str, list[help_page.Row]]:
        known = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        shown = {name: one for name, one in known.items() if one is not None and not one.hidden}
        return {"Commands": [(name, one.get_short_help_str(200)) for name, one in shown.items()]}


class Command(_Net, TyperCommand):
    """A program of one command."""


def start(app: typer.Typer) -> NoReturn:
    """Run a program in a process of its own: with streams that do not fail for what they carry."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # while all this was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _open_streams()
    _check_temporary_folder()
    if "--debug" not in sys.argv:
        threading.excepthook = lambda what: console.error(describe(what.exc_value))
        sys.unraisablehook = lambda what: None
    try:
        app()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is left to do says nothing any more
    raise AssertionError("a program leaves with an exit code")


def moved(old: str, new: str) -> Any:
    """Wrong usage: a command that has another name now."""
    return _UsageError(f"{old} is now: mlx-redrafter {new}")


def survive(error: Exception) -> None:
    """Tell of an error after which the program goes on; raise it where all that follows would be
    lost as well, because there is no output any more."""
    if isinstance(error, OSError) and _lost_output() is not None:
        raise error
    if _debugging.get():
        traceback.print_exception(error)
    console.error(describe(error))


def describe(error: BaseException | None) -> str:
    """One line for a person: what was given, or what the machine refuses, or a fault of ours."""
    if isinstance(error, RedrafterError):
        return str(error)
    if isinstance(error, _ClickException):
        return _usage(error)
    text = " ".join(str(error).split())
    text = text if len(text) <= SHORT else f"{text[:SHORT]} ..."
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _OUT_OF_MEMORY):
        return (
            f"out of memory{f' ({text})' if text else ''}: close other programs, or take a smaller "
            "model, a shorter prompt or fewer tokens"
        )
    if isinstance(error, OSError) and error.strerror:
        about = (
            f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        )
        return f"{about}{_lower(error.strerror)}"
    return f"unexpected {type(error).__name__}{f': {text}' if text else ''} (--debug shows where)"


def _usage(error: Any) -> str:
    text = error.format_message().rstrip(".").replace(". Did you mean", "; did you mean")
    text = ": ".join(map(_lower, text.replace(": Value error, ", ": ").split(": ")))
    context = getattr(error, "ctx", None)
    return text + (f" (see {context.command_path} --help)" if context and text else "")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _told(error: Exception) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    if isinstance(error, typer.Abort):
        error = OptionError("the input ended too early")
    # That standard output is lost is told where it is flushed; a help text is printed already.
    lost = isinstance(error, OSError) and _lost_output() is not None
    if not lost and (text := describe(error)):
        console.error(text)
    return int(getattr(error, "exit_code", 1)) if isinstance(error, _ClickException) else 1


def _flushed(code: int) -> int:
    """The exit code, after all of the output is out."""
    lost = _lost_output()
    if lost is None:
        return code
    _discard_output()
    if isinstance(lost, BrokenPipeError):
        return code or PIPE_CLOSED
    console.error(f"standard output cannot be written: {_lower(lost.strerror or str(lost))}")
    return code or 1


def _lost_output() -> OSError | None:
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return getattr(raw, "lost", None)


def _discard_output() -> None:
    """The flush at exit must not complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    console.warn(f"warning: {message}")


# Streams


class _Output(io.FileIO):
    """Remembers that something could not be written."""

    lost: OSError | None = None

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = error
            raise


class _Unfailing(io.FileIO):
    """Drops what cannot be written: statistics are not worth an answer."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _open_streams() -> None:
    """None may be missing, and a letter that one cannot show becomes a question mark."""
    for name, mode, flags in (
        ("stdin", "r", os.O_WRONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY),
    ):  # fmt: skip
        if getattr(sys, name) is None:
            # One that was closed takes its number back, and fails where it is used.
            setattr(sys, name, open(os.open(os.devnull, flags), mode, encoding="utf-8"))  # noqa: SIM115
    sys.stdout, sys.stderr = _replaced(sys.stdout, _Output), _replaced(sys.stderr, _Unfailing)


def _replaced(stream: Any, raw: type[io.FileIO]) -> io.TextIOWrapper:
    """The same stream on another lowest layer."""
    out = io.BufferedWriter(raw(stream.fileno(), "w", closefd=False))
    lines = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(out, stream.encoding, errors="replace", line_buffering=lines)


def _check_temporary_folder() -> None:
    """MLX and its compiler fail where TMPDIR is no folder; everyone else takes another."""
    given = os.environ.get("TMPDIR")
    try:
        found = tempfile.gettempdir()
    except OSError:
        return  # whoever needs one will say so
    if given and found != os.path.abspath(given):
        console.warn(f"warning: TMPDIR={given} is not a folder that can be written: using {found}")
    if given or found != "/tmp":
        os.environ["TMPDIR"] = found
