"""Batches for a trainer: windows of packed tokens in a shuffled order that is a function, not a list.

The split is cut into windows of `sequence_length` tokens (each also sees the next `extra` tokens, for the targets).
Epoch e visits window `permute(i)`, a keyed Feistel permutation: any step's batch is computed alone, in constant
memory, at any corpus size. The whole state is therefore one integer, and a resumed run repeats no sample.
With `LongDocuments` the windows are whole documents, planned once from the index (packing.py), and two such orders run
side by side: one over the long windows, one over the others.

Legend: B = batch (of this rank), T = sequence_length (+ extra).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from infra.errors import ConfigError
from stages.tokens.packing import LongDocuments, Spans, whole_documents
from stages.tokens.shards import TokenShards

FEISTEL_ROUNDS = 6
LONG_ORDER = 1 << 63  # keeps the keys of the long windows' epochs apart from the others'


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """A permutation of range(n) chosen by `key`, at the points `index`: balanced Feistel network, cycle-walked."""
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    round_keys = np.random.Generator(np.random.Philox(key=key)).integers(0, 2**64, FEISTEL_ROUNDS, np.uint64)
    result = index.astype(np.uint64)
    walking = np.ones(len(result), bool)
    while walking.any():
        left, right = result[walking] >> np.uint64(half), result[walking] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        result[walking] = (left << np.uint64(half)) | right
        walking = result >= n  # outside the range: apply again until it falls inside
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class PackedLoader:
    """Endless batches of packed windows; epoch after epoch, each in its own order.

    `batch_size` is the global batch: with `world` ranks each takes its `batch_size // world` rows, and stacking the
    ranks' rows gives the same batch whatever `world` is. An item is a dict:
      tokens_BT    int64 [B, T + extra]
      document_BT  int64 [B, T + extra], documents numbered from 0 inside each row (for attention masks)
      position_B   int64 [B], where each row starts in the split: `TokenShards.document_at` names what it reads
    Raises ConfigError when a batch does not divide over the ranks or the split is shorter than one window.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        extra: int = 1,
        shuffle: bool = True,
        documents: LongDocuments | None = None,
    ) -> None:
        if batch_size % world:
            raise ConfigError(f"batch_size={batch_size} does not divide over {world} ranks: choose a multiple")
        self.shards = TokenShards(directory, split)
        self.sequence_length, self.batch_size, self.extra = sequence_length, batch_size, extra
        if self.shards.n_tokens < sequence_length + extra:
            raise ConfigError(
                f"the {split} split has {self.shards.n_tokens} tokens, fewer than one window of sequence_length="
                f"{sequence_length} + {extra}: shorten sequence_length or tokenize more text"
            )
        self._spans: Spans | None = None
        self.n_windows, self.n_long, self.long_rate = (self.shards.n_tokens - extra) // sequence_length, 0, 0.0
        if documents is not None:
            order = permute(
                np.arange(self.shards.n_documents), self.shards.n_documents, key=seed << 64 | LONG_ORDER - 1
            )
            self._spans = whole_documents(self.shards.lengths, sequence_length, extra, documents.long_share, order)
            self.n_windows, self.n_long = len(self._spans), self._spans.n_long
            self.long_rate = self.n_long / self.n_windows
            if documents.windows is not None and 0 < self.n_long < self.n_windows:
                self.long_rate = documents.windows
        self._seed, self._shuffle = seed, shuffle
        rows = batch_size // world
        self._rows = np.arange(rank * rows, (rank + 1) * rows)
        self._step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches until as many windows have been read as there are; the last may reach into the next epoch."""
        return -(-self.n_windows // self.batch_size)

    @property
    def step(self) -> int:
        return self._step

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = self.batch(self._step)
        self._step += 1
        return batch

    def samples(self, step: int) -> np.ndarray:
        """The numbers, through the run, of this rank's rows of a batch."""
        return step * self.batch_size + self._rows

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of any step, without moving the loader."""
        return self.read(self._windows(self.samples(step)))

    def read(self, windows_B: np.ndarray) -> dict[str, torch.Tensor]:
        """The windows of these numbers, as a batch."""
        rows = [self._row(int(window)) for window in windows_B]
        read, documents_of = self.shards.read, self.shards.documents_of
        tokens = [np.concatenate([read(*span) for span in row]) for row in rows]
        documents = [_renumber([documents_of(*span) for span in row]) for row in rows]
        return {
            "tokens_BT": torch.from_numpy(np.stack(tokens).astype(np.int64)),
            "document_BT": torch.from_numpy(np.stack(documents)),
            "position_B": torch.tensor([row[0][0] for row in rows]),
        }

    def document_lengths(self, window: int) -> np.ndarray:
        """For each token of a window, how many tokens its document has, int64 [T + extra]."""
        return np.concatenate([self.shards.lengths[self.shards.documents_of(*span)] for span in self._row(window)])

    def _row(self, window: int) -> list[tuple[int, int]]:
        """(start, length) of the spans of the split that a window reads."""
        if self._spans is not None:
            return self._spans.row(window)
        return [(window * self.sequence_length, self.sequence_length + self.extra)]

    def _windows(self, samples_B: np.ndarray) -> np.ndarray:
        if not self._shuffle:
            return samples_B % self.n_windows
        # Of the first n samples floor(n · rate) are long, so a sample's kind and place are functions of its number.
        before_B, after_B = (np.floor(n * self.long_rate).astype(np.int64) for n in (samples_B, samples_B + 1))
        long_B = after_B > before_B
        windows_B = np.empty_like(samples_B)
        windows_B[long_B] = self._visit(before_B[long_B], self.n_long, LONG_ORDER)
        others_B = self._visit((samples_B - before_B)[~long_B], self.n_windows - self.n_long, 0)
        windows_B[~long_B] = self.n_long + others_B
        return windows_B

    def _visit(self, index: np.ndarray, n: int, key: int) -> np.ndarray:
        """Which of n windows the visits of these numbers go to, epoch after epoch."""
        if not len(index):
            return index
        epochs, place = np.divmod(index, n)
        visited = np.empty_like(place)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            visited[here] = permute(place[here], n, key=(self._seed << 64) | key | int(epoch))
        return visited

    def state_dict(self) -> dict[str, int]:
        return {"step": self._step} | self._identity()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken, on any number of ranks. Refuses a state of other data or shapes."""
        for name, ours in self._identity().items():
            if state[name] != ours:
                raise ConfigError(
                    f"the saved loader had {name}={state[name]}, this run has {ours}: resume with the same"
                )
        self._step = state["step"]

    def _identity(self) -> dict[str, int]:
        names = ("sequence_length", "batch_size", "n_windows", "n_long")
        return {name: getattr(self, name) for name in names} | {"seed": self._seed}


def _renumber(documents: Sequence[np.ndarray]) -> np.ndarray:
    """One numbering from 0 over a row's spans; a document that two spans show counts twice."""
    numbers, following = [], 0
    for span in documents:
        numbers.append(span - span[0] + following)
        following = int(numbers[-1][-1]) + 1
    return np.concatenate(numbers)
