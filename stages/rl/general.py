"""General prompts as open problems: what reinforcement learning over all scenarios asks beside problems with right
answers (DeepSeek-R1, section 2.3.4)."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

from infra.artifact import Artifact
from stages.corpus.languages import identify
from stages.problems.problem import OPEN, Language, Problem, digest
from stages.rl.preferences import read_preferences
from stages.training.supervised import read_conversations

FAMILY = "general"


def open_problems(
    prompts: Artifact, languages: Sequence[Language], fits: Callable[[str], bool]
) -> tuple[tuple[Problem, ...], int]:
    """(the distinct first turns of a conversations or preferences artifact as problems, how many others it has).

    The others are in another language, do not fit, or stand behind a system prompt or an offer of tools, which a
    question by itself would lack.
    """
    if prompts.kind == "preferences":
        firsts = [preference.messages[0] for preference in read_preferences(prompts.path)]
    else:
        firsts = [{} if tools else messages[0] for messages, tools in read_conversations(prompts.path)]
    turns = dict.fromkeys(first["content"] if first.get("role") == "user" else "" for first in firsts)
    problems: dict[str, Problem] = {}
    for turn in turns:
        language = identify(turn)
        if language in languages and fits(turn):
            problem = _problem(turn, language)
            problems.setdefault(problem.id, problem)  # of several spellings the first
    return tuple(problems.values()), len(turns) - len(problems)


def _problem(question: str, language: Language) -> Problem:
    content = "".join(unicodedata.normalize("NFKC", question).casefold().split())
    id = f"{FAMILY}-{language}-{digest(content):016x}"
    return Problem(id, FAMILY, language, 1, question, "", "", OPEN, {}, content)
