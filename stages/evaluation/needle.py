"""Needle in a haystack: is a fact found again wherever in how long a text it stands?

A case is validation text of one language with one fact of the held-out split in it (stages.problems.lookup) and the
question behind it; `length` counts all of that and the answer, `depth` is where the fact stands, 0 at the start and 1
just before the question. Two measures, both right for a base model:

- retrieved: greedy decoding spells the whole number, digit for digit. Chance is 1e-5.
- ranked: the share of the number's digits whose log-probability beats that of all nine other digits, the right ones
  before it given. Exactly a tenth for a model that does not look back, whatever digits it prefers, because digits are
  drawn evenly. It moves long before whole numbers are retrieved, and one forward pass gives it.

Legend: B cases of one length, T tokens of a prompt, N of the answer, D width, V vocabulary, C = 10 digits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.config import Config, Field
from infra.errors import ConfigError
from infra.metrics import Report
from model.generate import Generator
from model.transformer import Transformer
from stages.evaluation.intervals import bootstrap_mean, paired_difference, wilson
from stages.problems.lookup import DIGITS, VALUE_DIGITS, draw, spell
from stages.problems.problem import Language, digest
from stages.tokens.bpe import Tokenizer
from stages.tokens.loader import permute
from stages.tokens.shards import TokenShards
from stages.training.distributed import Ranks
from stages.training.validation import text_group

LANGUAGES: tuple[Language, ...] = ("en", "zh")
CHANCE = 1 / len(DIGITS)  # of `ranked`


class NeedleGrid(Config):
    """Lengths × depths, and how often each language is asked in a cell."""

    lengths: tuple[int, ...] = Field(
        (), title="Lengths", description="Tokens, answer included. Empty: the context before, doubled up to the last."
    )
    depths: int = Field(5, title="Depths", description="Places of the needle, even from start to end.", ge=2)
    cases: int = Field(4, title="Cases", description="Haystacks of a cell and language.", ge=1)

    def resolve(self, before: int, after: int) -> tuple[int, ...]:
        """The lengths for a context that grows from `before` to `after`. ConfigError for one beyond."""
        if not self.lengths:
            doubled = (before << power for power in range((after // before).bit_length()))
            return tuple(sorted({*doubled, after}))
        if max(self.lengths) > after:
            raise ConfigError(f"needle.lengths: {max(self.lengths)} exceeds the last phase's {after}: leave it out")
        return tuple(sorted(set(self.lengths)))


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt and what must follow it."""

    language: Language
    length: int
    depth: float
    haystack: int  # number of the text; the same over lengths and depths
    prompt: np.ndarray
    answer: list[int]


class Haystacks:
    """Cases over the validation text of a tokens artifact, each made when it is asked for."""

    def __init__(
        self, directory: str, grid: NeedleGrid, lengths: Sequence[int], tokenizer: Tokenizer, seed: int
    ) -> None:
        self._shards, self.tokenizer, self._seed = TokenShards(directory, "validation"), tokenizer, seed
        groups: dict[str, list[int]] = {}
        for number in range(self._shards.n_documents):
            groups.setdefault(text_group(self._shards.document(number)), []).append(number)
        self._documents = {language: groups[language] for language in LANGUAGES if language in groups}
        depths = [place / (grid.depths - 1) for place in range(grid.depths)]
        self.cells = [
            (length, depth, language, haystack)
            for length in sorted(lengths, reverse=True)
            for language in self._documents
            for depth in depths
            for haystack in range(grid.cases)
        ]

    def case(self, number: int) -> Case:
        length, depth, language, haystack = self.cells[number]
        rng = np.random.Generator(np.random.Philox(key=digest(f"needle {self._seed} {self.cells[number]}")))
        lookup = draw(rng, language, "heldout")
        statement, question = lookup.statement(self.tokenizer), lookup.question(self.tokenizer)
        room = length - len(statement) - len(question) - VALUE_DIGITS
        if room < 1:
            raise ConfigError(
                f"needle.lengths: in {length} tokens there is no room for needle and question, which take "
                f"{length - room}: give longer ones, or needle=null"
            )
        text, place = self._text(language, haystack, room), 1 + round(depth * (room - 1))  # behind the first BOS
        prompt = np.concatenate([text[:place], statement, text[place:], question])
        return Case(language, length, depth, haystack, prompt, lookup.answer(self.tokenizer))

    def _text(self, language: str, haystack: int, n: int) -> np.ndarray:
        """n tokens of whole documents in an order of this haystack's own, from the start again where they run out."""
        numbers = self._documents[language]
        pieces, left = [], n
        while left > 0:
            for place in permute(np.arange(len(numbers)), len(numbers), key=haystack):
                reference = self._shards.document(numbers[place])
                pieces.append(self._shards.read(reference.start, reference.length))
                left -= reference.length
                if left <= 0:
                    break
        return np.concatenate(pieces)[:n].astype(np.int64)


