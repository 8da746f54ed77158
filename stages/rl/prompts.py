"""How a question is put to a model, and how its reply is read back.

`chat`: the chat format, for models that have seen it (after the cold start, or published chat models). A system prompt
may say what form a reply has.
`r1_zero_described`: R1-Zero's prompt (DeepSeek-R1, table 1), which describes the form of a reply to a base model that
can follow a description, such as a published one; for a Chinese question in Chinese.
`r1_zero`: no turn markers and no description. A model of a few million parameters cannot follow one, and tokens are
dear, so this is the bare question on its line: the form itself, `<think>…</think><answer>…</answer>`, is known from the
worked problems in the pre-training mix (`Problem.worked`).

Under all of them a reply ends at the EOS alone, and not at `</answer>`: a base that goes on behind it loses the format
reward, and with a second answer the accuracy, so it learns to end; one that is cut there never would.

Examples, worked problems in front of the question, are earlier turns of the chat, or texts of their own before that of
the question, as the pre-training mix has them one after the other.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

from infra.errors import InputError
from stages.corpus.languages import identify
from stages.problems.problem import Language, Problem
from stages.tokens.bpe import Tokenizer
from stages.tokens.chat_template import assistant_content, render

Template = Literal["r1_zero", "r1_zero_described", "chat"]

# By language, DeepSeek-R1's table 1: each speaker on a line of its own, and the reply begins behind the last.
DESCRIBED = {
    "en": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
        "\nUser: {question}\nAssistant:"
    ),
    "zh": (
        "用户与助手之间的一段对话。用户提出问题，由助手解答。助手先在头脑中思考推理过程，然后向用户给出答案。"
        "推理过程和答案分别放在<think> </think>和<answer> </answer>标签之内，即"
        "<think> 此处为推理过程 </think> <answer> 此处为答案 </answer>。\n用户：{question}\n助手："
    ),
}


def prompt_ids(
    question: str,
    template: Template,
    tokenizer: Tokenizer,
    examples: Sequence[Problem] = (),
    system_prompt: str | None = None,
    language: Language | None = None,
) -> list[int]:
    """The ids that the reply continues. `language` is the question's, by its script if None. InputError where the
    checkpoint's chat template drops the system prompt."""
    if template == "chat":
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        turns = [turn for example in examples for turn in worked_turns(example)]
        ids, _ = render([*system, *turns, {"role": "user", "content": question}], tokenizer, generation_prompt=True)
        if system_prompt and _folded(system_prompt) not in _folded(tokenizer.decode(ids)):
            raise InputError("this checkpoint's chat template drops the system turn: leave system_prompt out")
        return ids
    ids: list[int] = []
    for example in examples:
        said = assistant_content(example.chain, example.answer)
        text = as_text(example.question, template, said, example.language)
        ids += [*tokenizer.opening, *tokenizer.encode(text), tokenizer.eos]
    return [*ids, *tokenizer.opening, *tokenizer.encode(as_text(question, template, language=language))]


def as_text(question: str, template: Template, reply: str = "", language: Language | None = None) -> str:
    """A question to a base model, and the reply to it. `language` is the question's, by its script if None."""
    if template == "r1_zero":
        return f"{question}\n{reply}"
    asked = DESCRIBED["zh" if (language or identify(question)) == "zh" else "en"].replace("{question}", question)
    return f"{asked} {reply}" if reply else asked


def _folded(text: str) -> str:
    """Text as a tokenizer's normaliser may leave it: without differences of spaces and of Unicode's spellings."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def check_system_prompt(template: Template, system_prompt: str | None) -> None:
    """Raise ValueError for a system prompt where there is no system turn."""
    if system_prompt and template != "chat":
        raise ValueError(f"template={template} has no system turn: set template to chat, or leave system_prompt out")


def worked_turns(problem: Problem) -> list[dict[str, str]]:
    """A problem and its worked reply as a user's turn and the assistant's."""
    reply = assistant_content(problem.chain, problem.answer)
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": reply}]


def reply_text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text of a reply without its EOS. Other markers stay visible: a reply that opens a new turn is malformed."""
    return tokenizer.decode(tokens, skip_special=False).removesuffix(tokenizer.eos_token)
