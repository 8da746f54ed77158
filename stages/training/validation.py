"""Bits per byte on fixed validation documents, by language: the measure that no tokenizer flatters.

A language's validation documents are drawn once, in a fixed order, and laid end to end, but none sees another: each
is scored as if it stood alone, whatever a model saw across the borders of its training documents. The loss over all
their tokens in nats, over ln 2 and over their UTF-8 bytes (from the shards' index), is exact and comparable between
steps, vocabularies and models.

Legend: N windows, T = sequence_length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.transformer import Transformer
from stages.tokens.loader import permute
from stages.tokens.shards import DocumentRef, TokenShards
from stages.training.distributed import Ranks
from stages.training.losses import cross_entropy_sum

PADDING = 1 << 62


@dataclass(frozen=True)
class ValidationSet:
    """Windows of one language, int64 [N, T + 1]; its unmasked targets spell `n_bytes` of text."""

    language: str
    tokens_NT: Tensor
    document_NT: Tensor  # int64 [N, T + 1], documents numbered through all windows; PADDING behind the last
    n_bytes: int

    @property
    def mask_NT(self) -> Tensor:  # noqa: N802
        """bool [N, T]: the targets that count, which are neither padding nor another document's first token."""
        target_NT = self.document_NT[:, 1:]
        return (target_NT == self.document_NT[:, :-1]) & (target_NT != PADDING)


@dataclass(frozen=True)
class Validation:
    """Bits per byte every `every` steps, on about `windows` windows a language of a tokens artifact."""

    directory: str
    sequence_length: int
    windows: int
    every: int


def validation_sets(chosen: Validation) -> list[ValidationSet]:
    """About `windows` windows of whole documents for each language of the validation split, sorted by language."""
    shards = TokenShards(chosen.directory, "validation")
    by_language: dict[str, list[DocumentRef]] = {}
    for number in range(shards.n_documents):
        reference = shards.document(number)
        by_language.setdefault(text_group(reference), []).append(reference)
    budget = chosen.windows * chosen.sequence_length
    return [
        _lay_out(shards, language, _choose(by_language[language], budget), chosen.sequence_length)
        for language in sorted(by_language)
    ]


def text_group(reference: DocumentRef) -> str:
    """The language, with worked problems apart: their templates would flatter a mean over prose."""
    return f"{reference.language}_math" if reference.domain == "math" else reference.language


def _choose(documents: list[DocumentRef], budget: int) -> list[DocumentRef]:
    """Documents in a fixed shuffled order whose lengths fit the budget in tokens; the shortest one if none fits."""
    chosen, left = [], budget
    for number in permute(np.arange(len(documents)), len(documents), key=0):
        if documents[number].length <= left:
            chosen.append(documents[number])
            left -= documents[number].length
    return chosen or [min(documents, key=lambda document: document.length)]


def _lay_out(shards: TokenShards, language: str, documents: list[DocumentRef], sequence_length: int) -> ValidationSet:
    stream = np.concatenate([shards.read(document.start, document.length) for document in documents]).astype(np.int64)
    numbers = np.repeat(np.arange(len(documents)), [document.length for document in documents])
    n_windows = -(-(len(stream) - 1) // sequence_length)
    place_NT = np.arange(n_windows)[:, None] * sequence_length + np.arange(sequence_length + 1)

    def windows(values: np.ndarray, behind: int) -> Tensor:
        padded = np.full(n_windows * sequence_length + 1, behind, np.int64)
        padded[: len(values)] = values
        return torch.from_numpy(padded[place_NT])

    n_bytes = sum(document.bytes for document in documents)
    return ValidationSet(language, windows(stream, 0), windows(numbers, PADDING), n_bytes)


@torch.no_grad()
def bits_per_byte(
    model: Transformer, sets: Sequence[ValidationSet], ranks: Ranks, rows_at_once: int
) -> dict[str, float]:
    """{language: bits per byte}. Ranks share the windows; all of them get the same answer."""
    nats = torch.zeros(len(sets), dtype=torch.float64, device=ranks.device)
    for number, chosen in enumerate(sets):
        mine = range(ranks.rank, len(chosen.tokens_NT), ranks.world)  # empty where there are fewer windows than ranks
        for start in range(0, len(mine), rows_at_once):
            rows = list(mine[start : start + rows_at_once])
            tokens_BT, document_BT, mask_BT = (
                part[rows].to(ranks.device) for part in (chosen.tokens_NT, chosen.document_NT, chosen.mask_NT)
            )
            hidden_BTD = model(tokens_BT[:, :-1], document_BT=document_BT[:, :-1]).hidden_BTD
            nats[number] += cross_entropy_sum(hidden_BTD, model.head_weight, tokens_BT[:, 1:], mask_BT)
    total = ranks.all_reduce(nats).tolist()
    return {chosen.language: n / math.log(2) / chosen.n_bytes for chosen, n in zip(sets, total, strict=True)}
