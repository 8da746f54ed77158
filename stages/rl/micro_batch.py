"""Replies as the learner reads them: those to one question stand in one row, behind one copy of the question.

    prompt | reply 1 | reply 2 | …

Each reply sees the prompt and itself, and its positions go on from the prompt's end, so the row says of every token
what the prompt and that reply alone would say. The last token of a reply predicts nothing and is left out.

Attention inside such a row costs the square of its length, and needs a mask. So replies share a prompt only while they
are together at most `SHARED` times as long as it is: rows of long replies to a short question hold one each, and
micro-batches of such rows have no mask.

Legend: X rows of W tokens, D model width; B replies of R tokens (right-padded), N reply tokens in all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

import kernels
from model.transformer import Transformer
from model.value import ValueModel
from stages.rl.rollout import Rollout

SHARED = 8

# A reply and what each of its tokens is given: its advantage or, where a critic makes advantages of them, its reward.
Credited = tuple[Rollout, Sequence[float]]


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads, and where in it the replies are. `document_XW` None: one reply a row."""

    tokens_XW: Tensor  # int64
    positions_XW: Tensor  # int64
    document_XW: Tensor | None  # int64, kernels.PREFIX for the prompt
    source_N: Tensor  # int64, which of the X·W states predicts the token
    targets_N: Tensor  # int64
    mask_BR: Tensor  # bool, true on reply tokens: N of them, in the order of source_N and targets_N
    engine_logprobs_BR: Tensor
    credit_BR: Tensor


def micro_batches(
    batch: Sequence[Credited], pad: int, max_tokens: int, device: torch.device | str = "cpu"
) -> list[MicroBatch]:
    """Cut replies into micro-batches of at most `max_tokens` padded tokens, or of one row if that is longer."""
    rows = sorted(_rows(batch, max_tokens), key=_width, reverse=True)
    made = []
    while rows:
        taken = max(1, max_tokens // _width(rows[0]))
        made.append(_micro_batch(rows[:taken], pad, device))
        rows = rows[taken:]
    return made


def token_logprobs(model: Transformer, micro: MicroBatch, temperature: float) -> Tensor:
    """[B, R] fp32: log-probability of each reply token under `temperature`, 0 elsewhere. The head sees replies only."""
    hidden_XWD = model(micro.tokens_XW, micro.positions_XW, micro.document_XW).hidden_BTD
    hidden_ND = hidden_XWD.flatten(0, 1).index_select(0, micro.source_N)
    chosen_N = kernels.linear_log_probs(hidden_ND, model.head_weight, micro.targets_N, temperature)
    return torch.zeros(micro.mask_BR.shape, device=chosen_N.device).masked_scatter(micro.mask_BR, chosen_N)


def token_values(critic: ValueModel, micro: MicroBatch) -> Tensor:
    """[B, R] fp32: the critic's value before each reply token is chosen, 0 elsewhere."""
    values_XW = critic(micro.tokens_XW, micro.positions_XW, micro.document_XW)
    values_N = values_XW.flatten().index_select(0, micro.source_N)
    return torch.zeros(micro.mask_BR.shape, device=values_N.device).masked_scatter(micro.mask_BR, values_N)


def _rows(batch: Sequence[Credited], max_tokens: int) -> list[list[Credited]]:
    """Replies that share a prompt, as many a row as may."""
    groups: dict[tuple[int, ...], list[Credited]] = {}
    for item in batch:
        groups.setdefault(tuple(item[0].prompt), []).append(item)
    rows: list[list[Credited]] = []
    for prompt, items in groups.items():
        room = min(SHARED * len(prompt), max_tokens - len(prompt))
        taken = room + 1  # the first reply begins a row
        for item in items:
            length = len(item[0].tokens) - 1
            if taken + length > room:
                rows.append([])
                taken = 0
            rows[-1].append(item)
            taken += length
    return rows


def _width(row: list[Credited]) -> int:
    return len(row[0][0].prompt) + sum(len(rollout.tokens) - 1 for rollout, _ in row)


def _micro_batch(rows: list[list[Credited]], pad: int, device: torch.device | str) -> MicroBatch:
    width = max(map(_width, rows))
    items = [item for row in rows for item in row]
    tokens_XW = torch.full((len(rows), width), pad, dtype=torch.int64)
    positions_XW = torch.arange(width).repeat(len(rows), 1)
    document_XW = torch.full((len(rows), width), kernels.PREFIX, dtype=torch.int64)
    mask_BR = torch.zeros(len(items), max(len(rollout.tokens) for rollout, _ in items), dtype=torch.bool)
    engine_BR, credit_BR = torch.zeros(mask_BR.shape), torch.zeros(mask_BR.shape)
    source: list[int] = []
    targets: list[int] = []
    number = 0
    for x, row in enumerate(rows):
        prompt = row[0][0].prompt
        end = len(prompt)
        tokens_XW[x, :end] = torch.tensor(prompt)
        for document, (rollout, credit) in enumerate(row):
            read, predicted = rollout.tokens[:-1], rollout.tokens
            here = slice(end, end + len(read))
            tokens_XW[x, here] = torch.tensor(read, dtype=torch.int64)
            positions_XW[x, here] = torch.arange(len(prompt), len(prompt) + len(read))
            document_XW[x, here] = document
            source += [x * width + len(prompt) - 1, *range(x * width + here.start, x * width + here.stop)]
            targets += predicted
            mask_BR[number, : len(predicted)] = True
            engine_BR[number, : len(predicted)] = torch.tensor(rollout.logprobs)
            credit_BR[number, : len(predicted)] = torch.tensor(credit)
            number, end = number + 1, here.stop
        document_XW[x, end:] = len(row)  # padding, which nobody sees
    shared = any(len(row) > 1 for row in rows)
    return MicroBatch(
        tokens_XW.to(device),
        positions_XW.to(device),
        document_XW.to(device) if shared else None,
        torch.tensor(source, device=device),
        torch.tensor(targets, device=device),
        mask_BR.to(device),
        engine_BR.to(device),
        credit_BR.to(device),
    )
