"""`mlx-redrafter chat`, on a terminal, and line by line where there is none."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_redrafter.cli import net, remarks
from mlx_redrafter.cli.answer_writer import AnswerWriter
from mlx_redrafter.cli.conversation import Conversation, unfinished, unquoted
from mlx_redrafter.cli.machines import MachineOptions
from mlx_redrafter.cli.options import MAX_TOKENS, DecodeOptions, ModelOptions, Quiet, Verbose
from mlx_redrafter.errors import OptionError, RedrafterError
from mlx_redrafter.runtime.checks import checked_text
from mlx_redrafter.terminal import console, modes
from mlx_redrafter.terminal.progress import Waiting
from mlx_redrafter.text.template import has_template

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History

    from mlx_redrafter.text.answer import GenerationResponse

PROMPT = "> "


def command(
    *,
    source: ModelOptions,
    options: DecodeOptions,
    machines: MachineOptions,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Keep no file of what was typed.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Talk with a model; /help lists what you can type besides questions."""
    options.check()
    with machines.joined() as there:
        model, tokenizer = source.load(options.tree(), there)
        code = run(model, tokenizer, options, history=not no_history, quiet=quiet, verbose=verbose)
    raise typer.Exit(code)


class Interrupted(Exception):
    """Ctrl-C while the prompt was being read: nothing of the answer exists yet."""


class StopFlag:
    """Set by the first Ctrl-C; the second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.set = False
        self.waiting = Waiting()

    def on_signal(self, *_: object) -> None:
        if self.set:
            raise KeyboardInterrupt
        self.set = True

    def on_progress(self, done: int, total: int) -> None:
        self.waiting.on_progress(done, total)
        if self.set:
            raise Interrupted


@contextlib.contextmanager
def stoppable() -> Iterator[StopFlag]:
    """Within, Ctrl-C asks to stop after the running step, so that the cache stays whole."""
    flag = StopFlag()
    before = signal.signal(signal.SIGINT, flag.on_signal)
    try:
        yield flag
    finally:
        flag.waiting.close()
        signal.signal(signal.SIGINT, before)


class Chat:
    """Answers questions of a conversation aloud."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        options: DecodeOptions,
        *,
        interactive: bool,
        quiet: bool = False,
        verbose: bool = False,
    ) -> None:
        from mlx_redrafter.cache.session import Session

        self.model, self.tokenizer = model, tokenizer
        self.interactive, self.quiet, self.verbose = interactive, quiet, verbose
        self.session = Session()
        self.conversation = Conversation(
            tokenizer,
            options.for_model(tokenizer, context := model.target.config.max_positions),
            context=context,
            drafter=remarks.drafter_name(model.drafter_folder),
            model=model.name,
            draft=model.drafting,
        )

    def say(self, line: str) -> bool:
        """Take a message or a command; False: leave. After an error the conversation is as before.

        Raises RedrafterError, and whatever a tokenizer, a template or MLX raises.
        """
        checked_text(line, "input")
        if not line.strip():
            return True
        if not line.strip().startswith("/"):
            self.answer(self.conversation.ask(unquoted(line)))
            return True
        reply = self.conversation.command(line)
        if reply.failed:
            raise OptionError(reply.text)
        if reply.text:
            console.note(reply.text)
        if reply.action == "retry":
            self.answer(self.conversation.again())
        return reply.action != "exit"

    def answer(self, prompt: list[int]) -> None:
        """Stream the answer to `prompt` and keep it."""
        if warning := self.conversation.warning(len(prompt)):
            console.warn(warning)
        pieces: list[str] = []
        last, stopped = None, False
        writer = AnswerWriter.after(self.tokenizer, prompt, terminal=self.interactive)
        try:
            with modes.silent(), stoppable() as flag, self._stream(prompt, flag) as stream:
                for last in stream:
                    flag.waiting.word()
                    pieces.append(last.text)
                    writer.write(last.text)
                    if flag.set:
                        stopped = last.finish_reason is None
                        break
        except Interrupted:
            stopped = True
        except BaseException as error:
            self.conversation.unasked()
            if not isinstance(error, RedrafterError | KeyboardInterrupt):
                self.session = type(self.session)()  # nobody knows what it holds now
            if pieces:
                writer.close()
                console.write("\n")
            raise
        writer.close()
        console.write("\n")
        if stopped:
            console.note("[stopped]")
        self.conversation.answered("".join(pieces), last and last.stats, stopped=stopped)
        self.report(last, writer.in_thought("".join(pieces)))

    def report(self, last: GenerationResponse | None, in_thought: bool) -> None:
        """What is said below an answer."""
        if last is None:
            return
        if in_thought and last.finish_reason == "length":
            limit = self.conversation.options.max_tokens or MAX_TOKENS
            console.warn(remarks.cut_thought(last.generation_tokens, limit, "/set max_tokens"))
        if not self.quiet:
            console.note(remarks.summary(last))
            if self.verbose:
                console.note(remarks.details(last.stats))

    def _stream(self, prompt: list[int], flag: StopFlag) -> contextlib.closing[Any]:
        from mlx_redrafter.api import stream_generate

        stream = stream_generate(
            self.model,
            self.tokenizer,
            prompt,
            session=self.session,
            prompt_progress_callback=flag.on_progress,
            **self.conversation.arguments(),
        )
        return contextlib.closing(stream)


