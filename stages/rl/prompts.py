"""How a question is put to a model, and how its reply is read back.

`chat`: the chat format, for models that have seen it (after the cold start).
`r1_zero`: for a base model, no turn markers. R1-Zero's prompt *describes* the reply format in a paragraph (DeepSeek-R1,
table 1); a model of a few million parameters cannot follow a description, and tokens are dear, so ours is the bare
question on its line: the format itself, `<think>…</think><answer>…</answer>`, is known from the worked problems in the
pre-training mix (`Problem.worked`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from stages.tokens.bpe import Tokenizer
from stages.tokens.chat_template import render

Template = Literal["r1_zero", "chat"]


def prompt_ids(question: str, template: Template, tokenizer: Tokenizer) -> list[int]:
    """The ids that the reply continues."""
    if template == "chat":
        ids, _ = render([{"role": "user", "content": question}], tokenizer, generation_prompt=True)
        return ids
    return [*tokenizer.opening, *tokenizer.encode(question + "\n")]


def reply_text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text of a reply without its EOS. Other markers stay visible: a reply that opens a new turn is malformed."""
    return tokenizer.decode(tokens, skip_special=False).removesuffix(tokenizer.eos_token)
