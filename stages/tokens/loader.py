"""Batches for a trainer: windows of packed tokens in a shuffled order that is a function, not a list.

The split is cut into windows of `sequence_length` tokens (each also sees the next `extra` tokens, for the targets).
Epoch e visits window `permute(i)`, a keyed Feistel permutation: any step's batch is computed alone, in constant
memory, at any corpus size. The whole state is therefore one integer, and a resumed run repeats no sample.

Legend: B = batch (of this rank), T = sequence_length (+ extra).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from infra.errors import ConfigError
from stages.tokens.shards import TokenShards

FEISTEL_ROUNDS = 6


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
    ) -> None:
        if batch_size % world:
            raise ConfigError(f"batch_size={batch_size} does not divide over {world} ranks: choose a multiple")
        self.shards = TokenShards(directory, split)
        self.sequence_length, self.batch_size, self.extra = sequence_length, batch_size, extra
        self.n_windows = (self.shards.n_tokens - extra) // sequence_length
        if self.n_windows < 1:
            raise ConfigError(
                f"the {split} split has {self.shards.n_tokens} tokens, fewer than one window of sequence_length="
                f"{sequence_length} + {extra}: shorten sequence_length or tokenize more text"
            )
        self._seed, self._shuffle = seed, shuffle
        rows = batch_size // world
        self._rows = np.arange(rank * rows, (rank + 1) * rows)
        self._step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches until every window has been seen; the last may reach into the next epoch."""
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

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of any step, without moving the loader."""
        starts_B = self._windows(step * self.batch_size + self._rows) * self.sequence_length
        length = self.sequence_length + self.extra
        tokens = np.stack([self.shards.read(start, length) for start in starts_B]).astype(np.int64)
        documents = np.stack([self.shards.documents_of(start, length) for start in starts_B])
        return {
            "tokens_BT": torch.from_numpy(tokens),
            "document_BT": torch.from_numpy(documents - documents[:, :1]),
            "position_B": torch.from_numpy(starts_B),
        }

    def _windows(self, samples: np.ndarray) -> np.ndarray:
        epochs, index = np.divmod(samples, self.n_windows)
        if not self._shuffle:
            return index
        windows = np.empty_like(index)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = permute(index[here], self.n_windows, key=(self._seed << 64) | int(epoch))
        return windows

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
        names = ("sequence_length", "batch_size", "n_windows")
        return {name: getattr(self, name) for name in names} | {"seed": self._seed}
