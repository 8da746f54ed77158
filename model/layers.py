"""The small layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels import fp8
from model.checkpointing import makes_again, plain
from model.float8 import Float8, in_float8


class Linear(nn.Module):
    """y = x Wᵀ (+ b); W [out, in]. Float8 where `use_float8` says so."""

    float8: Float8 | None = None

    def __init__(self, n_in: int, n_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """Of x or, with a `norm`, of norm(x)."""
        if not in_float8(self):
            return F.linear(x if norm is None else norm(x), self.weight, self.bias)
        y = fp8.linear(x, self.weight) if norm is None else fp8.norm_linear(x, norm.weight, norm.eps, self.weight)
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (1910.07467) over the last dimension; statistics and gain in fp32."""

    recompute = staticmethod(plain)

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.recompute("rms_norm", kernels.rms_norm, x, self.weight, self.eps)

    def add(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x + added, and that normalised: in one pass, unless the norm is to be made again from the sum."""
        if makes_again(self.recompute, "rms_norm"):
            total = x + added
            return total, self(total)
        return kernels.add_rms_norm(x, added, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), with gate and up as one product: `gate_up` rows are [gate, up]."""

    float8: Float8 | None = None
    recompute = staticmethod(plain)

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_up = Linear(d_model, 2 * width)
        self.down = Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        if not in_float8(self):
            return self.down(self.recompute("swiglu", kernels.swiglu, self.gate_up(x)))
        return fp8.swiglu_linear(x, self.gate_up.weight, self.down.weight)
