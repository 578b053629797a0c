"""From the messages of a client to those that chat templates take.

Templates differ: many take one system message and only at the beginning, some want users and
assistants in turns, some know nothing of tools. What clients send is brought into the form that
most of them take.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from mlx_redrafter.server.problems import invalid
from mlx_redrafter.server.tools import HERMES, Tool, described
from mlx_redrafter.text.template import Message

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


def conversation(given: Sequence[Any]) -> list[Message]:
    """OpenAI's messages with text as contents and one system message at most, the first.

    Raises Problem, which names the message.
    """
    if not given:
        raise invalid("messages is empty: give at least one", "messages")
    return _one_system([_message(message, f"messages[{i}]") for i, message in enumerate(given)])


def _message(given: Any, at: str) -> Message:
    role = given.get("role") if isinstance(given, dict) else None
    if not isinstance(given, dict) or role not in ROLES:
        raise invalid(f"{at}.role is not possible: use one of {', '.join(ROLES)}", f"{at}.role")
    role = {"developer": "system", "function": "tool"}.get(role, role)
    message: Message = {"role": role, "content": text_of(given.get("content"), f"{at}.content")}
    if role == "assistant":
        if calls := given.get("tool_calls"):
            message["tool_calls"] = _calls(calls, f"{at}.tool_calls")
        if isinstance(thought := given.get("reasoning_content"), str):
            message["reasoning_content"] = thought
    if role == "tool":
        message["tool_call_id"] = short_id(given.get("tool_call_id"))
        if isinstance(name := given.get("name"), str):
            message["name"] = name
    return message


def text_of(content: Any, at: str) -> str:
    """The text of a content: text, nothing, or parts of text. Raises Problem."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{at} is not possible: give text, or a list of parts", at)
    return "\n".join(_part(part, f"{at}[{i}]") for i, part in enumerate(content))


def _part(part: Any, at: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXTS and isinstance(text := part.get(_TEXTS[kind]), str):
        return text
    if isinstance(kind, str) and kind not in _TEXTS:
        raise invalid(f"{at} is of type {kind[:40]!r}, and this server takes text only", at)
    raise invalid(f'{at} is not possible: give {{"type": "text", "text": ...}}', at)


def _calls(given: Any, at: str) -> list[dict[str, Any]]:
    """Calls with arguments as objects, as templates want them."""
    if not isinstance(given, list):
        raise invalid(f"{at} is not a list", at)
    return [_call(call, f"{at}[{i}]") for i, call in enumerate(given)]


def _call(given: Any, at: str) -> dict[str, Any]:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(f"{at}.function has no name", f"{at}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    arguments = {} if function.get("arguments") is None else arguments
    if not isinstance(arguments, dict):
        place = f"{at}.function.arguments"
        raise invalid(f"{place} is not the JSON of an object", place)
    called = {"name": function["name"], "arguments": arguments}
    return {"id": short_id(given.get("id")), "type": "function", "function": called}


def short_id(given: Any) -> str:
    """An id of nine letters and digits: ours, or made of another's, always the same."""
    text = str(given)
    if _SHORT_ID.fullmatch(text):
        return text
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:9]


def _one_system(messages: list[Message]) -> list[Message]:
    """System messages at the beginning become one; later ones go into the next turn of the user."""
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    head = [m["content"] for m in messages[:first] if m["content"]]
    found: list[Message] = [{"role": "system", "content": "\n\n".join(head)}] if head else []
    waiting: list[str] = []
    for message in messages[first:]:
        if message["role"] == "system":
            waiting.append(message["content"])
            continue
        if message["role"] == "user" and waiting:
            message = {**message, "content": "\n\n".join([*waiting, message["content"]])}
            waiting = []
        found.append(message)
    if waiting or first == len(messages):
        text = "\n\n".join(waiting)
        found.append({"role": "user", "content": text} if waiting else _nobody(messages))
    return found


def _nobody(messages: list[Message]) -> Message:
    if not any(message["content"] for message in messages):
        raise invalid("messages holds no text", "messages")
    return {"role": "user", "content": ""}


def without_system(messages: Sequence[Message]) -> list[Message]:
    """For templates that refuse a system message: it opens the first turn of the user."""
    system, *others = messages
    if system["role"] != "system" or not others:
        return list(messages)
    for i, message in enumerate(others):
        if message["role"] == "user":
            text = f"{system['content']}\n\n{message['content']}"
            return [*others[:i], {**message, "content": text}, *others[i + 1 :]]
    return [{"role": "user", "content": system["content"]}, *others]


def with_tools_told(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """For templates that know nothing of tools: told of in the system message, calls as the model
    is told to write them, results as turns of the user."""
    found: list[Message] = []
    system = [described(tools)] if tools else []
    for message in messages:
        if message["role"] == "system":
            system.insert(0, message["content"])
            continue
        told = _told(message)
        if found and told["role"] == found[-1]["role"] == "user":
            found[-1] = {**told, "content": f"{found[-1]['content']}\n{told['content']}"}
        else:
            found.append(told)
    head: list[Message] = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return [*head, *found]


def _told(message: Message) -> Message:
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    calls = message.get("tool_calls")
    if not calls:
        return message
    opening, closing = HERMES
    texts = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
    parts = [message["content"]] if message["content"] else []
    parts += [f"{opening}\n{text}\n{closing}" for text in texts]
    return {"role": "assistant", "content": "\n".join(parts)}


def tools_of(given: Sequence[Any]) -> list[Tool]:
    """OpenAI's tools, the functions among them; raises Problem."""
    found: list[Tool] = []
    for i, tool in enumerate(given):
        if not isinstance(tool, dict):
            raise invalid(f"tools[{i}] is not an object", f"tools[{i}]")
        if tool.get("type", "function") == "function":
            found.append(function(tool.get("function"), f"tools[{i}].function"))
    return found


def function(given: Any, at: str) -> Tool:
    """A tool of a function's description, in OpenAI's form; raises Problem."""
    if not isinstance(given, dict) or not isinstance(given.get("name"), str) or not given["name"]:
        raise invalid(f"{at} has no name", at)
    parameters = given.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise invalid(f"{at}.parameters is not an object", f"{at}.parameters")
    described = {
        "name": given["name"],
        "description": str(given.get("description") or ""),
        "parameters": parameters,
    }
    return {"type": "function", "function": described}
