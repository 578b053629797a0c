"""A conversation without its terminal: messages, settings, slash commands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mlx_redrafter import console
from mlx_redrafter.errors import OptionError, RedrafterError
from mlx_redrafter.options import DecodeOptions
from mlx_redrafter.stats import DraftStats

HELP = """\
/help               this list
/clear              forget the conversation
/system TEXT        set the system prompt and start anew
/set [KEY VALUE]    change an option (temp, max_tokens, beam_width, ...), or list them
/stats              what drafting did
/save FILE          write the conversation to a JSON file
/load FILE          go on with a saved one
/drafter on|off     draft, or decode plainly; the text is the same
/retry              answer the last question again
/exit               leave (also /bye, /quit, Ctrl-D)
A message may have several lines: paste it, press Alt-Enter, or put it between \"\"\" and \"\"\".
Ctrl-C stops an answer; what was said so far is kept."""

QUOTES = '"""'
Action = Literal["stay", "exit", "retry"]
Message = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What a command says, and what the terminal does next."""

    text: str = ""
    action: Action = "stay"


def render(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages in the model's chat template, with the opening of an answer.

    Raises OptionError where the template refuses them (some know no system prompt).
    """
    import jinja2

    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    try:
        return list(tokenizer.apply_chat_template(plain, add_generation_prompt=True))
    except jinja2.TemplateError as error:
        raise OptionError(
            f"this model's chat template refuses the messages ({error}); leave out the system "
            "prompt, or use generate --raw"
        ) from None


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
        tokenizer: mlx-lm's, with a chat template.
        options: of the next answer; its system prompt opens the conversation.
        context: the most tokens that prompt and answer can have together.
        drafter: is one loaded?
        model: name that goes into a saved file.
    """

    tokenizer: Any
    options: DecodeOptions
    context: int
    drafter: bool
    model: str = ""
    draft: bool = True
    messages: list[Message] = field(default_factory=list)
    attempt: int = 0
    last: DraftStats | None = None
    total: DraftStats = field(default_factory=DraftStats)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        system = self.options.system_prompt
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str) -> list[int]:
        """Add a question; the prompt's token ids. Raises OptionError, and then forgets it again."""
        self.attempt = 0
        self.messages.append({"role": "user", "content": text})
        return self._prompt()

    def again(self) -> list[int]:
        """Drop the last answer; the prompt of its question, and another seed when sampling."""
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
        """Forget a question that got no answer."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the next answer."""
        arguments = self.options.arguments()
        return {**arguments, "seed": self.options.seed + self.attempt, "draft": self.draft}

    def warning(self, prompt_tokens: int) -> str | None:
        """What to say before an answer that the context may cut short."""
        left = self.context - prompt_tokens
        if left >= self.options.max_tokens:
            return None
        return (
            f"context nearly full: {prompt_tokens} of {self.context} tokens are used, the answer "
            f"can have {left}; /clear starts anew"
        )

    def _prompt(self) -> list[int]:
        try:
            prompt = render(self.tokenizer, self.messages)
            if len(prompt) >= self.context:
                raise OptionError(
                    f"the conversation has {len(prompt)} tokens and the model's context "
                    f"{self.context}: /clear starts anew"
                )
        except RedrafterError:
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
            return Reply(f"unknown command /{name}: /help lists them")
        try:
            return commands[name](argument.strip())
        except RedrafterError as error:
            return Reply(str(error))

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
            return Reply(f"unknown option {key}: /set lists them")
        if not value.strip():
            return Reply(f"/set {key} needs a value; it is {_shown(key, self.options)}")
        changed = dataclasses.replace(self.options, **{key: _parsed(key, value.strip())})
        changed.check()
        self.options = changed
        return Reply(f"{key} = {_shown(key, changed)}")

    def _stats(self, _: str) -> Reply:
        if self.last is None:
            return Reply("no answer yet")
        text = f"last answer\n{console.details(self.last)}"
        if self.total.steps > self.last.steps:
            text += f"\nall answers\n{console.details(self.total)}"
        return Reply(text)

    def _save(self, name: str) -> Reply:
        if not name:
            return Reply("/save needs a file name")
        content = {"model": self.model, "messages": self.messages}
        try:
            Path(name).expanduser().write_text(
                json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            return Reply(f"{name} cannot be written: {error.strerror}")
        return Reply(f"{_count(self.messages)} written to {name}")

    def _load(self, name: str) -> Reply:
        if not name:
            return Reply("/load needs a file name")
        try:
            content = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            return Reply(f"{name} cannot be read: {error.strerror}")
        except ValueError as error:
            return Reply(f"{name} is not a saved conversation: {error}")
        messages = content.get("messages") if isinstance(content, dict) else None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            return Reply(f"{name} is not a saved conversation: it has no list of messages")
        self.messages = messages
        return Reply(f"{_count(messages)} read from {name}")

    def _drafter(self, argument: str) -> Reply:
        if argument not in ("on", "off"):
            return Reply(
                f"drafting is {'on' if self.draft and self.drafter else 'off'}; /drafter on|off"
            )
        if argument == "on" and not self.drafter:
            return Reply("no drafter is loaded: start with --drafter FOLDER")
        self.draft = argument == "on"
        return Reply(f"drafting is {argument}")

    def _retry(self, _: str) -> Reply:
        if not any(message["role"] == "user" for message in self.messages):
            return Reply("there is no question to answer again")
        greedy = self.options.temp == 0
        return Reply(
            "greedy: the answer will be the same; /set temp 0.8" if greedy else "", "retry"
        )


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("system", "user", "assistant")
        and isinstance(message.get("content"), str)
    )


def _count(messages: Sequence[Message]) -> str:
    return f"{len(messages)} message{'' if len(messages) == 1 else 's'}"


def _shown(name: str, options: DecodeOptions) -> str:
    value = getattr(options, name)
    automatic = ("beam_width", "beam_length", "nodes", "candidates", "lookup", "prefill_step_size")
    if value is None and name in automatic:
        return "default"
    return "off" if value is None or value == [] else str(value)


def _parsed(key: str, text: str) -> Any:
    """The value of an option from its text; raises OptionError."""
    hint = get_type_hints(DecodeOptions)[key]
    kinds = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    if text == "off" and type(None) in kinds:
        return None
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
