"""How a question is put to a model, and how its reply is read back.

`chat`: the chat format, for models that have seen it (after the cold start).
`r1_zero`: for a base model, no turn markers. R1-Zero's prompt *describes* the reply format in a paragraph (DeepSeek-R1,
table 1); a model of a few million parameters cannot follow a description, and tokens are dear, so ours is the bare
question on its line: the format itself, `<think>…</think><answer>…</answer>`, is known from the worked problems in the
pre-training mix (`Problem.worked`).

Examples, worked problems in front of the question, are earlier turns of the chat, or texts of their own before the bare
question, as the pre-training mix has them one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from stages.problems.problem import Problem
from stages.tokens.bpe import Tokenizer
from stages.tokens.chat_template import assistant_content, render

Template = Literal["r1_zero", "chat"]


def prompt_ids(question: str, template: Template, tokenizer: Tokenizer, examples: Sequence[Problem] = ()) -> list[int]:
    """The ids that the reply continues."""
    if template == "chat":
        turns = [turn for example in examples for turn in worked_turns(example)]
        ids, _ = render([*turns, {"role": "user", "content": question}], tokenizer, generation_prompt=True)
        return ids
    shown = [[*tokenizer.opening, *tokenizer.encode(example.worked), tokenizer.eos] for example in examples]
    return [*(token for ids in shown for token in ids), *tokenizer.opening, *tokenizer.encode(question + "\n")]


def worked_turns(problem: Problem) -> list[dict[str, str]]:
    """A problem and its worked reply as a user's turn and the assistant's."""
    reply = assistant_content(problem.chain, problem.answer)
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": reply}]


def reply_text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text of a reply without its EOS. Other markers stay visible: a reply that opens a new turn is malformed."""
    return tokenizer.decode(tokens, skip_special=False).removesuffix(tokenizer.eos_token)
