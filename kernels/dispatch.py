"""The one place that decides what runs where: Triton on CUDA, torch everywhere else."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from kernels import eager


def implementation(x: Tensor) -> ModuleType:
    """`kernels.fused` for a CUDA tensor, else `kernels.eager`: the same functions under the same names."""
    if not x.is_cuda:
        return eager
    from kernels import fused  # Triton is not imported where it is not used

    return fused
