"""A conversation without its terminal: messages, settings, slash commands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mlx_redrafter.cli import remarks
from mlx_redrafter.cli.options import MAX_TOKENS, DecodeOptions
from mlx_redrafter.errors import OptionError, RedrafterError
from mlx_redrafter.runtime.paths import user_path, write_whole
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.text.template import Message, prompt_ids

HELP = """\
/help               this list
/clear              forget the conversation
/system TEXT        set the system prompt and start anew
/set [KEY VALUE]    change an option (temp, max_tokens, thinking, ...), or list them
/stats              what drafting did
/save FILE          write the conversation to a JSON file
/load FILE          go on with a saved one
/drafter [on|off]   draft, or decode plainly (the text is the same); or say what drafts
/retry              answer the last question again
/exit               leave (also /bye, /quit, Ctrl-D)
A message may have several lines: paste it, press Alt-Enter, or put it between \"\"\" and \"\"\".
Ctrl-C stops an answer; what was said so far is kept."""

QUOTES = '"""'
AUTOMATIC = (
    "beam_width", "beam_length", "nodes", "lookup", "prefill_step_size", "thinking",
    "max_tokens",
)  # fmt: skip
LONGEST = 10**8  # bytes of a saved conversation
Action = Literal["stay", "exit", "retry"]


@dataclass(frozen=True)
class Reply:
    """What a command says, and what the terminal does next."""

    text: str = ""
    action: Action = "stay"
    failed: bool = field(default=False, compare=False)


