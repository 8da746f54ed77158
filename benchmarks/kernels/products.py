"""The float8 products against DeepGEMM, cuBLAS and bf16. Letters: M rows, N and K as in x [M, K], w [N, K], G groups."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from benchmarks.kernels.timing import Case
from kernels.fp8 import hopper, quantize
from kernels.fp8.formats import BLOCK, Blocks, Rows
from kernels.fp8.reference import blocks_of, rows_of

BF16, FP32 = torch.bfloat16, torch.float32
BF16_ERROR, FP32_ERROR = 2.5e-3, 3e-4

DENSE = (
    *((4096, 2112, 7168), (4096, 24576, 1536), (4096, 32768, 512), (4096, 7168, 16384), (4096, 4096, 7168)),
    *((4096, 7168, 2048), (8192, 1024, 1024), (8192, 4096, 1024), (8192, 2048, 2048), (8192, 8192, 2048)),
    (8192, 2048, 8192),
)
EXPERTS = ((4096, 7168), (7168, 2048))  # gate and up, down of V3
GROUPS = ((8, 512), (8, 1024), (8, 4096), (32, 512), (32, 1024), (32, 4096))
WGRAD = ((4096, 4096, 7168), (4096, 7168, 16384), (4096, 7168, 2048), (8192, 2048, 8192), (8192, 8192, 2048))
WGRAD_GROUPS = ((8, 1024), (8, 4096), (32, 1024))


def activations(m: int, k: int) -> Tensor:
    """Normal numbers whose blocks differ in magnitude."""
    sizes = torch.exp(torch.randn(m, -(-k // BLOCK), device="cuda")).repeat_interleave(BLOCK, 1)[:, :k]
    return (torch.randn(m, k, device="cuda") * sizes).bfloat16()


def deep_gemm() -> Any | None:
    """The peer, if it was built beside the project and stands on the path."""
    try:
        import deep_gemm as module
    except ImportError:
        return None
    return module


def _wide(scales: Tensor) -> Tensor:
    """128 × 128 scales with rows of whole 16 bytes, as cuBLAS wants them."""
    return F.pad(scales, (0, -scales.shape[1] % 4))


def dense() -> Iterator[dict[str, Any]]:
    peer = deep_gemm()
    for m, n, k in DENSE:
        x, w = activations(m, k), (torch.randn(n, k, device="cuda") * 0.02).bfloat16()
        rows, weight = quantize.quantize(x, across=False)[0], quantize.quantize_weight(w).forward
        case = Case(f"dense {m}x{n}x{k}", "TFLOP/s", 2.0 * m * n * k, rows_of(rows) @ blocks_of(weight).T, BF16_ERROR)
        case.add("ours", lambda rows=rows, weight=weight: hopper.gemm(rows, weight, BF16))
        y = torch.empty(m, n, dtype=BF16, device="cuda")
        if peer:
            a, b = (rows.codes, rows.scales.T), (weight.codes, weight.scales)
            case.add("deepgemm", lambda a=a, b=b, y=y: peer.fp8_gemm_nt(a, b, y), y)
        kinds = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        scales = rows.scales.T, _wide(weight.scales).T
        case.add(
            "cublas_block",
            lambda rows=rows, weight=weight, scales=scales: F.scaled_mm(
                rows.codes, weight.codes.T, scales[0], kinds[0], scales[1], kinds[1], output_dtype=BF16
            ),
        )
        yield case.run()
        yield from _bf16(f"dense {m}x{n}x{k} against bf16", case, lambda x=x, w=w, y=y: torch.mm(x, w.T, out=y))


def _bf16(name: str, case: Case, call: Any) -> Iterator[dict[str, Any]]:
    """Ours beside the same product of the unquantised operands, which is another result."""
    other = Case(name, case.metric, case.work)
    other.candidates = [case.candidates[0]]
    other.add("bf16", call)
    yield other.run()


def uneven() -> list[int]:
    """Rows of 32 groups, some 32k in all, the largest many times the smallest, two of them empty."""
    shares = torch.rand(32, generator=torch.Generator().manual_seed(0)) ** 2
    rows = (shares / shares.sum() * 32768 / BLOCK).round().int().mul(BLOCK).tolist()
    return [0 if number in (5, 20) else rows[number] for number in range(32)]


def grouped() -> Iterator[dict[str, Any]]:
    peer = deep_gemm()
    sizes = [(f"G{g} m{m}", [m] * g) for g, m in GROUPS] + [("G32 uneven", uneven())]
    for n, k in EXPERTS:
        for name, rows_G in sizes:
            m, g = sum(rows_G), len(rows_G)
            x, w = activations(m, k), torch.empty(g, n, k, dtype=BF16, device="cuda").normal_(0.0, 0.02)
            rows, weight = quantize.quantize(x, across=False)[0], quantize.quantize_weight(w).forward
            counts = torch.tensor(rows_G, device="cuda")
            of_row = torch.repeat_interleave(torch.arange(g, device="cuda", dtype=torch.int32), counts)
            expert, tiles = of_row[::BLOCK].contiguous(), torch.tensor([m // BLOCK], device="cuda", dtype=torch.int32)
            last = max(number for number in range(g) if rows_G[number])
            tail = slice(m - rows_G[last], m)
            exact = _rows(rows, tail) @ blocks_of(Blocks(weight.codes[last], weight.scales[last])).T
            case = Case(
                f"grouped {name} {n}x{k}", "TFLOP/s", 2.0 * m * n * k, exact, BF16_ERROR, lambda y, t=tail: y[t]
            )
            case.add("ours", lambda a=(rows, weight, expert, tiles): hopper.grouped_gemm(*a, BF16))
            y = torch.empty(m, n, dtype=BF16, device="cuda")
            if peer:
                a, b = (rows.codes, rows.scales.T), (weight.codes, weight.scales)
                case.add(
                    "deepgemm", lambda a=a, b=b, y=y, r=of_row: peer.m_grouped_fp8_gemm_nt_contiguous(a, b, y, r), y
                )
            yield case.run()
            ends = counts.cumsum(0).to(torch.int32)
            yield from _bf16(
                f"{case.name} against bf16", case, lambda x=x, w=w, e=ends: F.grouped_mm(x, w.transpose(1, 2), offs=e)
            )


def _rows(quantized: Rows, rows: slice) -> Tensor:
    return rows_of(Rows(quantized.codes[rows], quantized.scales[:, rows]))


def wgrad() -> Iterator[dict[str, Any]]:
    peer = deep_gemm()
    for n, k, m in WGRAD:
        y, x = (quantize.quantize(activations(m, width), rows=False)[1] for width in (n, k))
        exact = rows_of(y) @ rows_of(x).T
        case = Case(f"wgrad {n}x{k}x{m}", "TFLOP/s", 2.0 * m * n * k, exact, FP32_ERROR)
        case.add("ours", lambda y=y, x=x: hopper.wgrad(y, x, FP32))
        kind = ScalingType.BlockWise1x128
        case.add(
            "cublas_block",
            lambda y=y, x=x: F.scaled_mm(y.codes, x.codes.T, y.scales.T, kind, x.scales.T, kind, output_dtype=FP32),
        )
        if peer:
            out = torch.zeros(n, k, device="cuda")
            a, b = (y.codes, y.scales.T), (x.codes, x.scales.T)
            case.add(
                "deepgemm_adding", lambda a=a, b=b, o=out: peer.fp8_gemm_nt(a, b, o, c=o, recipe=(1, 1, 128)), out, True
            )
        yield case.run()
    for g, each in WGRAD_GROUPS:
        for n, k in EXPERTS:
            yield _grouped_wgrad(peer, g, each, n, k)


def _grouped_wgrad(peer: Any, g: int, each: int, n: int, k: int) -> dict[str, Any]:
    m = g * each
    y, x = (quantize.quantize(activations(m, width), rows=False)[1] for width in (n, k))
    ends = (torch.arange(1, g + 1, device="cuda") * each).to(torch.int32)
    last, blocks = slice(m - each, m), slice((m - each) // BLOCK, m // BLOCK)
    exact = rows_of(Rows(y.codes[:, last], y.scales[blocks])) @ rows_of(Rows(x.codes[:, last], x.scales[blocks])).T
    case = Case(f"wgrad G{g} m{each} {n}x{k}", "TFLOP/s", 2.0 * m * n * k, exact, FP32_ERROR, lambda w: w[-1])
    case.add("ours", lambda: hopper.grouped_wgrad(y, x, ends, FP32))
    if peer:
        flat = [
            torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in q.codes.split(each, 1)]).view(
                q.codes.dtype
            )
            for q in (y, x)
        ]
        out, counts = torch.zeros(g, n, k, device="cuda"), torch.full((g,), each, dtype=torch.int32, device="cuda")
        a, b = (flat[0], y.scales.T), (flat[1], x.scales.T)
        case.add(
            "deepgemm",  # it can only add
            lambda: peer.k_grouped_fp8_gemm_nt_contiguous(a, b, out, [each] * g, counts, out),
            out,
            True,
        )
    return case.run()


AREAS = {"dense": dense, "grouped": grouped, "wgrad": wgrad}

if __name__ == "__main__":
    for area in sys.argv[1:] or AREAS:
        list(AREAS[area]())
