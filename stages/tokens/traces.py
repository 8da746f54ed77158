"""Reasoning traces of published data sets in the form of our replies, `<think>chain</think><answer>answer</answer>`.

Open-R1's sets have R1's own form, a chain between think tags and the solution behind it; Bespoke-Stratos has marks for
both. What reinforcement learning then judges stands inside `<answer>` alone: the content of the solution's last box,
and the solution goes to the chain's end; without a box, the whole solution is the answer.
"""

from __future__ import annotations

import re

from stages.problems.boxed import cut
from stages.tokens.chat_template import assistant_content

FORMS = (
    re.compile(r"\s*<think>(?P<chain>.*?)</think>(?P<solution>.*)", re.DOTALL),
    re.compile(
        r"\s*<\|begin_of_thought\|>(?P<chain>.*?)<\|end_of_thought\|>\s*"
        r"<\|begin_of_solution\|>(?P<solution>.*?)<\|end_of_solution\|>\s*",
        re.DOTALL,
    ),
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def think_answer(reply: str) -> str | None:
    """The reply in our form; None if it has no chain and one solution behind it, or tags where there may be none."""
    for form in FORMS:
        match = form.fullmatch(reply)
        if match is None:
            continue
        chain, solution = match["chain"].strip(), match["solution"].strip()
        solution = re.sub(r"^<answer>\s*|\s*</answer>$", "", solution)
        answer = cut(solution).strip()
        if answer != solution:
            chain = f"{chain}\n{solution}"
        if chain and answer and not any(tag in part for part in (chain, answer) for tag in TAGS):
            return assistant_content(chain, answer)
    return None
