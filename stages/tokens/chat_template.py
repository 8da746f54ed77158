"""Conversations as token ids, in DeepSeek's chat format.

    BOS [system] <｜User｜>question<｜Assistant｜><think>chain</think><answer>answer</answer>EOS

`render` and the Jinja text that travels in `tokenizer_config.json` give the same ids; ours also refuses to read a role
marker inside a message as a turn. The loss falls on what the assistant must learn to say: its content and the EOS.

A published checkpoint that brings a template of its own is rendered by that one, as transformers does it. A message
that contains one of its special tokens is refused there, and so is training through a template that drops a part of a
reply (R1's forgets the chain of thought), rewrites earlier turns or does not end a reply with the EOS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from infra.errors import InputError

if TYPE_CHECKING:
    from stages.tokens.bpe import Tokenizer

# `generation` marks what the assistant says, for libraries that take the loss mask from the template (TRL).
JINJA = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


ROLES = ("system", "user", "assistant")


def render(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """(ids, loss_mask), lists of equal length; loss_mask is 1 on every token that the assistant says.

    `generation_prompt` opens the assistant's turn at the end. Raises InputError for an unknown role, for a tokenizer
    without a template, and as the module's docstring says.
    """
    for message in messages:
        if message["role"] not in ROLES:
            raise InputError(f"a message has the role {message['role']!r}: use {', '.join(ROLES)}")
    if tokenizer.template == JINJA:
        return _deepseek(messages, tokenizer, generation_prompt)
    if tokenizer.template is None:
        raise InputError(
            "the checkpoint's tokenizer has no chat template: add chat_template to its tokenizer_config.json "
            "before it is imported"
        )
    return _published(messages, tokenizer, generation_prompt)


def _deepseek(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, generation_prompt: bool
) -> tuple[list[int], list[int]]:
    ids = list(tokenizer.opening)
    mask = [0] * len(ids)
    for message in messages:
        said, learned = tokenizer.encode(message["content"]), 0
        if message["role"] == "user":
            said = [tokenizer.user, *said]
        elif message["role"] == "assistant":
            ids.append(tokenizer.assistant)
            mask.append(0)
            said, learned = [*said, tokenizer.eos], 1
        ids += said
        mask += [learned] * len(said)
    if generation_prompt:
        ids.append(tokenizer.assistant)
        mask.append(0)
    return ids, mask


def _published(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, generation_prompt: bool
) -> tuple[list[int], list[int]]:
    """Turn by turn, the prompt of each reply encoded as at inference, so that training sees the same ids."""
    for message in messages:
        if forged := [mark for mark in tokenizer.special_ids if mark in message["content"]]:
            raise InputError(f"a message contains {forged[0]!r}, a mark of this checkpoint's chat template")
    whole = _text(messages, tokenizer, generation_prompt)
    ids: list[int] = []
    mask: list[int] = []
    done = ""
    # What earlier replies are in the prompt of a new one is the template's business: only a conversation to learn
    # from is checked and masked.
    replies = [] if generation_prompt else [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    for number in replies:
        prompt = _text(messages[:number], tokenizer, True)
        after = _text(messages[: number + 1], tokenizer, False)
        reply = after.removeprefix(prompt)
        kept = "".join(messages[number]["content"].split()) in "".join(reply.split())
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


def _text(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, generation_prompt: bool) -> str:
    """The template's output, rendered as transformers renders it."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    marks = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    try:
        (text,), _ = render_jinja_template(
            [list(messages)],
            chat_template=tokenizer.template,
            add_generation_prompt=generation_prompt,
            **{name: mark for name, mark in marks.items() if mark is not None},
        )
    except TemplateError as error:
        raise InputError(f"this checkpoint's chat template refuses the conversation: {error}") from None
    return text


def assistant_content(chain: str, answer: str) -> str:
    """What the assistant says: the chain of thought, then the answer. No newlines between: tokens are dear."""
    return f"<think>{chain}</think><answer>{answer}</answer>"
