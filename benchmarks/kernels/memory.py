"""The kernels that move numbers rather than multiply them, against a copy's bandwidth, torch and Liger.

GB/s count every input read once and every output written once. Letters: N rows, D width, F width of a SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.timing import Case, captured, median_ms
from kernels import RoutingRule, eager, fused
from kernels.fp8 import quantize, reference

COPY_BYTES = 2 << 30
BF16 = torch.bfloat16
ROWS = ((8192, 2048), (8192, 7168), (16384, 2048))
SWIGLUS = ((16384, 2048), (16384, 8192), (98304, 1408))


def liger() -> Any | None:
    try:
        from liger_kernel.ops import fused_add_rms_norm, rms_norm
    except ImportError:
        return None
    return rms_norm, fused_add_rms_norm


def copy_gbps() -> float:
    """What a device-to-device copy reaches, read and write counted."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_ms(captured(lambda: target.copy_(source)).replay) / 1e6


def memory() -> Iterator[dict[str, Any]]:
    copy, peers = copy_gbps(), liger()

    def run(case: Case) -> dict[str, Any]:
        row = case.run()
        row["anchors"]["copy"] = copy
        print(f"{'':44s} {row['ours'] / copy:.2f} x copy at {copy:.0f} GB/s", flush=True)
        return row

    for n, d in ROWS:
        x = torch.randn(n, d, device="cuda", dtype=BF16)
        exact = reference.quantize(x)
        for name, options, parts, size in (
            ("quantize rows", {"across": False}, 1, 3),
            ("quantize rows and across", {}, 2, 4),
        ):
            case = Case(f"memory {name} {n}x{d}", "GB/s", (size + parts * 4 / 128) * n * d)
            case.expected, case.tolerance = codes(exact[:parts]), 1e-3
            case.taken = lambda out, parts=parts: codes(out[:parts])
            case.add("ours", lambda x=x, options=options: quantize.quantize(x, **options))
            yield run(case)
        weight = torch.randn(64, d, 1408, device="cuda", dtype=BF16) if d == 2048 else None
        if n == 8192 and weight is not None:
            case = Case(f"memory quantize weight 64x{d}x1408", "GB/s", 4.0 * weight.numel())
            case.add("ours", lambda w=weight: quantize.quantize_weight(w))
            yield run(case)
        yield from (run(case) for case in (*norms(n, d, peers), *fused_norms(n, d, peers)))
    for n, f in SWIGLUS:
        yield from (run(case) for case in swiglus(n, f))
    yield from (run(case) for case in (*routers(), *routing(), *decoding()))


def decoding() -> Iterator[Case]:
    """A step of MLA over its cache, rows of all lengths up to the cache's. GB/s count what rows have, once; torch reads
    to the end of the longest, twice."""
    for name, batch, heads, slots, rank, rope in (
        ("h100 rollouts", 1024, 10, 512, 256, 32),
        ("h100 rollouts", 64, 10, 512, 256, 32),
        ("v3, one row", 1, 128, 16384, 512, 64),
        ("v3", 128, 128, 4096, 512, 64),
    ):
        q = torch.randn(batch, heads, rank + rope, device="cuda", dtype=BF16).split([rank, rope], dim=-1)
        cache = torch.randn(batch, slots, rank + rope, device="cuda", dtype=BF16)
        position = torch.randint(slots, (batch, 1), device="cuda")
        position[0] = slots - 1
        later = torch.arange(slots, device="cuda") > position[..., None]
        mask = torch.zeros(later.shape, device="cuda", dtype=BF16).masked_fill_(later, float("-inf"))
        inputs = *q, cache, position, mask, (rank + rope) ** -0.5
        moved = 2.0 * (int(position.sum()) + batch) * (rank + rope)
        exact = eager.latent_attention(*inputs)
        case = Case(f"memory decode {name} {batch}x{heads}x{slots}", "GB/s", moved, exact, 1e-2)
        case.add("ours", lambda i=inputs: fused.latent_attention(*i))
        case.add("torch", lambda i=inputs: eager.latent_attention(*i))
        yield case


def codes(quantized: Any) -> Tensor:
    """Codes as numbers, for a comparison."""
    return torch.cat([part.codes.float().flatten() for part in quantized])


