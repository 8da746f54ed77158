"""Conversations as token ids, in DeepSeek's chat format.

    BOS [system] [tools] <｜User｜>question<｜Assistant｜><think>chain</think><answer>answer</answer>EOS

`render` and the Jinja text that travels in `tokenizer_config.json` give the same ids; ours also refuses to read a role
marker inside a message as a turn. The loss falls on what the assistant must learn to say: its content, its calls of
tools (`stages.tokens.tools`) and the EOS. Behind a tool's reply the assistant's marker stands again, where DeepSeek's
own template has none: so every reply begins behind a mark of its own, and no token lies half in a prompt.

A published checkpoint that brings a template of its own is rendered by that one, as transformers does it. A message
that contains one of its special tokens is refused there, and so is training through a template that drops a part of a
reply (R1's forgets the chain of thought), rewrites earlier turns or does not end a reply with the EOS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from infra.errors import InputError
from stages.tokens.tools import HOW, TOOL_MARKS, Tools, calls_text, offer_text, output_text

if TYPE_CHECKING:
    from stages.tokens.bpe import Tokenizer

# `generation` marks what the assistant says, for libraries that take the loss mask from the template (TRL).
JINJA = (
    "{{ bos_token }}"
    "{% set lead = messages and messages[0]['role'] == 'system' %}"
    "{% if lead %}{{ messages[0]['content'] }}{% endif %}"
    "{% if tools %}{% if lead %}{{ '\\n\\n' }}{% endif %}{{ '## Tools\\n' }}"
    "{% for tool in tools %}{{ (tool['function'] | tojson) + '\\n' }}{% endfor %}"
    f"{{{{ '{HOW}' }}}}"
    "{% endif %}"
    "{% for message in (messages[1:] if lead else messages) %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'tool' %}{{ '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' }}"
    "{% generation %}{{ message['content'] or '' }}"
    "{% if message['tool_calls'] %}{{ '<｜tool▁calls▁begin｜>' }}"
    "{% for call in message['tool_calls'] %}{% set said = call['function']['arguments'] %}"
    "{{ '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' }}"
    "{{ (said if said is string else said | tojson) + '<｜tool▁call▁end｜>' }}"
    "{% endfor %}{{ '<｜tool▁calls▁end｜>' }}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, generation_prompt: bool = False, tools: Tools = ()
) -> tuple[list[int], list[int]]:
    """(ids, loss_mask), lists of equal length; loss_mask is 1 on every token that the assistant says.

    `generation_prompt` opens the assistant's turn at the end; `tools` are offered to it. Raises InputError for an
    unknown role, for a tokenizer without a template, and as the module's docstring says.
    """
    for message in messages:
        if message["role"] not in ROLES:
            raise InputError(f"a message has the role {message['role']!r}: use {', '.join(ROLES)}")
    if tokenizer.template == JINJA:
        return _deepseek(messages, tokenizer, generation_prompt, tools)
    if tokenizer.template is None:
        raise InputError(
            "the checkpoint's tokenizer has no chat template: add chat_template to its tokenizer_config.json "
            "before it is imported"
        )
    return _published(messages, tokenizer, generation_prompt, tools)


def _deepseek(
    messages: Sequence[Message], tokenizer: Tokenizer, generation_prompt: bool, tools: Tools
) -> tuple[list[int], list[int]]:
    ids = list(tokenizer.opening)
    mask = [0] * len(ids)
    unlearned = ""  # text that is read as one, until a mark ends it

    def add(said: list[int], learned: int) -> None:
        nonlocal unlearned
        before, unlearned = tokenizer.encode(unlearned), ""
        ids.extend(before + said)
        mask.extend([0] * len(before) + [learned] * len(said))

    lead = bool(messages) and messages[0]["role"] == "system"
    for number, message in enumerate(messages):
        content = message["content"] or ""
        if tools and number == lead:
            unlearned += ("\n\n" if lead else "") + offer_text(tools)
        if message["role"] == "assistant":
            add([tokenizer.assistant], 0)
            add([*tokenizer.encode(content + calls_text(message.get("tool_calls") or ())), tokenizer.eos], 1)
            continue
        if forged := [mark for mark in TOOL_MARKS if mark in content]:
            raise InputError(f"a message of the {message['role']} contains {forged[0]!r}, a mark of the chat template")
        if message["role"] == "user":
            add([tokenizer.user], 0)
        unlearned += output_text(content) if message["role"] == "tool" else content
    if tools and len(messages) == lead:
        unlearned += ("\n\n" if lead else "") + offer_text(tools)
    add([tokenizer.assistant] if generation_prompt else [], 0)
    return ids, mask


def _published(
    messages: Sequence[Message], tokenizer: Tokenizer, generation_prompt: bool, tools: Tools
) -> tuple[list[int], list[int]]:
    """Turn by turn, the prompt of each reply encoded as at inference, so that training sees the same ids."""
    for message in messages:
        if forged := [mark for mark in tokenizer.special_ids if mark in (message["content"] or "")]:
            raise InputError(f"a message contains {forged[0]!r}, a mark of this checkpoint's chat template")
    whole = _text(messages, tokenizer, generation_prompt, tools)
    used = [*tools, *(call for message in messages for call in message.get("tool_calls") or ())]
    if silent := [one["function"]["name"] for one in used if one["function"]["name"] not in whole]:
        raise InputError(
            f"this checkpoint's chat template does not tell of the tool {silent[0]!r}: put one that knows tools and "
            "tool_calls into the tokenizer_config.json before it is imported, or leave tools out"
        )
    ids: list[int] = []
    mask: list[int] = []
    done = ""
    # What earlier replies are in the prompt of a new one is the template's business: only a conversation to learn
    # from is checked and masked.
    replies = [] if generation_prompt else [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    for number in replies:
        prompt = _text(messages[:number], tokenizer, True, tools)
        after = _text(messages[: number + 1], tokenizer, False, tools)
        reply = after.removeprefix(prompt)
        message, squeezed = messages[number], "".join(reply.split())
        parts = [message["content"] or "", *(call["function"]["name"] for call in message.get("tool_calls") or ())]
        kept = all("".join(part.split()) in squeezed for part in parts)
        if not (prompt.startswith(done) and after.startswith(prompt) and whole.startswith(after) and kept):
            raise InputError(
                "this checkpoint's chat template drops or rewrites what the assistant says, so that it cannot be "
                "learnt: put another chat_template into the tokenizer_config.json before it is imported"
            )
        before, said = tokenizer.encode_marked(prompt.removeprefix(done)), tokenizer.encode_marked(reply)
        if tokenizer.eos not in said:
            raise InputError(
                f"this checkpoint's chat template does not end a reply with its eos_token {tokenizer.eos_token!r}: "
                "set eos_token in its tokenizer_config.json to the token that does, before it is imported"
            )
        learnt = said.index(tokenizer.eos) + 1
        ids += before + said
        mask += [0] * len(before) + [1] * learnt + [0] * (len(said) - learnt)
        done = after
    rest = tokenizer.encode_marked(whole.removeprefix(done))
    return ids + rest, mask + [0] * len(rest)


def _text(messages: Sequence[Message], tokenizer: Tokenizer, generation_prompt: bool, tools: Tools) -> str:
    """The template's output, rendered as transformers renders it."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    marks = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    try:
        (text,), _ = render_jinja_template(
            [list(messages)],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=tokenizer.template,
            add_generation_prompt=generation_prompt,
            **{name: mark for name, mark in marks.items() if mark is not None},
        )
    except (TemplateError, TypeError) as error:  # a TypeError: it adds text to what is none
        raise InputError(f"this checkpoint's chat template refuses the conversation: {error}") from None
    return text


def assistant_content(chain: str, answer: str) -> str:
    """What the assistant says: the chain of thought, then the answer. No newlines between: tokens are dear."""
    return f"<think>{chain}</think><answer>{answer}</answer>"
