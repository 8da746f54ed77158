"""The one place that decides what multiplies and quantises float8 where."""

from __future__ import annotations

from types import ModuleType

import torch

from kernels.fp8 import reference


def products(device: torch.device) -> ModuleType:
    """Gluon on Hopper, plain Triton where else float8 can be multiplied, torch on everything without."""
    capability = _capability(device)
    if capability == (9, 0):
        from kernels.fp8 import hopper

        return hopper
    if capability >= (8, 9):
        from kernels.fp8 import portable

        return portable
    return reference


def quantizer(device: torch.device) -> ModuleType:
    """Triton where the hardware knows float8, torch elsewhere."""
    if _capability(device) < (8, 9):
        return reference
    from kernels.fp8 import quantize

    return quantize


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