def norms(n: int, d: int, peers: Any) -> Iterator[Case]:
    x, grad = (torch.randn(n, d, device="cuda", dtype=BF16) for _ in range(2))
    weight = torch.rand(d, device="cuda") + 0.5
    _, rstd = fused.rms_norm(x, weight, 1e-6)
    case = Case(f"memory rms_norm {n}x{d}", "GB/s", 4.0 * n * d, F.rms_norm(x, (d,), weight.bfloat16(), 1e-6), 5e-3)
    case.taken = lambda out: out[0] if isinstance(out, tuple) else out
    case.add("ours", lambda: fused.rms_norm(x, weight, 1e-6))
    low = weight.bfloat16()
    case.add("torch", lambda: F.rms_norm(x, (d,), low, 1e-6))
    if peers:
        case.add("liger", lambda: peers[0].rms_norm_forward(x, low, 1e-6, 0.0, "llama", None))
    yield case
    case = Case(f"memory rms_norm backward {n}x{d}", "GB/s", 6.0 * n * d)
    case.add("ours", lambda: fused.rms_norm_backward(grad, x, weight, rstd))
    fused_torch = torch.ops.aten._fused_rms_norm
    _, torch_rstd = fused_torch(x, [d], low, 1e-6)
    backward = torch.ops.aten._fused_rms_norm_backward
    case.add("torch", lambda: backward(grad, x, [d], torch_rstd, low, [True, True]))
    if peers:
        _, _, rstd_of_liger, block, warps, casting = peers[0].rms_norm_forward(x, low, 1e-6, 0.0, "llama", None)
        options = 0.0, casting, block, warps, False, None
        case.add("liger", lambda: peers[0].rms_norm_backward(grad, x, low, rstd_of_liger, *options))
    yield case


def fused_norms(n: int, d: int, peers: Any) -> Iterator[Case]:
    """The norm behind the sum that it normalises and before the quantisation that reads it, against one by one."""
    x, added, grad, beside = (torch.randn(n, d, device="cuda", dtype=BF16) for _ in range(4))
    weight = torch.rand(d, device="cuda") + 0.5
    total, _, rstd = fused.add_rms_norm(x, added, weight, 1e-6)
    low = weight.bfloat16()
    case = Case(f"memory add, rms_norm {n}x{d}", "GB/s", 8.0 * n * d, F.rms_norm(x + added, (d,), low, 1e-6), 5e-3)
    case.taken = lambda out: out[1]
    case.add("ours", lambda: fused.add_rms_norm(x, added, weight, 1e-6))

    def one_by_one() -> tuple[Tensor, Tensor]:
        summed = x + added
        return summed, fused.rms_norm(summed, weight, 1e-6)[0]

    case.add("unfused", one_by_one)
    if peers:
        # It gives the norm, then the sum, then more: turned round, as ours are.
        case.add("liger", lambda: peers[1].fused_add_rms_norm_forward(x, added, low, 1e-6, 0.0, "llama")[1::-1])
    yield case
    case = Case(f"memory add, rms_norm backward {n}x{d}", "GB/s", 8.0 * n * d)
    case.add("ours", lambda: fused.rms_norm_backward(grad, total, weight, rstd, beside))
    case.add("unfused", lambda: fused.rms_norm_backward(grad, total, weight, rstd)[0] + beside)
    if peers:
        *_, rstd_of_liger, block, warps, stages, casting = peers[1].fused_add_rms_norm_forward(
            x, added, low, 1e-6, 0.0, "llama"
        )
        options = 0.0, casting, block, warps, stages, False
        backward = peers[1].fused_add_rms_norm_backward
        case.add("liger", lambda: backward(grad, beside, total, low, rstd_of_liger, *options))
    yield case
    case = Case(f"memory rms_norm, quantize both {n}x{d}", "GB/s", (4 + 2 * 4 / 128) * n * d)
    exact = reference.norm_quantize(x, eager.reciprocal_rms(x, 1e-6).flatten(), weight)
    case.expected, case.tolerance, case.taken = codes(exact), 2e-2, codes  # one by one, bf16 stands between
    case.add("ours", lambda: quantize.norm_quantize(x, fused.reciprocal_rms(x, 1e-6).flatten(), weight))
    case.add("unfused", lambda: quantize.quantize(fused.rms_norm(x, weight, 1e-6)[0]))
    yield case


