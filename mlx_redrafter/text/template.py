"""The model's chat template: from messages to token ids, how it fails, its switch for thinking."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_redrafter.errors import OptionError, one_line

Message = dict[str, Any]
Variables = Mapping[str, Any]

SWITCHES = ("enable_thinking", "thinking")  # as templates call the variable
_MARKERS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
_TOOLS = "tool_use"  # the name of a template that is made for requests with tools
_TAIL = 16  # tokens in which the opening of a thought fits
_RAW = "do without it (generate --raw)"


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    chat_template_config: Variables | None = None,
) -> list[int]:
    """Token ids of the messages in the model's chat template, with the opening of an answer.

    Args:
        tokenizer: as `load` returns it.
        messages: dicts with "role" and "content".
        chat_template_config: variables for the template, such as ``{"enable_thinking": False}``;
            ``{"chat_template": NAME}`` chooses one of several.

    Raises:
        OptionError: no template, several without a default, or one that fails for any reason.
    """
    ids = _written(tokenizer, messages, chat_template_config, tokenize=True)
    if not ids:
        raise OptionError(f"this model's chat template writes an empty prompt: mend it, or {_RAW}")
    return [int(token) for token in ids]


def render_text(
    tokenizer: Any, messages: Sequence[Message], chat_template_config: Variables | None = None
) -> str:
    """As `render`, before it becomes token ids."""
    return str(_written(tokenizer, messages, chat_template_config, tokenize=False))


def prompt_ids(
    tokenizer: Any, messages: Sequence[Message], chat_template_config: Variables | None = None
) -> list[int]:
    """As `render`; for a base model the text of the messages itself, without a system prompt."""
    if has_template(tokenizer):
        return render(tokenizer, messages, chat_template_config)
    text = ""
    for message in messages:
        if message["role"] != "system":
            text += "\n" * (message["role"] == "user" and bool(text)) + message["content"]
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(text, add_special_tokens=not begun))


def has_template(tokenizer: Any) -> bool:
    """Can the model chat? A base model has no template, or an empty one."""
    empty = getattr(tokenizer, "chat_template", None) in ("", {})
    return bool(tokenizer.has_chat_template) and not empty


def thinking_switch(
    tokenizer: Any, on: bool, chat_template_config: Variables | None = None
) -> dict[str, bool]:
    """The variable that makes the template turn thinking on or off, with its value.

    It is the first of `SWITCHES` that changes what the template writes. Raises OptionError where
    none does, and the errors of `render`.
    """
    messages = [{"role": "user", "content": "Hi"}]
    given = dict(chat_template_config or {})
    render_text(tokenizer, messages, given)
    for name in SWITCHES:
        try:
            texts = {
                render_text(tokenizer, messages, {**given, name: value}) for value in (True, False)
            }
        except OptionError:  # a template in Python that takes no such argument
            continue
        if len(texts) == 2:
            return {name: on}
    raise OptionError(
        f"this model's chat template has no switch for thinking ({' or '.join(SWITCHES)}): leave "
        "the option out, or set a variable of the template with --chat-template-config"
    )


def parse_config(text: str | None) -> dict[str, Any]:
    """A JSON object as a dict, empty for None; raises OptionError."""
    try:
        config = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise OptionError(
            f"--chat-template-config {text} is not a JSON object: give for example "
            "'{\"enable_thinking\": false}'"
        )
    return config


def markers(tokenizer: Any) -> tuple[str, str] | None:
    """The texts around a thought; None where the model is not known to think aloud."""
    if tokenizer.think_start and tokenizer.think_end:
        return tokenizer.think_start, tokenizer.think_end
    source = str(getattr(tokenizer, "chat_template", None) or "")
    return next((pair for pair in _MARKERS if all(mark in source for mark in pair)), None)


def opens_thought(tokenizer: Any, prompt: str | Sequence[int]) -> bool:
    """Does the prompt end with the opening of a thought, so that the answer begins inside it?"""
    found = markers(tokenizer)
    if found is None:
        return False
    end = prompt if isinstance(prompt, str) else tokenizer.decode(list(prompt[-_TAIL:]))
    return str(end).rstrip().endswith(found[0])


def thought_ahead(tokenizer: Any, prompt: str | Sequence[int]) -> tuple[str, str] | None:
    """The texts around the thought that an answer may begin with, or begins within; None where the
    prompt has one that is closed, as templates write it that are asked not to think."""
    found = markers(tokenizer)
    end = prompt if isinstance(prompt, str) else tokenizer.decode(list(prompt[-_TAIL:]))
    return None if found is not None and str(end).rstrip().endswith(found[1]) else found


def thinks(tokenizer: Any, chat_template_config: Variables | None = None) -> bool:
    """Is a thought to be expected before an answer? Not of a template that fails."""
    found = markers(tokenizer)
    if found is None or not has_template(tokenizer):
        return False
    try:
        prompt = render(tokenizer, [{"role": "user", "content": "Hi"}], chat_template_config)
    except OptionError:
        return False
    return not str(tokenizer.decode(prompt[-_TAIL:])).rstrip().endswith(found[1])


def _written(
    tokenizer: Any, messages: Sequence[Message], config: Variables | None, *, tokenize: bool
) -> Any:
    if not messages or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise OptionError('messages are dicts with "role" and "content", at least one')
    given = dict(config or {})
    plain = [{k: v for k, v in m.items() if k != "stopped"} for m in messages]
    options = {**_chosen(tokenizer, given), "add_generation_prompt": True, **given}
    options["tokenize"] = tokenize
    try:
        written = _apply(tokenizer, plain, options)
        if isinstance(written, str):
            written.encode()  # half a surrogate pair is no text
        return written
    except Exception as error:  # a template is a program of somebody else
        raise OptionError(_failure(tokenizer, plain, options, error)) from error


def _apply(tokenizer: Any, messages: list[Message], options: dict[str, Any]) -> Any:
    """The template with contents as text, or as lists of parts where it leaves out texts."""
    try:
        shown, failed = _shows(tokenizer, messages, messages[-1], options), None
    except Exception as error:
        shown, failed = False, error
    if not shown:
        parts = [_in_parts(message) for message in messages]
        with contextlib.suppress(Exception):
            if _shows(tokenizer, parts, messages[-1], options):
                return tokenizer.apply_chat_template(parts, **options)
    if failed is not None:
        raise failed
    return tokenizer.apply_chat_template(messages, **options)


def _shows(tokenizer: Any, form: list[Message], last: Message, options: dict[str, Any]) -> bool:
    """Does the prompt hold the last message? Told from the text, as tokens may join."""
    text = tokenizer.apply_chat_template(form, **{**options, "tokenize": False})
    content = last.get("content")
    return not isinstance(content, str) or content.strip() in text


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _chosen(tokenizer: Any, given: Variables) -> dict[str, str]:
    """Which of several named templates, as an argument; raises OptionError."""
    if not has_template(tokenizer):
        raise OptionError("this model has no chat template: continue a text with generate --raw")
    templates = getattr(tokenizer, "chat_template", None)
    if not isinstance(templates, dict) or str(given.get("chat_template")) in templates:
        return {}
    if "default" in templates or (given.get("tools") and _TOOLS in templates):
        return {}
    if len(templates) == 1 and _TOOLS not in templates:
        return {"chat_template": next(iter(templates))}
    first = next(iter(sorted(templates)))
    raise OptionError(
        f"this model has named chat templates ({', '.join(sorted(templates))}) and none is the "
        f'default: choose one with --chat-template-config \'{{"chat_template": "{first}"}}\''
    )


def _failure(
    tokenizer: Any, messages: list[Message], options: dict[str, Any], error: Exception
) -> str:
    """What to say of a template that failed; advice about the system prompt only where it helps."""
    import jinja2

    what = one_line(error)
    if not isinstance(error, jinja2.TemplateError) and what != type(error).__name__:
        what = f"{type(error).__name__}: {what}"
    # `raise_exception` of a template is the base class itself; its mistakes are subclasses.
    refused = type(error) is jinja2.TemplateError
    others = [message for message in messages if message.get("role") != "system"]
    advice = _RAW if refused else f"mend it, or {_RAW}"
    if len(others) < len(messages) and others and _works(tokenizer, others, options):
        advice = f"leave out the system prompt, or {_RAW}"
    verb = "refuses the messages" if refused else "fails"
    return f"this model's chat template {verb} ({what}): {advice}"


def _works(tokenizer: Any, messages: list[Message], options: dict[str, Any]) -> bool:
    try:
        return bool(_apply(tokenizer, messages, options))
    except Exception:
        return False