def unfinished(text: str) -> bool:
    """Was a block opened by three quotes and not closed yet?"""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def unquoted(text: str) -> str:
    """The message without the three quotes around it."""
    text = text.strip()
    if len(text) >= 2 * len(QUOTES) and text.startswith(QUOTES) and text.endswith(QUOTES):
        return text[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


@dataclass
class Conversation:
    """What was said, and how to answer.

    Args:
        tokenizer: mlx-lm's; without a chat template the text itself is continued.
        options: of the next answer; its system prompt opens the conversation.
        context: the most tokens that prompt and answer can have together.
        drafter: name of the trained drafter; None: the text itself is all there is to draft from.
        model: name that goes into a saved file.
        draft: whether to draft.
    """

    tokenizer: Any
    options: DecodeOptions
    context: int
    drafter: str | None = None
    model: str = ""
    draft: bool = True
    messages: list[Message] = field(default_factory=list)
    attempt: int = 0
    last: DraftStats | None = None
    total: DraftStats = field(default_factory=DraftStats)
    _before: list[Message] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        system = self.options.system_prompt
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str) -> list[int]:
        """Add a question; the prompt's token ids. If it raises an error, it forgets it again."""
        self.attempt, self._before = 0, list(self.messages)
        self.messages.append({"role": "user", "content": text})
        return self._prompt()

    def again(self) -> list[int]:
        """Drop the last answer; the prompt of its question, and another seed when sampling."""
        self._before = list(self.messages)
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        self.attempt += 1
        return self._prompt()

    def answered(self, text: str, stats: DraftStats | None, *, stopped: bool = False) -> None:
        """Keep an answer; one that was stopped before its first word takes its question along."""
        if stats is not None:
            self.last = stats
            self.total.add(stats)
        if not text and stopped:
            self.unasked()
            return
        message: Message = {"role": "assistant", "content": text}
        self.messages.append({**message, "stopped": True} if stopped else message)

    def unasked(self) -> None:
        """Forget a question that got no answer; one that was asked again keeps the old one."""
        self.messages = self._before

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the next answer."""
        arguments = self.options.arguments()
        return {**arguments, "seed": self.options.seed + self.attempt, "draft": self.draft}

    def warning(self, prompt_tokens: int) -> str | None:
        """What to say before an answer that the context may cut short."""
        left = self.context - prompt_tokens
        if left >= (self.options.max_tokens or MAX_TOKENS):
            return None
        return (
            f"context nearly full: {prompt_tokens} of {self.context} tokens are used, the answer "
            f"can have {left}; /clear starts anew"
        )

    def _prompt(self) -> list[int]:
        try:
            config = self.options.template_config(self.tokenizer)
            prompt = prompt_ids(self.tokenizer, self.messages, config)
            if len(prompt) >= self.context:
                raise OptionError(
                    f"the conversation has {len(prompt)} tokens and the model's context "
                    f"{self.context}: /clear starts anew"
                )
        except Exception:
            self.unasked()
            raise
        return prompt

    # Slash commands

    def command(self, line: str) -> Reply:
        """Carry out a line that begins with a slash. What is wrong with it is said, not raised."""
        name, _, argument = line.strip()[1:].partition(" ")
        name = {"bye": "exit", "quit": "exit", "?": "help"}.get(name, name)
        commands = {
            "help": lambda _: Reply(HELP),
            "exit": lambda _: Reply(action="exit"),
            "clear": self._clear,
            "system": self._system,
            "set": self._set,
            "stats": self._stats,
            "save": self._save,
            "load": self._load,
            "drafter": self._drafter,
            "retry": self._retry,
        }
        if name not in commands:
            return Reply(f"unknown command /{name}: /help lists them", failed=True)
        try:
            return commands[name](argument.strip())
        except RedrafterError as error:
            return Reply(str(error), failed=True)

    def _clear(self, _: str) -> Reply:
        self.clear()
        return Reply("the conversation is forgotten")

    def _system(self, text: str) -> Reply:
        if not text:
            return Reply(f"system prompt: {self.options.system_prompt or 'that of the template'}")
        self.options = dataclasses.replace(self.options, system_prompt=unquoted(text))
        self.clear()
        return Reply("system prompt set; the conversation starts anew")

    def _set(self, argument: str) -> Reply:
        fields = {f.name for f in dataclasses.fields(DecodeOptions)} - {"system_prompt"}
        key, _, value = argument.partition(" ")
        key = key.replace("-", "_")
        if not key:
            width = max(map(len, fields))
            rows = [
                f"  {f.name:<{width}}  {_shown(f.name, self.options)}"
                for f in dataclasses.fields(self.options)
                if f.name in fields
            ]
            return Reply("\n".join(rows))
        if key not in fields:
            raise OptionError(f"unknown option {key}: /set lists them")
        if not value.strip():
            raise OptionError(f"/set {key} needs a value; it is {_shown(key, self.options)}")
        changed = dataclasses.replace(self.options, **{key: _parsed(key, value.strip())})
        changed.check()
        changed.template_config(self.tokenizer)
        self.options = changed
        return Reply(f"{key} = {_shown(key, changed)}")

    def _stats(self, _: str) -> Reply:
        if self.last is None:
            return Reply("no answer yet")
        text = f"last answer\n{remarks.details(self.last)}"
        if self.total.steps > self.last.steps:
            text += f"\nall answers\n{remarks.details(self.total)}"
        return Reply(text)

    def _save(self, name: str) -> Reply:
        if not name:
            raise OptionError("/save needs a file name")
        content = {"model": self.model, "messages": self.messages}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        try:
            write_whole(user_path(name), text)
        except OSError as error:
            raise OptionError(f"{name} cannot be written: {error.strerror}") from None
        return Reply(f"{_count(self.messages)} written to {name}")

    def _load(self, name: str) -> Reply:
        if not name:
            raise OptionError("/load needs a file name")
        file = user_path(name)
        try:
            content = json.loads(_conversation_text(file))
        except OSError as error:
            raise OptionError(f"{name} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{name} is not a saved conversation: {error}") from None
        messages = content.get("messages") if isinstance(content, dict) else None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise OptionError(f"{name} is not a saved conversation: it has no list of messages")
        self.messages = messages
        return Reply(f"{_count(messages)} read from {name}")

    def _drafter(self, argument: str) -> Reply:
        if argument not in ("", "on", "off"):
            raise OptionError(f"/drafter {argument} is not possible: use on or off")
        if argument:
            self.draft = argument == "on"
        return Reply(self.drafting())

    def drafting(self) -> str:
        """Whether this conversation drafts, and from what."""
        sources = remarks.drafts_from(self.drafter, self.options.tree())
        missing = "" if self.drafter else " (no trained drafter is loaded)"
        if not self.draft:
            more = f"; /drafter on drafts from {sources}{missing}" if sources else missing
            return f"drafting is off{more}"
        if not sources:
            return f"drafting is on, but the options leave nothing to draft from{missing}"
        return f"drafting is on: from {sources}{missing}"

    def _retry(self, _: str) -> Reply:
        if not any(message["role"] == "user" for message in self.messages):
            raise OptionError("there is no question to answer again")
        greedy = self.options.temp == 0
        return Reply(
            "greedy: the answer will be the same; /set temp 0.8" if greedy else "", "retry"
        )


def _conversation_text(file: Path) -> str:
    """What a saved conversation may say. Raises OSError and ValueError."""
    if file.exists() and not file.is_file():
        raise ValueError("it is a folder" if file.is_dir() else "it is no regular file")
    if (size := file.stat().st_size) > LONGEST:
        raise ValueError(f"it has {size / 1e6:.0f} MB")
    return file.read_text(encoding="utf-8")


def _is_message(message: object) -> bool:
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        return False
    content = message.get("content")
    return isinstance(content, str) and content == content.encode(errors="ignore").decode()


def _count(messages: Sequence[Message]) -> str:
    return f"{len(messages)} message{'' if len(messages) == 1 else 's'}"


def _shown(name: str, options: DecodeOptions) -> str:
    value = getattr(options, name)
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None and name in AUTOMATIC:
        return "default"
    return "off" if value is None or value == [] else str(value)


def _parsed(key: str, text: str) -> Any:
    """The value of an option from its text; raises OptionError."""
    hint = get_type_hints(DecodeOptions)[key]
    kinds = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    if bool in kinds and text in ("on", "off"):
        return text == "on"
    if text in ("off", "default") and type(None) in kinds:
        return None
    if bool in kinds:
        raise OptionError(f"{key} {text!r} is not possible: give on, off or default")
    if any(get_origin(kind) is list for kind in kinds):
        return [text]
    if str in kinds or any(get_origin(kind) is Literal for kind in kinds):
        return text
    number = float if float in kinds else int
    try:
        return number(text)
    except ValueError:
        word = "a number" if number is float else "a whole number"
        raise OptionError(f"{key} {text!r} is not possible: give {word}") from None
