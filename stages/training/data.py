"""What a training step reads: micro-batches that are a function of their number.

`batch(index)` gives this rank's rows of global micro-batch `index`. There is no position to save: a resumed run asks
for the next number, and the rows of all ranks together are the same whatever the world size.

Legend: B rows of this rank, T = sequence_length, N packed rows in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from infra.errors import ConfigError
from stages.problems.lookup import least_window, plant
from stages.tokens.bpe import Tokenizer, load_tokenizer
from stages.tokens.loader import PackedLoader, permute
from stages.tokens.packing import LongDocuments, pack

Example = tuple[Sequence[int], Sequence[int]]  # ids and loss mask of a conversation


class Batch(NamedTuple):
    """Rows of T + 1 tokens: 0..T-1 are inputs, 1..T their targets. All int64 [B, T + 1]; None where unused."""

    tokens_BT: Tensor
    loss_mask_BT: Tensor | None = None  # 1 on tokens to be learnt
    document_BT: Tensor | None = None  # attention and targets stay inside one document
    positions_BT: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return Batch(*(None if x is None else x.pin_memory().to(device, non_blocking=True) for x in self))


class Batches(Protocol):
    def batch(self, index: int) -> Batch: ...


class Data(Protocol):
    """A picklable description of training data, opened inside each worker."""

    sequence_length: int

    def open(self, micro_batch: int, seed: int, rank: int, world: int) -> Batches: ...


@dataclass(frozen=True)
class TokenWindows:
    """Shuffled windows of a tokens artifact's train split.

    Documents are packed end to end, or whole with `documents`; as in V3's pre-training (section 4.2), attention crosses
    their borders unless `mask_documents` is set. A share `lookups` of the windows has facts planted in it that it asks
    for later (stages.problems.lookup); such a window counts as one document.
    """

    directory: str
    sequence_length: int
    mask_documents: bool = False
    documents: LongDocuments | None = None
    lookups: float = 0.0

    def open(self, micro_batch: int, seed: int, rank: int, world: int) -> _Windows:
        tokenizer = load_tokenizer(self.directory) if self.lookups else None
        if tokenizer and self.sequence_length < (least := least_window(tokenizer)):
            raise ConfigError(
                f"a window of {self.sequence_length} tokens has no room for a lookup: set lookups=0, or lengthen "
                f"sequence_length to {least}"
            )
        where = (self.directory, "train", self.sequence_length, micro_batch, seed, rank, world)
        loader = PackedLoader(*where, extra=1, documents=self.documents)
        return _Windows(loader, self.mask_documents, self.lookups, tokenizer, seed)


@dataclass(frozen=True)
class _Windows:
    loader: PackedLoader
    mask_documents: bool
    lookups: float
    tokenizer: Tokenizer | None
    seed: int

    def batch(self, index: int) -> Batch:
        item = self.loader.batch(index)
        tokens_BT, document_BT = item["tokens_BT"], item["document_BT"]
        for row, sample in enumerate(self.loader.samples(index) if self.tokenizer else ()):
            rng = np.random.Generator(np.random.Philox(key=(self.seed << 64) | int(sample)))
            if rng.random() < self.lookups:
                tokens_BT[row] = torch.from_numpy(plant(tokens_BT[row].numpy(), self.tokenizer, rng))
                document_BT[row] = 0
        return Batch(tokens_BT, document_BT=document_BT if self.mask_documents else None)


@dataclass(frozen=True)
class PackedRows:
    """Rendered conversations packed into rows; `path` is the file that `write_packed` left."""

    path: str
    sequence_length: int

    def open(self, micro_batch: int, seed: int, rank: int, world: int) -> _Rows:
        if micro_batch % world:
            raise ConfigError(f"{micro_batch} rows do not divide over {world} ranks: choose a multiple")
        arrays = {name: array.astype(np.int64) for name, array in np.load(self.path).items()}
        share = micro_batch // world
        return _Rows(arrays, micro_batch, np.arange(rank * share, (rank + 1) * share), seed)


@dataclass(frozen=True)
class _Rows:
    arrays: dict[str, np.ndarray]
    micro_batch: int
    mine_B: np.ndarray
    seed: int

    def batch(self, index: int) -> Batch:
        """Epoch after epoch over all rows, each in its own order; a micro-batch may reach into the next epoch."""
        n_rows = len(self.arrays["tokens"])
        epochs, numbers = np.divmod(index * self.micro_batch + self.mine_B, n_rows)
        rows_B = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows_B[here] = permute(numbers[here], n_rows, key=(self.seed << 64) | int(epoch))
        tokens, mask, document, position = (
            torch.from_numpy(self.arrays[name][rows_B]) for name in ("tokens", "loss_mask", "document", "position")
        )
        return Batch(tokens, mask, document, position)


def write_packed(path: Path, examples: Sequence[Example], sequence_length: int, pad: int) -> int:
    """Pack (ids, loss_mask) pairs into rows of sequence_length + 1 tokens and write them; the number of rows."""
    rows = pack_rows(examples, sequence_length + 1, pad)
    with path.open("wb") as file:
        np.savez(file, **rows)
    return len(rows["tokens"])


def pack_rows(examples: Sequence[Example], width: int, pad: int) -> dict[str, np.ndarray]:
    """(ids, loss_mask) pairs as rows of `width` tokens: tokens, loss_mask, document, position, each [rows, width].

    Every conversation keeps its own document number and positions from 0, so a packed row computes what its
    conversations compute alone. The padding at a row's end is a document of its own, learnt from by nobody.
    """
    rows = pack([len(ids) for ids, _ in examples], width)
    tokens = np.full((len(rows), width), pad, np.int32)
    loss_mask = np.zeros((len(rows), width), np.int8)
    document = np.zeros((len(rows), width), np.int32)
    position = np.zeros((len(rows), width), np.int32)
    for row, items in enumerate(rows):
        start = 0
        for number, item in enumerate(items):
            ids, mask = examples[item]
            span = slice(start, start + len(ids))
            tokens[row, span], loss_mask[row, span] = ids, mask
            document[row, span], position[row, span] = number, np.arange(len(ids))
            start = span.stop
        document[row, start:], position[row, start:] = len(items), np.arange(width - start)
    return {"tokens": tokens, "loss_mask": loss_mask, "document": document, "position": position}
