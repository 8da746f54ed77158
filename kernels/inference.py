"""What runs under `torch.inference_mode`, with no backward pass to prepare for.

On a CPU a decoding step is a few rows long, so an operation costs what its dispatches cost, not what its arithmetic
costs: what `suits` it is written in few operations. On CUDA steps are recorded, and the kernels of `fused` cost least.
Letters as in `kernels.reference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import eager
from kernels.dispatch import implementation
from kernels.eager import swiglu
from kernels.reference import rms_norm

__all__ = ["apply_rope", "latent_attention", "rms_norm", "routed_experts", "suits", "swiglu"]


def suits(x: Tensor) -> bool:
    """Whether x is decoded on a CPU. A compiler cannot be asked, and drops what nothing reads."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and not x.is_cuda


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.apply_rope`."""
    half = cos.shape[-1]
    still, a, b = x.split([x.shape[-1] - 2 * half, half, half], dim=-1)
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    return torch.cat([still, *turned] if still.shape[-1] else turned, dim=-1)


def routed_experts(
    x_ND: Tensor, gates_NK: Tensor, indices_NK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """`reference.routed_experts`, by grouped products over the rows of each expert one after another.

    A token's rows are gathered and summed in the order of its choices, not scattered: the same bits every time.
    """
    expert_P, pair_P = indices_NK.flatten().sort(stable=True)
    experts_E = torch.arange(len(down_EDF), device=x_ND.device)
    ends_E = torch.searchsorted(expert_P, experts_E, right=True, out_int32=True)
    source_P = pair_P // indices_NK.shape[1]
    gate_up_P2F = F.grouped_mm(x_ND.index_select(0, source_P), gate_up_E2FD.transpose(1, 2), offs=ends_E)
    h_PF = swiglu(gate_up_P2F, gates_NK.flatten().index_select(0, pair_P))
    y_PD = F.grouped_mm(h_PF, down_EDF.transpose(1, 2), offs=ends_E)
    row_R = torch.empty_like(pair_P)
    row_R[pair_P] = torch.arange(len(pair_P), device=x_ND.device)
    return implementation(y_PD).gather_sum(y_PD, row_R, len(x_ND))


def latent_attention(
    q_NHC: Tensor, q_NHR: Tensor, cached_BSL: Tensor, position_BT: Tensor, mask_BTS: Tensor, scale: float
) -> Tensor:
    """`eager.latent_attention`, which in fp32 was the faster one on CUDA too (benchmarks/LOG.md, 2026-11-27)."""
    module = eager if q_NHC.dtype == torch.float32 else implementation(q_NHC)
    return module.latent_attention(q_NHC, q_NHR, cached_BSL, position_BT, mask_BTS, scale)