def swiglus(n: int, f: int) -> Iterator[Case]:
    x, grad = torch.randn(n, 2 * f, device="cuda", dtype=BF16), torch.randn(n, f, device="cuda", dtype=BF16)
    gates = torch.rand(n, device="cuda")
    scales = 4 / 128

    def case(name: str, per_number: float, call: Callable[[], Any]) -> Case:
        made = Case(f"memory {name} {n}x{f}", "GB/s", per_number * n * f)
        made.add("ours", call)
        return made

    yield case("swiglu, quantize rows", 5 + scales, lambda: quantize.swiglu_quantize(x, gates, across=False))
    yield case("swiglu, quantize across", 5 + scales, lambda: quantize.swiglu_quantize(x, gates, rows=False))
    yield case("swiglu, quantize both", 6 + 2 * scales, lambda: quantize.swiglu_quantize(x, gates))
    yield case(
        "swiglu backward, quantize both", 10 + 4 * scales, lambda: quantize.swiglu_backward_quantize(grad, x, gates)
    )
    yield case("swiglu bf16", 6, lambda: fused.swiglu(x, gates))
    yield case("swiglu backward bf16", 10, lambda: fused.swiglu_backward(grad, x, gates))


def routers(tokens: int = 16384) -> Iterator[Case]:
    """The router behind its product, which torch has a kernel for every step of."""
    v2 = RoutingRule(sigmoid=False, renormalised=False, n_activated=6)
    v3 = RoutingRule(True, True, n_activated=8, n_groups=8, n_limited_groups=4, group_top=2, scale=2.5)
    for experts, rule in ((64, v2), (256, v3)):
        groups = " groups" if rule.n_groups > 1 else ""
        name = f"{tokens}x{experts} k{rule.n_activated}{groups}"
        logits, bias = torch.randn(tokens, experts, device="cuda"), torch.randn(experts, device="cuda") / 100
        gates, indices, scores = eager.route(logits, bias, rule)
        case = Case(f"memory router {name}", "GB/s", tokens * (8.0 * experts + 12 * rule.n_activated))
        case.expected, case.tolerance = gates, 1e-2  # a group is chosen otherwise where two are nearly as good
        case.taken = lambda out: out[0]
        inputs = logits, bias, rule
        for who, module in (("ours", fused), ("torch", eager)):
            case.add(who, lambda module=module, inputs=inputs: module.route(*inputs))
        yield case
        back = torch.randn_like(gates), torch.randn_like(scores), scores, indices, rule
        case = Case(f"memory router backward {name}", "GB/s", tokens * (12.0 * experts + 12 * rule.n_activated))
        case.expected, case.tolerance = eager.route_backward(*back), 1e-5
        for who, module in (("ours", fused), ("torch", eager)):
            case.add(who, lambda module=module, back=back: module.route_backward(*back))
        yield case


def routing(tokens: int = 16384, experts: int = 64, chosen: int = 6, d: int = 2048) -> Iterator[Case]:
    """The layout of experts' rows, a gather into it with its quantisation, and the sum back."""
    from kernels.fp8.autograd import Order
    from kernels.grouped import layout

    x = torch.randn(tokens, d, device="cuda", dtype=BF16)
    indices = torch.rand(tokens, experts, device="cuda").topk(chosen).indices
    pair_P, *_, row_R, _, _, expert_L = eager.layout(indices, experts, 128)
    # Choices read, their rows written; of every row its pair, its token and whether it is one; the tiles' experts.
    size = 16.0 * len(row_R) + 20.0 * len(pair_P) + 8.0 * len(expert_L)
    case = Case(f"memory layout {tokens}x{chosen} of {experts}", "GB/s", size, row_R)
    case.taken = lambda out: out[3]
    for who, module in (("ours", fused), ("torch", eager)):
        case.add(who, lambda module=module: module.layout(indices, experts, 128))
    yield case
    order = Order.of(layout(indices, experts, 128))
    rows = len(order.source_P)
    case = Case(f"memory gather, quantize both {rows}x{d}", "GB/s", 4.0 * rows * d)
    case.add("ours", lambda: quantize.quantize(x, order.source_P))
    yield case
    y = torch.randn(rows, d, device="cuda", dtype=BF16)
    case = Case(f"memory sum of {chosen} rows {tokens}x{d}", "GB/s", 2.0 * (chosen + 1) * tokens * d)
    case.expected, case.tolerance = y.float().index_select(0, order.row_R).view(tokens, chosen, d).sum(1), 5e-3
    case.add("ours", lambda: fused.gather_sum(y, order.row_R, tokens))
    yield case
