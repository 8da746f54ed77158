"""Conversations as token ids, in DeepSeek's chat format.

    BOS [system] <｜User｜>question<｜Assistant｜><think>chain</think><answer>answer</answer>EOS

`render` and the Jinja text that travels in `tokenizer_config.json` give the same ids; ours also refuses to read a role
marker inside a message as a turn. The loss falls on what the assistant must learn to say: its content and the EOS.
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


def render(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """(ids, loss_mask), lists of equal length; loss_mask is 1 on every token that the assistant says.

    `generation_prompt` opens the assistant's turn at the end. Raises InputError for an unknown role.
    """
    ids, mask = [tokenizer.bos], [0]
    for message in messages:
        content = tokenizer.encode(message["content"])
        match message["role"]:
            case "system":
                said, learned = content, 0
            case "user":
                said, learned = [tokenizer.user, *content], 0
            case "assistant":
                ids.append(tokenizer.assistant)
                mask.append(0)
                said, learned = [*content, tokenizer.eos], 1
            case role:
                raise InputError(f"a message has the role {role!r}: use system, user or assistant")
        ids += said
        mask += [learned] * len(said)
    if generation_prompt:
        ids.append(tokenizer.assistant)
        mask.append(0)
    return ids, mask


def assistant_content(chain: str, answer: str) -> str:
    """What the assistant says: the chain of thought, then the answer. No newlines between: tokens are dear."""
    return f"<think>{chain}</think><answer>{answer}</answer>"
