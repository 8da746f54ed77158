"""Tools in conversations, in the messages convention of transformers and in DeepSeek's marks.

A tool is {"type": "function", "function": {name, description, parameters}} with a JSON schema of its parameters. An
assistant's message may have `tool_calls`, each {"type": "function", "function": {name, arguments}}; messages of the
role `tool` answer them in their order. As text, in the form of DeepSeek-V3.1 (V3's without its code fence, for tokens
are dear):

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>name<｜tool▁sep｜>{"argument": …}<｜tool▁call▁end｜>…<｜tool▁calls▁end｜>
    <｜tool▁output▁begin｜>what the tool said<｜tool▁output▁end｜>

The marks are text: a tokenizer that was trained with them has an id for each, any other spells them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from infra.errors import InputError

CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
OUTPUT, END_OUTPUT = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
TOOL_MARKS = (CALLS, END_CALLS, CALL, END_CALL, OUTPUT, END_OUTPUT, SEPARATOR)

Tools = Sequence[Mapping[str, Any]]
ToolCalls = Sequence[Mapping[str, Any]]

HOW = f"To call: {CALLS}{CALL}name{SEPARATOR}arguments as JSON{END_CALL}{END_CALLS}"


def offer_text(tools: Tools) -> str:
    """How tools are offered: a line of JSON each, and how to call them."""
    offered = "".join(json.dumps(tool["function"], ensure_ascii=False) + "\n" for tool in tools)
    return f"## Tools\n{offered}{HOW}"


def calls_text(calls: ToolCalls) -> str:
    """What the assistant says to make these calls; "" for none."""
    if not calls:
        return ""
    said = []
    for call in calls:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        said.append(f"{CALL}{call['function']['name']}{SEPARATOR}{text}{END_CALL}")
    return CALLS + "".join(said) + END_CALLS


def output_text(content: str) -> str:
    """How the answer of one call is told."""
    return OUTPUT + content + END_OUTPUT


def read_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """(what is said before the calls, the calls), the inverse of `calls_text`.

    Calls that are not exactly of the form, or whose arguments are no JSON object, are no calls but text.
    """
    before, found, rest = text.partition(CALLS)
    rest = rest.rstrip()
    body = rest.removesuffix(END_CALLS)
    if not found or body == rest:
        return text, []
    calls = []
    while body:
        name, separated, tail = body.removeprefix(CALL).partition(SEPARATOR)
        arguments, ended, tail = tail.partition(END_CALL)
        try:
            given = json.loads(arguments)
        except (ValueError, RecursionError):
            return text, []
        whole = body.startswith(CALL) and separated and ended and not any(mark in name for mark in TOOL_MARKS)
        if not (whole and isinstance(given, dict)):
            return text, []
        calls.append({"type": "function", "function": {"name": name.strip(), "arguments": given}})
        body = tail
    return (before, calls) if calls else (text, [])


def read_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Tools as records have them, a list or its JSON text; None is none. InputError says what is wrong."""
    tools = _json(value, f"{where}: the tools are")
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{where}: the tools are no list of objects")
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function")
        if not (isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"].strip()):
            raise InputError(
                f'{where}: tool {number} has no function with a name; write {{"type": "function", "function": '
                '{"name", "description", "parameters"}}'
            )
    return tools


def read_tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a message, their arguments as objects whether they were written so or as JSON text."""
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise InputError(f"{where}: tool_calls is no list of objects")
    calls = []
    for number, call in enumerate(value, start=1):
        function = call.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{where}: call {number} has no function with a name and arguments")
        arguments = _json(function.get("arguments"), f"{where}: the arguments of call {number} are")
        if arguments is not None and not isinstance(arguments, dict):
            raise InputError(f"{where}: the arguments of call {number} are no object; give them by name")
        kept = {"id": call["id"]} if call.get("id") is not None else {}
        calls.append(kept | {"type": "function", "function": {"name": name, "arguments": arguments or {}}})
    return calls


def _json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InputError(f"{what} text and no JSON") from None