@torch.no_grad()
def find_needles(
    model: Transformer, haystacks: Haystacks, tokens_at_once: int, ranks: Ranks, report: Report, done_before: int
) -> list[dict[str, Any]]:
    """One record a case of this rank's share, asked in batches of one length, so that no prompt is padded."""
    mine = range(ranks.rank, len(haystacks.cells), ranks.world)
    digits_C = torch.tensor(spell(DIGITS, haystacks.tokenizer), device=ranks.device)
    records: list[dict[str, Any]] = []
    while len(records) < len(mine):
        length = haystacks.cells[mine[len(records)]][0]
        rows = [n for n in mine[len(records) :][: max(1, tokens_at_once // length)] if haystacks.cells[n][0] == length]
        records += _ask(model, [haystacks.case(number) for number in rows], digits_C)
        report(done_before + ranks.world * len(records), done_before + len(haystacks.cells), "needles")
    return records


def _ask(model: Transformer, cases: Sequence[Case], digits_C: Tensor) -> list[dict[str, Any]]:
    answers_BN = torch.tensor([case.answer for case in cases], device=digits_C.device)
    prompts_BT = torch.from_numpy(np.stack([case.prompt for case in cases])).to(digits_C.device)
    n = answers_BN.shape[1]
    hidden_BTD = model(torch.cat([prompts_BT, answers_BN[:, :-1]], dim=1)).hidden_BTD
    logits_BNV = model.logits(hidden_BTD[:, -n:])
    right_BN = logits_BNV.gather(2, answers_BN[..., None]).squeeze(2)
    ranked_BN = right_BN >= logits_BNV[..., digits_C].amax(-1)
    nats_BN = logits_BNV.logsumexp(-1) - right_BN
    replies = Generator(model, max_batch=len(cases)).generate(prompts_BT.tolist(), n, temperature=0)
    return [
        {
            "language": case.language,
            "length": case.length,
            "depth": case.depth,
            "haystack": case.haystack,
            "retrieved": reply.tokens == case.answer,
            "ranked": ranked,
            "nats": nats,
        }
        for case, reply, ranked, nats in zip(
            cases, replies, ranked_BN.float().mean(1).tolist(), nats_BN.mean(1).tolist(), strict=True
        )
    ]


def needle_table(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What both checkpoints found of the same cases: all of them, each length, each language, and each cell."""
    groups: dict[tuple[Any, Any, Any], list[int]] = {}
    for number, record in enumerate(before):
        length, language, depth = record["length"], record["language"], record["depth"]
        for group in (
            ("all", "all", "all"),
            (length, "all", "all"),
            ("all", language, "all"),
            (length, language, depth),
        ):
            groups.setdefault(group, []).append(number)
    rows = []
    for (length, language, depth), members in groups.items():
        row: dict[str, Any] = {"length": length, "language": language, "depth": depth, "cases": len(members)}
        haystacks = [f"{before[n]['language']} {before[n]['haystack']}" for n in members]
        ranked = [[records[n]["ranked"] for n in members] for records in (before, after)]
        for name, records, values in zip(("before", "after"), (before, after), ranked, strict=True):
            found = [records[n]["retrieved"] for n in members]
            row[name] = {
                "retrieved": dataclasses.asdict(wilson(sum(found), len(found))),
                "ranked": dataclasses.asdict(bootstrap_mean(values, haystacks)),
                "nats_per_digit": float(np.mean([records[n]["nats"] for n in members])),
            }
        row["ranked_change"] = dataclasses.asdict(paired_difference(ranked[1], ranked[0], haystacks))
        rows.append(row)
    return rows
