"""The one place that decides what multiplies and quantises float8 where, by the device's capability."""

from __future__ import annotations

from types import ModuleType

import torch

from kernels.fp8 import reference


def products(device: torch.device) -> ModuleType:
    """Gluon on Hopper, plain Triton where else float8 can be multiplied, torch on everything without."""
    if is_hopper(device):
        from kernels.fp8 import hopper

        return hopper
    if _capability(device) >= (8, 9):
        from kernels.fp8 import portable

        return portable
    return reference


def quantizer(device: torch.device) -> ModuleType:
    """Triton where the hardware knows float8 (Gluon for a part of it on Hopper), torch elsewhere."""
    if _capability(device) < (8, 9):
        return reference
    from kernels.fp8 import quantize

    return quantize


def is_hopper(device: torch.device) -> bool:
    return _capability(device) == (9, 0)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
