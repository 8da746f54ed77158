"""Routing behind its matrix in one kernel: affinities, choice of experts, gates; and the gradient in another.

Affinities are compared as integers of the same order, which the hardware reduces over a warp in one instruction, and of
which any row has a greatest: a NaN is chosen and seen in the loss, where it would name no expert otherwise. Letters:
N tokens, E experts, K chosen; R tokens, C columns of a tile, in G groups of S each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import RoutingRule

TILE = 512  # numbers of a program, which is one warp: between warps a row's reductions would pass through shared memory
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _ordered(x):
    """fp32 as int32 in the same order, NaN above all."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(key):
    """What `_ordered` was given."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _best(keys, names, AXIS: tl.constexpr):
    """The greatest key along an axis, and the lowest name that has it."""
    top = tl.max(keys, axis=AXIS, keep_dims=True)
    return top, tl.min(tl.where(keys == top, names, 0x7FFFFFFF), axis=AXIS, keep_dims=True)


@triton.jit
def _in_best_groups(
    keys_RGS, GROUPS: tl.constexpr, LIMITED: tl.constexpr, TOP: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The keys of the LIMITED groups whose TOP best have the greatest sum; LOWEST elsewhere."""
    members, left_RGS = tl.arange(0, S)[None, None, :], keys_RGS
    sum_RG1 = tl.zeros((R, G, 1), tl.float32)
    for _ in tl.static_range(TOP):
        top_RG1, first_RG1 = _best(left_RGS, members, 2)
        sum_RG1 += _number(top_RG1)
        left_RGS = tl.where(members == first_RG1, LOWEST, left_RGS)
    groups = tl.arange(0, G)[None, :, None]
    group_RG1 = tl.where(groups < GROUPS, _ordered(sum_RG1), LOWEST)
    kept_RG1 = tl.zeros((R, G, 1), tl.int32)
    for _ in tl.static_range(LIMITED):
        _, first_R11 = _best(group_RG1, groups, 1)
        kept_RG1 = tl.where(groups == first_R11, 1, kept_RG1)
        group_RG1 = tl.where(groups == first_R11, LOWEST, group_RG1)
    return tl.where(kept_RG1 > 0, keys_RGS, LOWEST)