def run(
    model: Any,
    tokenizer: Any,
    options: DecodeOptions,
    *,
    history: bool = True,
    quiet: bool = False,
    verbose: bool = False,
) -> int:
    """Talk until the user leaves or the input ends; the exit code."""
    missing = model.drafting and model.drafter is None
    if missing and not quiet:
        console.note(remarks.no_drafter(model.name))
    if not has_template(tokenizer):
        console.note(remarks.no_template(model.name, options.system_prompt))
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    chat = Chat(model, tokenizer, options, interactive=interactive, quiet=quiet, verbose=verbose)
    if not interactive:
        return read_lines(chat)
    sources = remarks.drafts_from(chat.conversation.drafter, options.tree())
    drafting = f"drafting from {sources}" if model.drafting and sources else "without drafting"
    console.note(f"{model.name}, {drafting}. /help lists the commands, Ctrl-D leaves.")
    return read_terminal(chat, prompt_session(history))


def read_lines(chat: Chat) -> int:
    """Every line of stdin is a message, a block in three quotes too; 1 if one went wrong."""
    code, data = 0, b""
    for line in console.input_lines():
        data += line
        if unfinished(data.decode(errors="replace")):
            continue
        message, data = data, b""
        try:
            if not chat.say(console.decoded(message)):
                return code
        except Exception as error:
            net.survive(error)
            code = 1
    return code


def read_terminal(chat: Chat, lines: PromptSession[str]) -> int:
    """The loop of a terminal. Ctrl-C clears the line, Ctrl-D leaves."""
    while True:
        try:
            line = lines.prompt(PROMPT)
        except KeyboardInterrupt:
            console.note("Ctrl-D or /exit leaves")
            continue
        except EOFError:
            return 0
        try:
            if not chat.say(line):
                return 0
        except KeyboardInterrupt:
            console.note("Ctrl-D or /exit leaves")
        except Exception as error:
            net.survive(error)


def prompt_session(keep_history: bool) -> PromptSession[str]:
    """A line editor: Enter sends, Alt-Enter and pasted line ends stay in the message."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        if unfinished(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        multiline=True,
        key_bindings=keys,
        history=_history(keep_history),
        prompt_continuation=lambda *_: ". ",
    )


def _history(keep: bool) -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    from mlx_redrafter.runtime.paths import cache_dir

    if not keep:
        return InMemoryHistory()

    class OptionalHistory(FileHistory):
        """A file that breaks while it is used costs no chat."""

        def load_history_strings(self) -> Iterable[str]:
            with contextlib.suppress(OSError):
                yield from super().load_history_strings()

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(string.encode(errors="replace").decode())

    file = cache_dir() / "history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.open("ab").close()
    except OSError as error:
        console.warn(f"no history is kept: {file} cannot be written ({error.strerror})")
        return InMemoryHistory()
    return OptionalHistory(str(file))
