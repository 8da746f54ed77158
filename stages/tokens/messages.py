"""What a conversation must be to be learnt from: the form that every stage which reads conversations asks for."""

from __future__ import annotations

import json
from typing import Any

from infra.errors import InputError
from stages.tokens.chat_template import ROLES
from stages.tokens.tools import read_tool_calls, read_tools

SHAREGPT = {"human": "user", "gpt": "assistant"}


def conversation_text(value: Any, field: str, where: str, tools: Any = None) -> str:
    """(messages, tools) as JSON text; InputError if they are no conversation that can be learnt from."""
    wrong = f"{where}: the field {field!r}"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise InputError(f"{wrong} is text and no JSON; it must be a list of messages") from None
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise InputError(f"{wrong} is no list of messages, each an object with role and content")
    messages = [_message(message, f"{wrong}, message {number}") for number, message in enumerate(value, start=1)]
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise InputError(f"{wrong} has a system message behind another; it may only be the first")
    if "assistant" not in roles:
        raise InputError(f"{wrong} has no message of the assistant: there is nothing to learn in it; leave it out")
    offered = read_tools(tools, where)
    _check_calls(messages, {tool["function"]["name"] for tool in offered}, wrong)
    return json.dumps([messages, offered], ensure_ascii=False)


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role, content = (message.get("role", message.get("from")), message.get("content", message.get("value")))
    role = SHAREGPT.get(role, role)
    if role not in ROLES:
        raise InputError(f"{where} has the role {role!r}; it must be one of {', '.join(ROLES)}")
    read = {"role": role, "content": content}
    if role == "assistant" and (calls := read_tool_calls(message.get("tool_calls"), where)):
        read |= {"content": content or "", "tool_calls": calls}
    elif role != "tool" and not (isinstance(content, str) and content.strip()):
        raise InputError(f"{where}, of the {role}, says nothing: its content must be text")
    if not isinstance(read["content"], str):
        raise InputError(f"{where}, of the {role}: its content must be text")
    if role == "tool":
        read |= {name: message[name] for name in ("tool_call_id", "name") if message.get(name) is not None}
    return read


def _check_calls(messages: list[dict[str, Any]], offered: set[str], where: str) -> None:
    """Calls are of tools that are offered, if any are; replies of tools stand behind calls, and are not more."""
    waiting = 0
    for number, message in enumerate(messages, start=1):
        if message["role"] == "tool":
            if not waiting:
                raise InputError(f"{where}, message {number}, is of a tool, and no call in front of it waits for one")
            waiting -= 1
            continue
        calls = message.get("tool_calls", [])
        waiting = len(calls)
        if unknown := [
            call["function"]["name"] for call in calls if offered and call["function"]["name"] not in offered
        ]:
            raise InputError(f"{where}, message {number}, calls {unknown[0]!r}, which is not among the tools offered")
