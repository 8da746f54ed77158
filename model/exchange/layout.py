"""One table for both directions: which published tensors, stacked along their rows, make each of ours.

Ours fuse what is computed together (query, key and value; gate and up; all experts of a layer), so a tensor of ours
is the concatenation of published ones, in order, some with their rows in another order. Splitting exports,
concatenating imports, and both are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A published tensor: its name, how many rows it has, and the published row of each of our rows (None: same)."""

    name: str
    rows: int
    order: Tensor | None = None

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape as a part of a tensor of ours of that shape: rows as wide as ours, if ours have a width."""
        return self.rows, *ours[1:][-1:]


@dataclass(frozen=True)
class Place:
    """Where a published tensor lies in one of ours: as `part`, from row `start` on, stacked experts end to end."""

    ours: str
    start: int
    part: Part

    def cut(self, tensor: Tensor) -> Tensor:
        """The published tensor from ours; a view where no row moves."""
        rows = tensor.flatten(0, -2) if tensor.ndim > 2 else tensor
        block = rows[self.start : self.start + self.part.rows]
        return block if self.part.order is None else block[self.part.order.argsort()]


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and the published tensors it is made of."""

    ours: str
    parts: tuple[Part, ...]

    def places(self) -> Iterator[Place]:
        """Each part with where it begins."""
        start = 0
        for part in self.parts:
            yield Place(self.ours, start, part)
            start += part.rows

    def pieces(self, read: Callable[[str], Tensor]) -> Iterator[Tensor]:
        """Our tensor's rows from first to last, a published tensor at a time, from a reader of published names."""
        for part in self.parts:
            yield read(part.name) if part.order is None else read(part.name)[part.order]


def one(ours: str, published: str, rows: int) -> Entry:
    """A tensor that is the same on both sides."""
    return Entry(ours, (Part(published, rows),))


def swiglu(ours: str, published: str, d_model: int, width: int) -> list[Entry]:
    """A dense FFN."""
    gate_up = (Part(f"{published}.gate_proj.weight", width), Part(f"{published}.up_proj.weight", width))
    return [
        Entry(f"{ours}.gate_up.weight", gate_up),
        one(f"{ours}.down.weight", f"{published}.down_proj.weight", d_model),
    ]


def ends(vocab_size: int, d_model: int, tied: bool) -> list[Entry]:
    """What is before and after the blocks."""
    entries = [
        one("embedding.weight", "model.embed_tokens.weight", vocab_size),
        one("norm.weight", "model.norm.weight", d_model),
    ]
    return entries if tied else [*entries, one("head.weight", "lm_head.weight", vocab_size)]


def block_norms(ours: str, published: str, d_model: int) -> list[Entry]:
    """The two norms of a block."""
    return [
        one(f"{ours}.attention_norm.weight", f"{published}.input_layernorm.weight", d_model),
        one(f"{ours}.ffn_norm.weight", f"{published}.post_attention_layernorm.weight", d_model),
    ]
