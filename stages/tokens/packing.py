"""Which documents share a window: best-fit packing, and windows that keep documents whole.

End to end, a window begins wherever the last one stopped and cuts two documents at its edges: right for pre-training,
whose windows are shorter than many documents. A context extension has to see what depends on what over the whole
window, so here a document that fits is never cut, and short ones are packed by best fit. No token is padding: what
little a row still lacks is read on from the text behind its last document.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from infra.config import Config, Field


class LongDocuments(Config):
    """Windows of whole documents. A window is long if it begins with a long document."""

    long_share: float = Field(
        0.5, title="Long from", description="Share of a window that makes a text long.", gt=0, le=1
    )
    windows: float | None = Field(
        0.5,
        title="Long windows",
        description="Share of the windows read that are long; None: as they come.",
        gt=0,
        le=1,
    )


@dataclass(frozen=True)
class Spans:
    """Rows of equal width, each made of spans [start, start + length) of a split; the first `n_long` rows are long."""

    offsets: np.ndarray  # row r has the spans offsets[r] … offsets[r + 1] − 1
    starts: np.ndarray
    lengths: np.ndarray
    n_long: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, number: int) -> list[tuple[int, int]]:
        """(start, length) of each span of a row."""
        inside = slice(self.offsets[number], self.offsets[number + 1])
        return list(zip(self.starts[inside].tolist(), self.lengths[inside].tolist(), strict=True))


def pack(lengths: Sequence[int], capacity: int, order: Iterable[int] | None = None) -> list[list[int]]:
    """Best fit: item numbers of each row, the lengths of a row adding up to at most `capacity`.

    Each item goes where it leaves least room. Items come longest first, or in the `order` given.
    """
    if order is None:
        order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    shortest = min(lengths, default=0)
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free tokens, row), sorted, of the rows that something still fits in
    for item in order:
        length = lengths[item]
        assert length <= capacity, (length, capacity)
        place = bisect_left(space, (length, -1))
        if place == len(space):
            rows.append([])
            free, row = capacity, len(rows) - 1
        else:
            free, row = space.pop(place)
        rows[row].append(item)
        if free - length >= shortest:
            insort(space, (free - length, row))
    return rows


def whole_documents(
    lengths: np.ndarray, sequence_length: int, extra: int, long_share: float, order: np.ndarray
) -> Spans:
    """Rows of sequence_length + extra tokens over the documents that lie end to end with these `lengths`.

    A document longer than a row becomes rows of its own, `sequence_length` apart as in end-to-end windows, and a rest
    that is packed like any other text. Long texts come first, longest first; the short ones follow in `order`, a
    permutation of the documents, so that a row mixes what the corpus mixes. Memory is linear in the documents.
    """
    width = sequence_length + extra
    starts_D = np.cumsum(lengths) - lengths
    full_D = np.where(lengths > width, (lengths - extra) // sequence_length, 0)  # whole rows inside a document
    rest_D = lengths - full_D * sequence_length
    of_full = np.repeat(np.arange(len(lengths)), full_D)
    number_in_document = np.arange(len(of_full)) - np.repeat(np.cumsum(full_D) - full_D, full_D)
    full_starts = starts_D[of_full] + number_in_document * sequence_length

    kept = order[(rest_D > np.where(full_D, extra, 0))[order]]  # a rest of `extra` tokens is target already
    rests = rest_D[kept]
    long = rests >= long_share * width
    longest_first = np.flatnonzero(long)[np.argsort(-rests[long], kind="stable")]
    packed = pack(rests.tolist(), width, [*longest_first.tolist(), *np.flatnonzero(~long).tolist()])

    n_tokens = int(lengths.sum())
    spans = [[(int(start), width)] for start in full_starts]
    for items in packed:
        row = [(int(starts_D[kept[item]] + full_D[kept[item]] * sequence_length), int(rests[item])) for item in items]
        lacking = width - sum(length for _, length in row)
        if lacking:
            row.append((min(sum(row[-1]), n_tokens - lacking), lacking))
        spans.append(row)
    flat = np.array([span for row in spans for span in row], np.int64).reshape(-1, 2)
    offsets = np.cumsum([0, *(len(row) for row in spans)])
    n_long = len(full_starts) + sum(bool(long[items[0]]) for items in packed)
    return Spans(offsets, flat[:, 0], flat[:, 1], n_long)
