"""The operations' forward and backward passes written out in torch, for every device that has no kernel of ours.

Tape autograd through `kernels.reference` keeps every intermediate and walks memory once per elementary step, which on
a CPU costs more than the matrix products of a small model. Here are fewer passes, and nothing is saved twice.
Letters as in `kernels.reference`, and P routed rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import RoutingRule, document_mask
from kernels.reference import route as route

NO_TARGET = -1  # as a row's target: the row counts nothing


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalised rows in x's dtype, and the reciprocal root mean square of each, fp32 [..., 1]."""
    x32 = x.float()
    rstd = reciprocal_rms(x32, eps)
    return (x32 * rstd).mul_(weight_D).to(x.dtype), rstd


def add_rms_norm(x: Tensor, added: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + added, and `rms_norm` of it."""
    total = x + added
    return total, *rms_norm(total, weight_D, eps)


def reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """The reciprocal root mean square of each row, fp32 [..., 1]."""
    return (torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor, grad_sum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x (its dtype; with `grad_sum`, the gradient that reaches x beside the norm, of both) and of the gain
    (fp32)."""
    width = x.shape[-1]
    normal = x.float() * rstd
    grad = grad.float()
    # dx = (g·w − n·mean(g·w·n)) / rms and dw = Σ g·n share the product g·n.
    product = grad * normal
    grad_weight_D = product.reshape(-1, width).sum(0)
    mean = (product @ weight_D.float()).unsqueeze(-1) / width
    grad_x = (grad * weight_D).addcmul_(normal, mean, value=-1).mul_(rstd).to(x.dtype)
    return grad_x if grad_sum is None else grad_x + grad_sum, grad_weight_D


def swiglu(gate_up: Tensor, scale_N: Tensor | None = None) -> Tensor:
    """silu(gate) · up (· scale of the row), where the last dimension holds [gate, up]."""
    gate, up = gate_up.chunk(2, dim=-1)
    y = F.silu(gate).mul_(up)
    return y if scale_N is None else y.mul_(scale_N.to(y.dtype).unsqueeze(-1))


def swiglu_backward(grad: Tensor, gate_up: Tensor, scale_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of [gate, up] and of the scales, from the input alone."""
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    grad_scale_N = None
    if scale_N is not None:
        grad_scale_N = (silu * up).mul_(grad).sum(-1, dtype=torch.float32).to(scale_N.dtype)
        grad = grad * scale_N.to(grad.dtype).unsqueeze(-1)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    grad_up.copy_(silu.mul_(grad))
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return out, grad_scale_N


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """x with its last R dims turned by the angles, or back by them."""
    sin = -sin if inverse else sin
    y = x.clone()
    half = cos.shape[-1]
    a, b = x[..., -2 * half : -half], x[..., -half:]
    y[..., -2 * half : -half].mul_(cos).addcmul_(b, sin, value=-1)
    y[..., -half:].mul_(cos).addcmul_(a, sin)
    return y


def assemble_keys(up: Tensor, rope: Tensor, nope: int) -> Tensor:
    """MLA's keys [..., H, n + R]: the first `nope` dims of up [..., H, n + v], then what heads share [..., R]."""
    shared = rope.unsqueeze(-2).expand(*up.shape[:-1], rope.shape[-1])
    return torch.cat([up[..., :nope], shared], dim=-1)


def assemble_keys_backward(grad_key: Tensor, grad_value: Tensor, rotary: int) -> tuple[Tensor, Tensor]:
    """Gradients of `up`, whose last dims are the values, and of the shared part."""
    grad_nope, grad_rope = grad_key.split([grad_key.shape[-1] - rotary, rotary], dim=-1)
    return torch.cat([grad_nope, grad_value], dim=-1), grad_rope.sum(-2)


def route_backward(
    grad_gates_NK: Tensor, grad_scores_NE: Tensor | None, scores_NE: Tensor, indices_NK: Tensor, rule: RoutingRule
) -> Tensor:
    """The gradient of `route`'s logits, from those of its gates and (None: unused) of its affinities."""
    grad_NK = grad_gates_NK * rule.scale
    if rule.renormalised:
        chosen_NK = scores_NE.gather(1, indices_NK)
        total_N1 = chosen_NK.sum(-1, keepdim=True) + 1e-20
        grad_NK = grad_NK / total_N1 - (grad_NK * (chosen_NK / total_N1 / total_N1)).sum(-1, keepdim=True)
    grad_NE = torch.zeros_like(scores_NE) if grad_scores_NE is None else grad_scores_NE.clone()
    grad_NE.scatter_add_(1, indices_NK, grad_NK)
    if rule.sigmoid:
        return torch.ops.aten.sigmoid_backward(grad_NE, scores_NE)
    return torch.ops.aten._softmax_backward_data(grad_NE, scores_NE, -1, scores_NE.dtype)


def layout(indices_NK: Tensor, n_experts: int, tile: int) -> tuple[Tensor, ...]:
    """The tensors of `kernels.grouped.Permutation`, in its order."""
    flat_R, device = indices_NK.flatten(), indices_NK.device
    n_pairs = flat_R.numel()
    order_R = flat_R.argsort(stable=True)
    load_E = torch.zeros(n_experts, dtype=torch.int64, device=device).scatter_add_(0, flat_R, torch.ones_like(flat_R))
    room_E = (load_E + (tile - 1)) // tile * tile
    ends_E = room_E.cumsum(0)
    shift_E = (ends_E - room_E) - (load_E.cumsum(0) - load_E)  # where an expert starts, less where it would compactly
    place_R = torch.arange(n_pairs, device=device) + shift_E[flat_R[order_R]]
    n_tiles = n_pairs // tile + n_experts if tile > 1 else n_pairs
    pair_P = torch.zeros(n_tiles * tile, dtype=torch.int64, device=device)
    pair_P[place_R] = order_R
    real_P = torch.zeros(n_tiles * tile, device=device)
    real_P.index_fill_(0, place_R, 1.0)
    row_R = torch.empty_like(order_R)
    row_R[order_R] = place_R
    tiles_L = torch.arange(n_tiles, device=device) * tile
    expert_L = torch.searchsorted(ends_E, tiles_L, right=True).clamp_max(n_experts - 1)
    source_P = pair_P // indices_NK.shape[1]
    return pair_P, source_P, real_P, row_R, load_E, ends_E.to(torch.int32), expert_L


def visibility(document_BT: Tensor) -> Tensor:
    """`reference.document_mask`, for all heads: [B, 1, T, T]."""
    return document_mask(document_BT).unsqueeze(1)


def attention(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTv: Tensor, mask_B1TT: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v, causal or where the mask is true; differentiable as it stands."""
    width = v_BHTv.shape[-1]
    # The fused kernel wants equal widths: zero columns are cheaper than the unfused path (3x).
    v = F.pad(v_BHTv, (0, q_BHTd.shape[-1] - width)) if width < q_BHTd.shape[-1] else v_BHTv
    causal = mask_B1TT is None
    return F.scaled_dot_product_attention(q_BHTd, k_BHTd, v, mask_B1TT, is_causal=causal, scale=scale)[..., :width]


def gather_sum(y_PD: Tensor, row_R: Tensor, n_tokens: int) -> Tensor:
    """Σ over a token's K rows; `row_R` names them, token by token. Returns [N, D]."""
    return y_PD.index_select(0, row_R).view(n_tokens, -1, y_PD.shape[-1]).sum(1)


def cross_entropy_gradient(logits_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
    """−log softmax(logits)[target] of each row, fp32, and its gradient in the logits, in their dtype. Uses them up.
    Both are 0 where the target is NO_TARGET."""
    logits32_nV, targets_n1 = logits_nV.float(), targets_n.clamp_min(0)[:, None]
    logsumexp_n1 = logits32_nV.logsumexp(-1, keepdim=True)
    loss_n = (logsumexp_n1 - logits32_nV.gather(1, targets_n1)).squeeze(1)
    grad_nV = logits32_nV.sub_(logsumexp_n1).exp_()
    grad_nV.scatter_add_(1, targets_n1, torch.full_like(logsumexp_n1, -1.0))
    none_n = targets_n == NO_TARGET
    if torch.compiler.is_compiling() or none_n.any():  # compiled code does not branch on numbers
        loss_n, grad_nV = loss_n.masked_fill(none_n, 0.0), grad_nV.masked_fill_(none_n[:, None], 0.0)
    return loss_n, grad_nV.to(logits_nV.dtype)


def adamw_step(
    weight: Tensor,
    low: Tensor | None,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    scale: float,
    rate: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> None:
    """One step of AdamW (1711.05101) in place, in fp32, whatever dtype the gradient and the moments have.

    `weight` is the fp32 weight or, with `low`, the bf16 half of one (`split_master`). The gradient is multiplied by
    `scale` first; `step` counts from 1.
    """
    master = weight if low is None else join_master(weight, low)
    grad32 = grad.float() * scale
    m32 = m.float().lerp_(grad32, 1.0 - betas[0])
    v32 = v.float().mul_(betas[1]).addcmul_(grad32, grad32, value=1.0 - betas[1])
    denominator = (v32 / (1.0 - betas[1] ** step)).sqrt_().add_(eps)
    master.mul_(1.0 - rate * decay).addcdiv_(m32, denominator, value=-rate / (1.0 - betas[0] ** step))
    m.copy_(m32)
    v.copy_(v32)
    if low is not None:
        for half, new in zip((weight, low), split_master(master), strict=True):
            half.copy_(new)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as the nearest bf16 (ties away from zero) and the rest of its bits, int16. No bit is lost.

    A bf16 weight with its low half costs what an fp32 master costs, and no cast stands between step and product.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 tensor that `split_master` took apart."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def latent_attention(
    q_NHC: Tensor, q_NHR: Tensor, cached_BSL: Tensor, position_BT: Tensor, mask_BTS: Tensor, scale: float
) -> Tensor:
    """Each token's heads over its row's cache, [N, H, C]: a slot is a key, and a value without its rotary part.

    The mask, added to the scores (0 or -inf), shows a token the slots up to its position.
    """
    q_BTHL = torch.cat([q_NHC, q_NHR], dim=-1).unflatten(0, position_BT.shape)
    # Tokens stand where heads would and heads where a sequence would: all of them read one cache. Keys and values are
    # both the cache itself (a fused kernel wants equal widths): the sum's rotary part is computed and dropped.
    cached_BTSL = cached_BSL[:, None].expand(-1, q_BTHL.shape[1], -1, -1)
    mask_BTHS = mask_BTS[:, :, None]
    y_BTHL = F.scaled_dot_product_attention(q_BTHL, cached_BTSL, cached_BTSL, attn_mask=mask_BTHS, scale=scale)
    return y_BTHL.flatten(0, 1)[..., : q_NHC.shape[2]]
