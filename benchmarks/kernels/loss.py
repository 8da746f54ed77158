"""The head and its cross-entropy, forward and backward at once, against the three matrix products that it cannot do
without, torch and Liger. Letters: N rows, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.timing import Case
from kernels import linear_cross_entropy

BF16 = torch.bfloat16
SHAPES = ((8192, 2048, 129280), (4096, 7168, 129280))


def loss() -> Iterator[dict[str, Any]]:
    for shape in SHAPES:
        yield from of_shape(*shape)


def of_shape(n: int, d: int, v: int) -> Iterator[dict[str, Any]]:
    x = torch.randn(n, d, device="cuda", dtype=BF16, requires_grad=True)
    weight = (0.02 * torch.randn(v, d, device="cuda")).to(BF16).requires_grad_()
    targets = torch.randint(v, (n,), device="cuda")
    losses = {
        "ours": lambda: linear_cross_entropy(x, weight, targets),
        "torch": lambda: F.cross_entropy(F.linear(x, weight), targets, reduction="sum"),
        **liger(x, weight, targets),
    }
    torch.testing.assert_close(losses["ours"](), losses["torch"]().float(), rtol=2**-8, atol=0)  # its sum is bf16
    passes = {name: gradients(call, x, weight) for name, call in losses.items()}
    case = Case(f"loss linear cross-entropy {n}x{d}x{v}", "TFLOP/s", 6.0 * n * d * v)
    for name, call in passes.items():
        case.add(name, call, waits=name == "liger")  # it counts the targets on the host
    case.add("bf16", products(x.detach(), weight.detach()))
    yield case.run()
    extra = {name: extra_gib(call) for name, call in passes.items()}
    row = {"case": f"{case.name}, memory", "metric": "1 / extra GiB", "ours": 1 / extra.pop("ours")}
    yield row | {"anchors": {name: 1 / gib for name, gib in extra.items()}}


def gradients(loss: Callable[[], Tensor], x: Tensor, weight: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(loss(), (x, weight))


def products(x_ND: Tensor, weight_VD: Tensor) -> Callable[[], None]:
    """Logits and both gradients, with logits in the place of their gradient."""

    def call() -> None:
        logits_NV = x_ND @ weight_VD.T
        logits_NV @ weight_VD
        logits_NV.T @ x_ND

    return call


def liger(x: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], Tensor]]:
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return {}
    options = None, None, -100, 0.0, 0.0, "sum"
    return {"liger": lambda: LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets, *options)[0]}


def extra_gib(call: Callable[[], tuple[Tensor, ...]]) -> float:
    """What a call holds at its peak beside its inputs and its results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    peak = torch.cuda.max_memory_allocated() - before
    return (peak - sum(x.numel() * x.element_size() for x in results)) / 2**30
