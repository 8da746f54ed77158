"""Bits per byte on fixed validation documents, by language: the measure that no tokenizer flatters.

A language's validation documents are drawn once, in a fixed order, and laid end to end as in training; the loss over
all their tokens in nats, over ln 2 and over their UTF-8 bytes (from the shards' index), is exact and comparable
between steps, vocabularies and models.

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


@dataclass(frozen=True)
class ValidationSet:
    """Windows of one language, int64 [N, T + 1]; its unmasked targets spell `n_bytes` of text."""

    language: str
    tokens_NT: Tensor
    mask_NT: Tensor  # bool [N, T]; False only on the padding of the last window
    n_bytes: int


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
    n_targets = len(stream) - 1
    n_windows = -(-n_targets // sequence_length)
    padded = np.zeros(n_windows * sequence_length + 1, np.int64)
    padded[: len(stream)] = stream
    starts = np.arange(n_windows)[:, None] * sequence_length
    tokens_NT = torch.from_numpy(padded[starts + np.arange(sequence_length + 1)])
    mask_NT = torch.arange(n_windows * sequence_length).view(n_windows, sequence_length) < n_targets
    return ValidationSet(language, tokens_NT, mask_NT, sum(document.bytes for document in documents))


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
            tokens_BT, mask_BT = chosen.tokens_NT[rows].to(ranks.device), chosen.mask_NT[rows].to(ranks.device)
            hidden_BTD = model(tokens_BT[:, :-1]).hidden_BTD
            nats[number] += cross_entropy_sum(hidden_BTD, model.head_weight, tokens_BT[:, 1:], mask_BT)
    total = ranks.all_reduce(nats).tolist()
    return {chosen.language: n / math.log(2) / chosen.n_bytes for chosen, n in zip(sets, total, strict=True)}
