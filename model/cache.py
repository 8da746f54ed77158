"""What decoding keeps of the tokens it has read: one `Cache` a layer, [B rows, S slots, W numbers] whatever W means.

Every row writes at its own position (slot = position), so rows may be at different lengths, may join and leave, and
may take back what they wrote: a slot past a row's length is masked until it is written again. Rows lie one after
another, so the slots of one step are a single index copy.

`Float8Cache` keeps MLA's latent as float8_e4m3fn with one fp32 scale a token: (C + 4 + 2R) bytes a token and layer in
bf16 where the plain cache takes 2(C + R). The rotary part stays as it is: it is small, and the scores are most
sensitive to it. Letters: B rows, S slots, T tokens a row, N = B·T, W width, C latent width, R rotary width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.fp8 import FLOAT8, FLOAT8_MAX
from model.rope import Rotation


class Step(NamedTuple):
    """T new tokens of each row, the same for every layer: their rotations [B, T, R/2], their positions, the flat slots
    that they are kept in [B·T], and what is added to the scores of each over the first S slots, 0 or -inf."""

    rope: Rotation
    position_BT: Tensor
    index_N: Tensor
    mask_BTS: Tensor


class Slots(NamedTuple):
    """The room of a batch's caches: how many slots a row has, and the rotation of each."""

    count: int
    rope: Rotation

    def first(self, length: int) -> Rotation:
        return Rotation(self.rope.cos[:length], self.rope.sin[:length])

    def step(self, positions_BT: Tensor, seen: int) -> Step:
        """The step of tokens at these positions, none of which needs more than the first `seen` slots."""
        device, dtype = positions_BT.device, self.rope.cos.dtype
        rows_B1 = torch.arange(len(positions_BT), device=device)[:, None]
        later_BTS = torch.arange(seen, device=device) > positions_BT[..., None]
        return Step(
            Rotation(self.rope.cos[positions_BT], self.rope.sin[positions_BT]),
            positions_BT,
            (rows_B1 * self.count + positions_BT).flatten(),
            torch.zeros(later_BTS.shape, dtype=dtype, device=device).masked_fill_(later_BTS, float("-inf")),
        )


class Cache:
    """The plain cache, in the dtype of what it is given."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._rows = 0
        self._parts: list[Tensor] = []  # each [B, S, ...], of which the first `_rows` rows are taken

    def resize(self, kept_K: Tensor, rows: int, room: tuple[int, int], filled: int, dtype: torch.dtype) -> None:
        """Have `room` for (rows, slots), of which `rows` are taken: `kept_K` first, with their first `filled` slots.

        Where the room is what it was, everything stays in the same memory.
        """
        same = bool(self._parts) and self._parts[0].shape[:2] == room
        parts = self._parts if same else self._allocate(*room, dtype, kept_K.device)
        for old, new in zip(self._parts, parts, strict=False):
            new[: len(kept_K), :filled] = old[:, :filled].index_select(0, kept_K)
        self._parts, self._rows = parts, rows

    def fill(self, x_BTW: Tensor) -> None:
        """Write the first T slots of the last B rows that are taken."""
        rows, length = x_BTW.shape[:2]
        for part, values in zip(self._parts, self._encode(x_BTW), strict=True):
            part[self._rows - rows : self._rows, :length] = values

    def spread(self, source_J: Tensor, rows: int, length: int) -> None:
        """Copy the first slots of the last `rows` rows, just filled, to the last J: row j gets those of source_J[j]."""
        if rows == len(source_J):  # each has its own
            return
        end = self._rows
        for part in self._parts:
            part[end - len(source_J) : end, :length] = part[end - rows : end, :length][source_J]

    def write(self, index_N: Tensor, x_NW: Tensor) -> None:
        for part, values in zip(self._parts, self._encode(x_NW), strict=True):
            part.flatten(0, 1).index_copy_(0, index_N, values)

    def read(self, rows: int, slots: int) -> Tensor:
        """The first slots of the first rows, [rows, slots, W]."""
        return self._parts[0][:rows, :slots]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def _allocate(self, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        # Zeros: a masked slot takes part with weight 0, which garbage could turn into NaN.
        return [torch.zeros(rows, slots, self.width, dtype=dtype, device=device)]

    def _encode(self, x: Tensor) -> list[Tensor]:
        return [x]


class Float8Cache(Cache):
    """A cache whose first `latent` numbers of a token are quantised (V2, section 3.2.3, quantises its cache too)."""

    def __init__(self, width: int, latent: int) -> None:
        super().__init__(width)
        self.latent = latent

    def read(self, rows: int, slots: int) -> Tensor:
        bits_BSC, scale_BS1, rest_BSR = (part[:rows, :slots] for part in self._parts)
        latent_BSC = bits_BSC.view(FLOAT8).float() * scale_BS1  # rounded once, at the end
        return torch.cat([latent_BSC.to(rest_BSR.dtype), rest_BSR], dim=-1)

    def _allocate(self, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        widths = (self.latent, 1, self.width - self.latent)
        dtypes = (torch.uint8, torch.float32, dtype)  # float8 as its bits: not every copy knows the type
        return [
            torch.zeros(rows, slots, width, dtype=kind, device=device)
            for width, kind in zip(widths, dtypes, strict=True)
        ]

    def _encode(self, x: Tensor) -> list[Tensor]:
        latent, rest = x.split([self.latent, self.width - self.latent], dim=-1)
        latent = latent.float()
        scale = latent.abs().amax(-1, keepdim=True).clamp_min(1e-12) / FLOAT8_MAX
        return [(latent / scale).to(FLOAT8).view(torch.uint8), scale, rest]