@triton.jit
def _route(
    logits_ptr, bias_ptr, gates_ptr, indices_ptr, scores_ptr, n, scale,
    E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, LIMITED: tl.constexpr, TOP: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALISED: tl.constexpr, R: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # A group has S columns, of which the first E / GROUPS are its experts: their numbers rise with the columns.
    columns = tl.arange(0, G * S)[None, :]
    if E // GROUPS == S or GROUPS == 1:  # loads of whole words, if the compiler sees it
        experts, exist = columns, columns < E
    else:
        experts = columns // S * (E // GROUPS) + columns % S
        exist = (columns // S < GROUPS) & (columns % S < E // GROUPS)
    rows = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    inside, base = (rows < n) & exist, rows.to(tl.int64)
    x_RC = tl.load(logits_ptr + base * E + experts, mask=inside, other=0.0)
    if SIGMOID:
        scores_RC = tl.sigmoid(x_RC)
    else:
        x_RC = tl.where(exist, x_RC, float("-inf"))
        x_RC = tl.exp(x_RC - tl.max(x_RC, axis=1, keep_dims=True))
        scores_RC = x_RC / tl.sum(x_RC, axis=1, keep_dims=True)
    tl.store(scores_ptr + base * E + experts, scores_RC, mask=inside)
    keys_RC = _ordered(scores_RC + tl.load(bias_ptr + experts, mask=exist, other=0.0))
    keys_RC = tl.where(exist, keys_RC, LOWEST)
    if LIMITED < GROUPS:
        keys_RGS = _in_best_groups(tl.reshape(keys_RC, (R, G, S)), GROUPS, LIMITED, TOP, R, G, S)
        keys_RC = tl.reshape(keys_RGS, (R, G * S))
    names = tl.where(exist, experts, E)
    place_RC = tl.full((R, G * S), -1, tl.int32)  # which choice an expert is
    for k in tl.static_range(K):
        _, chosen_R1 = _best(keys_RC, names, 1)
        place_RC = tl.where(names == chosen_R1, k, place_RC)
        keys_RC = tl.where(names == chosen_R1, LOWEST, keys_RC)
    inside = (rows < n) & (place_RC >= 0)
    gates_RC = scores_RC * scale
    if RENORMALISED:
        total_R1 = tl.sum(tl.where(place_RC >= 0, scores_RC, 0.0), axis=1, keep_dims=True)
        gates_RC = scores_RC / (total_R1 + 1e-20) * scale
    tl.store(gates_ptr + base * K + place_RC, gates_RC, mask=inside)
    tl.store(indices_ptr + base * K + place_RC, experts.broadcast_to((R, G * S)).to(tl.int64), mask=inside)


@triton.jit
def _route_backward(
    grad_gates_ptr, grad_scores_ptr, scores_ptr, indices_ptr, grad_ptr, n, scale,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALISED: tl.constexpr, SCORED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.arange(0, C)[None, :]
    inside, base = (rows < n)[:, None] & (columns < E), rows.to(tl.int64)
    scores_RC = tl.load(scores_ptr + base[:, None] * E + columns, mask=inside, other=0.0)
    grad_RC, chosen_RC = tl.zeros((R, C), tl.float32), tl.zeros((R, C), tl.float32)
    for k in tl.static_range(K):
        index_R = tl.load(indices_ptr + base * K + k, mask=rows < n, other=-1).to(tl.int32)
        grad_R = tl.load(grad_gates_ptr + base * K + k, mask=rows < n, other=0.0) * scale
        grad_RC = tl.where(columns == index_R[:, None], grad_R[:, None], grad_RC)
        chosen_RC = tl.where(columns == index_R[:, None], 1.0, chosen_RC)
    if RENORMALISED:
        total_R1 = tl.sum(chosen_RC * scores_RC, axis=1, keep_dims=True) + 1e-20
        mean_R1 = tl.sum(grad_RC * scores_RC, axis=1, keep_dims=True) / total_R1
        grad_RC = (grad_RC - chosen_RC * mean_R1) / total_R1
    if SCORED:
        grad_RC += tl.load(grad_scores_ptr + base[:, None] * E + columns, mask=inside, other=0.0)
    if SIGMOID:
        grad_RC *= scores_RC * (1.0 - scores_RC)
    else:
        grad_RC = scores_RC * (grad_RC - tl.sum(grad_RC * scores_RC, axis=1, keep_dims=True))
    tl.store(grad_ptr + base[:, None] * E + columns, grad_RC, mask=inside)


def route(logits_NE: Tensor, bias_E: Tensor, rule: RoutingRule) -> tuple[Tensor, Tensor, Tensor]:
    """`eager.route`; of equal affinities, and of equal groups, the first is chosen."""
    n, experts = logits_NE.shape
    groups = rule.n_groups if rule.n_limited_groups < rule.n_groups else 1
    across, members = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
    rows = _rows(across * members)
    gates_NK = logits_NE.new_empty(n, rule.n_activated)
    indices_NK = torch.empty_like(gates_NK, dtype=torch.int64)
    scores_NE = torch.empty_like(logits_NE, memory_format=torch.contiguous_format)
    if n:
        _route[(triton.cdiv(n, rows),)](
            logits_NE.contiguous(), bias_E, gates_NK, indices_NK, scores_NE, n, rule.scale,
            E=experts, K=rule.n_activated, GROUPS=groups, LIMITED=min(rule.n_limited_groups, groups),
            TOP=rule.group_top, SIGMOID=rule.sigmoid, RENORMALISED=rule.renormalised, R=rows, G=across, S=members,
            num_warps=1,
        )  # fmt: skip
    return gates_NK, indices_NK, scores_NE


def route_backward(
    grad_gates_NK: Tensor, grad_scores_NE: Tensor | None, scores_NE: Tensor, indices_NK: Tensor, rule: RoutingRule
) -> Tensor:
    """`eager.route_backward`."""
    n, experts = scores_NE.shape
    columns = triton.next_power_of_2(experts)
    rows = _rows(columns)
    grad_NE = torch.empty_like(scores_NE)
    if n:
        _route_backward[(triton.cdiv(n, rows),)](
            grad_gates_NK.contiguous(), None if grad_scores_NE is None else grad_scores_NE.contiguous(), scores_NE,
            indices_NK, grad_NE, n, rule.scale, E=experts, K=rule.n_activated, SIGMOID=rule.sigmoid,
            RENORMALISED=rule.renormalised, SCORED=grad_scores_NE is not None, R=rows, C=columns,
            num_warps=1,
        )  # fmt: skip
    return grad_NE


def _rows(columns: int) -> int:
    return max(1, min(32, TILE // columns))
