"""The float8 products against DeepGEMM, cuBLAS and bf16.

Letters: M rows, N and K as in x [M, K] and w [N, K], G groups. DeepGEMM's products for weight gradients can only add to
what they write to; ours write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
BY_ROWS, BY_BLOCKS = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128

DENSE = (
    *((4096, 2112, 7168), (4096, 24576, 1536), (4096, 32768, 512), (4096, 7168, 16384), (4096, 4096, 7168)),
    *((4096, 7168, 2048), (8192, 1024, 1024), (8192, 4096, 1024), (8192, 2048, 2048), (8192, 8192, 2048)),
    (8192, 2048, 8192),
)
EXPERTS = ((4096, 7168), (7168, 2048))  # gate and up, down of V3
GROUPS = ((8, 512), (8, 1024), (8, 4096), (32, 512), (32, 1024), (32, 4096))
WGRAD = ((4096, 4096, 7168), (4096, 7168, 16384), (4096, 7168, 2048), (8192, 2048, 8192), (8192, 8192, 2048))
WGRAD_GROUPS = ((8, 1024), (8, 4096), (32, 1024))


def deep_gemm() -> Any | None:
    """The peer, if it was built beside the project and stands on the path."""
    try:
        import deep_gemm as module
    except ImportError:
        return None
    return module


def activations(m: int, k: int) -> Tensor:
    """Normal numbers whose blocks differ in magnitude."""
    sizes = torch.exp(torch.randn(m, -(-k // BLOCK), device="cuda")).repeat_interleave(BLOCK, 1)[:, :k]
    return (torch.randn(m, k, device="cuda") * sizes).bfloat16()


def by_rows(x: Tensor) -> Rows:
    rows, _ = quantize.quantize(x, across=False)
    assert rows is not None
    return rows


def by_columns(x: Tensor) -> Rows:
    _, across = quantize.quantize(x, rows=False)
    assert across is not None
    return across


def parts(x: Rows, rows: slice) -> Rows:
    """Some of the rows."""
    return Rows(x.codes[rows], x.scales[:, rows])


def against_bf16(case: Case, call: Callable[[], Any]) -> dict[str, Any]:
    """Ours beside the same product of the unquantised operands, which is another result."""
    other = Case(f"{case.name} against bf16", case.metric, case.work)
    other.moved = case.moved
    other.candidates = [case.candidates[0]]
    other.add("bf16", call)
    return other.run()


def dense() -> Iterator[dict[str, Any]]:
    for m, n, k in DENSE:
        yield from _dense(m, n, k)


def _dense(m: int, n: int, k: int) -> Iterator[dict[str, Any]]:
    peer = deep_gemm()
    x, w = activations(m, k), (torch.randn(n, k, device="cuda") * 0.02).bfloat16()
    rows, weight = by_rows(x), quantize.quantize_weight(w).forward
    y = torch.empty(m, n, dtype=BF16, device="cuda")
    case = Case(f"dense {m}x{n}x{k}", "TFLOP/s", 2.0 * m * n * k, rows_of(rows) @ blocks_of(weight).T, BF16_ERROR)
    case.moved = m * k + n * k + 2.0 * m * n
    case.add("ours", lambda: hopper.gemm(rows, weight, BF16))
    if peer:
        case.add("deepgemm", lambda: peer.fp8_gemm_nt((rows.codes, rows.scales.T), weight, y), y)
    wide = F.pad(weight.scales, (0, -weight.scales.shape[1] % 4)).T  # rows of whole 16 bytes, as cuBLAS wants them
    operands = rows.codes, weight.codes.T, rows.scales.T, BY_ROWS, wide, BY_BLOCKS
    case.add("cublas_block", lambda: F.scaled_mm(*operands, output_dtype=BF16))
    yield case.run()
    yield against_bf16(case, lambda: torch.mm(x, w.T, out=y))


def uneven() -> list[int]:
    """Rows of 32 groups, some 32k in all, the largest many times the smallest, two of them empty."""
    shares = torch.rand(32, generator=torch.Generator().manual_seed(0)) ** 2
    rows = (shares / shares.sum() * 32768 / BLOCK).round().int().mul(BLOCK).tolist()
    return [0 if number in (5, 20) else rows[number] for number in range(32)]


def grouped() -> Iterator[dict[str, Any]]:
    sizes = [(f"G{g} m{m}", [m] * g) for g, m in GROUPS] + [("G32 uneven", uneven())]
    for n, k in EXPERTS:
        for name, rows_G in sizes:
            yield from _grouped(name, rows_G, n, k)


def _grouped(name: str, rows_G: list[int], n: int, k: int) -> Iterator[dict[str, Any]]:
    peer, m, g = deep_gemm(), sum(rows_G), len(rows_G)
    x, w = activations(m, k), torch.empty(g, n, k, dtype=BF16, device="cuda").normal_(0.0, 0.02)
    rows, weight = by_rows(x), quantize.quantize_weight(w).forward
    counts = torch.tensor(rows_G, device="cuda")
    group_M = torch.repeat_interleave(torch.arange(g, device="cuda", dtype=torch.int32), counts)
    expert, tiles = group_M[::BLOCK].contiguous(), torch.tensor([m // BLOCK], device="cuda", dtype=torch.int32)
    last = max(number for number in range(g) if rows_G[number])
    tail = slice(m - rows_G[last], m)
    exact = rows_of(parts(rows, tail)) @ blocks_of(Blocks(weight.codes[last], weight.scales[last])).T
    case = Case(f"grouped {name} {n}x{k}", "TFLOP/s", 2.0 * m * n * k, exact, BF16_ERROR, lambda y: y[tail])
    case.moved = m * k + sum(map(bool, rows_G)) * n * k + 2.0 * m * n
    case.add("ours", lambda: hopper.grouped_gemm(rows, weight, expert, tiles, BF16))
    if peer:
        y, a = torch.empty(m, n, dtype=BF16, device="cuda"), (rows.codes, rows.scales.T)
        case.add("deepgemm", lambda: peer.m_grouped_fp8_gemm_nt_contiguous(a, weight, y, group_M), y)
    yield case.run()
    ends = counts.cumsum(0).to(torch.int32)
    yield against_bf16(case, lambda: F.grouped_mm(x, w.transpose(1, 2), offs=ends))


def wgrad() -> Iterator[dict[str, Any]]:
    for n, k, m in WGRAD:
        yield _wgrad(n, k, m)
    for g, each in WGRAD_GROUPS:
        for n, k in EXPERTS:
            yield _grouped_wgrad(g, each, n, k)


def _wgrad(n: int, k: int, m: int) -> dict[str, Any]:
    peer, y, x = deep_gemm(), by_columns(activations(m, n)), by_columns(activations(m, k))
    case = Case(f"wgrad {n}x{k}x{m}", "TFLOP/s", 2.0 * m * n * k, rows_of(y) @ rows_of(x).T, FP32_ERROR)
    case.moved = m * k + m * n + 4.0 * n * k
    case.add("ours", lambda: hopper.wgrad(y, x, FP32))
    operands = y.codes, x.codes.T, y.scales.T, BY_ROWS, x.scales.T, BY_ROWS
    case.add("cublas_block", lambda: F.scaled_mm(*operands, output_dtype=FP32))
    if peer:
        out, a, b = torch.zeros(n, k, device="cuda"), (y.codes, y.scales.T), (x.codes, x.scales.T)
        case.add("deepgemm", lambda: peer.fp8_gemm_nt(a, b, out, c=out, recipe=(1, 1, 128)), out, adds=True)
    return case.run()


def _grouped_wgrad(g: int, each: int, n: int, k: int) -> dict[str, Any]:
    peer, m = deep_gemm(), g * each
    y, x = by_columns(activations(m, n)), by_columns(activations(m, k))
    ends = (torch.arange(1, g + 1, device="cuda") * each).to(torch.int32)
    last, blocks = slice(m - each, m), slice((m - each) // BLOCK, m // BLOCK)
    exact = rows_of(Rows(y.codes[:, last], y.scales[blocks])) @ rows_of(Rows(x.codes[:, last], x.scales[blocks])).T
    case = Case(f"wgrad G{g} m{each} {n}x{k}", "TFLOP/s", 2.0 * m * n * k, exact, FP32_ERROR, lambda w: w[-1])
    case.moved = m * k + m * n + 4.0 * g * n * k
    case.add("ours", lambda: hopper.grouped_wgrad(y, x, ends, FP32))
    if peer:
        a, b = (_group_by_group(y, each), y.scales.T), (_group_by_group(x, each), x.scales.T)
        out, counts = torch.zeros(g, n, k, device="cuda"), torch.full((g,), each, dtype=torch.int32, device="cuda")
        wanted = a, b, out, [each] * g, counts, out
        case.add("deepgemm", lambda: peer.k_grouped_fp8_gemm_nt_contiguous(*wanted), out, adds=True)
    return case.run()


def _group_by_group(x: Rows, each: int) -> Tensor:
    """Codes [K, M] as DeepGEMM wants them: each group's [K, M_g] behind the last's."""
    groups = x.codes.view(torch.uint8).split(each, 1)
    return torch.cat([group.flatten() for group in groups]).view(x.codes.dtype)


AREAS = {"dense": dense, "grouped": grouped, "wgrad": wgrad}
