"""`kernels.fp8` against its plain-torch reference, as a program: on CUDA as it is, on a CPU under TRITON_INTERPRET=1.

Every block of the inputs has a magnitude of its own, from 1e-9 to 1e6 among them, one block is zero, sizes are ragged,
experts may be empty, and what a kernel writes into is NaN before.
"""

import sys

import torch

from kernels import eager
from kernels.fp8 import portable, quantize, reference
from kernels.fp8.formats import BLOCK, FLOAT8

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Of the worst block. The tensor core sums 128 products in 14 bits; the interpreter truncates fp32 to bf16.
TOLERANCE = {torch.float32: 6e-4, torch.bfloat16: 2.5e-3 if CUDA else 6e-3}


def poisoned(size, *others, **options):
    """`torch.empty` for the kernels' outputs, full of NaN."""
    out = EMPTY(size, *others, **options)
    return out.view(torch.uint8).fill_(0x7F).view(out.dtype) if out.dtype == FLOAT8 else out.fill_(float("nan"))


EMPTY = torch.empty


def blocks_of_all_sizes(m, k, dtype=torch.float32):
    """[m, k] with blocks of 128 × 128 between 1e-9 and 1e6 in magnitude, rows apart by up to e³, one block of zeros."""
    down, along = -(-m // BLOCK), -(-k // BLOCK)
    sizes = torch.exp(torch.randn(down, along, device=DEVICE))
    sizes.view(-1)[0], sizes.view(-1)[-1] = 1e6, 1e-9
    if sizes.numel() > 2:
        sizes.view(-1)[1] = 0.0
    wide = sizes.repeat_interleave(BLOCK, 0)[:m].repeat_interleave(BLOCK, 1)[:, :k]
    return (torch.randn(m, k, device=DEVICE) * torch.randn(m, 1, device=DEVICE).exp() * wide).to(dtype)


def close(name, ours, theirs):
    """Block by block of 128 × 128, so that a large one hides no small one; returns the worst."""
    apart, size = (norms(x.double()) for x in (ours - theirs, theirs))
    error = (apart / size.clamp(min=1e-30)).max().item()
    print(f"{name:60s} {ours.dtype!s:16s} relative error {error:.1e}")
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (name, ours.shape, theirs.shape)
    assert error <= TOLERANCE[ours.dtype], (name, error)


def norms(x):
    """Of every block of the last two dimensions."""
    x = torch.nn.functional.pad(x.view(1, -1) if x.ndim == 1 else x, (0, -x.shape[-1] % BLOCK))
    x = x.unflatten(-1, (-1, BLOCK)).square().sum(-1)
    return torch.nn.functional.pad(x.mT, (0, -x.shape[-2] % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1).sqrt()


def same_codes(name, ours, theirs, scales_differ=0.0):
    assert ours.codes.shape == theirs.codes.shape and ours.scales.shape == theirs.scales.shape, name
    apart = ((ours.scales - theirs.scales) / theirs.scales).abs().max().item()
    assert apart <= scales_differ, (name, apart)
    a, b = ours.codes.float(), theirs.codes.float()
    differing = (a != b).float().mean().item()
    print(f"{name:60s} scales apart {apart:.1e}, codes that differ {differing:.1e}")
    assert not a.isnan().any() and differing <= (1e-5 if not scales_differ else 2e-2), (name, differing)
    assert ((a - b).abs() <= 0.126 * b.abs() + 2**-9).all(), f"{name}: a code is off by more than one step"


def quantization():
    for power_of_two in (False, True):
        for m, k in [(256, 384), (130, 208), (7, 16), (391, 128)]:
            for dtype in (torch.float32, torch.bfloat16):
                x = blocks_of_all_sizes(m, k, dtype)
                rows, across = quantize.quantize(x, power_of_two=power_of_two)
                same_codes(f"rows of {m} x {k} {dtype}", rows, reference.quantize_rows(x, power_of_two))
                same_codes(f"across {m} x {k} {dtype}", across, reference.quantize_across(x, power_of_two))
                assert rows.codes.stride(0) % 16 == 0 and across.codes.stride(0) % 16 == 0
                padding = across.codes.as_strided((k, across.codes.stride(0)), across.codes.stride())[:, m:]
                assert (padding.float() == 0).all(), "padding of codes is read by products: it must be zero"
        for shape in [(256, 128), (200, 144), (3, 130, 272)]:
            w = (
                torch.stack([blocks_of_all_sizes(*shape[-2:]) for _ in range(3)])
                if len(shape) == 3
                else (blocks_of_all_sizes(*shape))
            )
            ours, theirs = quantize.quantize_weight(w, power_of_two), reference.quantize_weight(w, power_of_two)
            same_codes(f"weight {shape}", ours.forward, theirs.forward)
            same_codes(f"weight {shape} transposed", ours.backward, theirs.backward)


def gathers():
    x, source = blocks_of_all_sizes(50, 144), torch.randint(-1, 50, (256,), device=DEVICE)
    source[128:] = -1  # a tile of padding alone
    rows, across = quantize.quantize(x, source)
    exact = reference.gathered(x, source)
    same_codes("gathered rows", rows, reference.quantize_rows(exact))
    same_codes("gathered across", across, reference.quantize_across(exact))
    assert quantize.quantize(x, rows=False)[0] is None and quantize.quantize(x, across=False)[1] is None


def norms_of_rows():
    for m, k in [(130, 208), (256, 384), (3, 16)]:
        for dtype in (torch.float32, torch.bfloat16):
            x, gain = blocks_of_all_sizes(m, k, dtype), torch.rand(k, device=DEVICE) + 0.5
            rstd = eager.reciprocal_rms(x, 1e-6).squeeze(1)
            exact = x.float() * rstd[:, None] * gain
            rows, across = quantize.norm_quantize(x, rstd, gain)
            same_codes(f"norm {m} x {k} {dtype}", rows, reference.quantize_rows(exact), 1e-6)
            same_codes(f"norm {m} x {k} {dtype} across", across, reference.quantize_across(exact), 1e-6)
            (alone, none) = quantize.norm_quantize(x, rstd, gain, across=False)
            same_codes(f"norm {m} x {k} {dtype} rows alone", alone, reference.quantize_rows(exact), 1e-6)
            assert none is None


def swiglu():
    for m, f in [(130, 128), (256, 384), (5, 144)]:
        x, gates = torch.randn(m, 2 * f, device=DEVICE) * 3, torch.rand(m, device=DEVICE)
        grad = torch.randn(m, f, device=DEVICE)
        for gate in (None, gates):
            exact = torch.nn.functional.silu(x[:, :f]) * x[:, f:] * (1 if gate is None else gate[:, None])
            rows, across = quantize.swiglu_quantize(x, gate)
            same_codes(f"swiglu {m} x {f}", rows, reference.quantize_rows(exact), 1e-5)
            same_codes(f"swiglu {m} x {f} across", across, reference.quantize_across(exact), 1e-5)
            exact, exact_gates = eager.swiglu_backward(grad, x, gate)
            rows, across, grad_gates = quantize.swiglu_backward_quantize(grad, x, gate)
            same_codes(f"swiglu gradient {m} x {f}", rows, reference.quantize_rows(exact), 1e-5)
            same_codes(f"swiglu gradient {m} x {f} across", across, reference.quantize_across(exact), 1e-5)
            if gate is not None:
                close(f"gradient of gates {m}", grad_gates, exact_gates)


def products(module):
    name = module.__name__
    for m, n, k in [(128, 128, 128), (200, 144, 384), (70, 392, 208), (1, 16, 16), (257, 320, 256)]:
        x, w = blocks_of_all_sizes(m, k), blocks_of_all_sizes(n, k)
        rows, weight = reference.quantize_rows(x), reference.quantize_weight(w).forward
        for dtype in (torch.bfloat16,) if "hopper" in name else (torch.bfloat16, torch.float32):
            close(f"{name} gemm {m} {n} {k}", module.gemm(rows, weight, dtype), reference.gemm(rows, weight, dtype))
    for m, n, k in [(256, 128, 128), (300, 144, 208), (1000, 16, 144)]:
        y, x = (reference.quantize_across(blocks_of_all_sizes(m, width)) for width in (n, k))
        for dtype in (torch.bfloat16, torch.float32):
            close(f"{name} wgrad {m} {n} {k}", module.wgrad(y, x, dtype), reference.wgrad(y, x, dtype))


def grouped_products(module):
    name = module.__name__
    for counts, n, k in [([1, 0, 2, 3], 144, 256), ([0, 0, 5], 128, 128), ([2, 2, 0], 272, 400)]:
        ends = (torch.tensor(counts, device=DEVICE) * BLOCK).cumsum(0).to(torch.int32)
        used, rows = sum(counts), (sum(counts) + 2) * BLOCK  # two tiles behind the last are nobody's
        expert = torch.searchsorted(ends, torch.arange(rows // BLOCK, device=DEVICE) * BLOCK, right=True)
        expert = expert.clamp_max(len(counts) - 1).to(torch.int32)
        x, w = blocks_of_all_sizes(rows, k), torch.stack([blocks_of_all_sizes(n, k) for _ in counts])
        q, weight = reference.quantize_rows(x), reference.quantize_weight(w).forward
        ours = module.grouped_gemm(q, weight, expert, ends[-1:] // BLOCK, torch.bfloat16)[: used * BLOCK]
        exact = reference.grouped_gemm(q, weight, expert, ends[-1:] // BLOCK, torch.bfloat16)[: used * BLOCK]
        close(f"{name} grouped gemm {counts} {n} {k}", ours, exact)
        y, x = (reference.quantize_across(blocks_of_all_sizes(rows, width)) for width in (n, k))
        for dtype in (torch.bfloat16, torch.float32):
            ours, exact = module.grouped_wgrad(y, x, ends, dtype), reference.grouped_wgrad(y, x, ends, dtype)
            close(f"{name} grouped wgrad {counts} {n} {k}", ours, exact)
            assert all((ours[e] == 0).all() for e, count in enumerate(counts) if not count), "an idle expert's gradient"


def main():
    torch.empty = poisoned
    modules = [portable]
    if CUDA and torch.cuda.get_device_capability() == (9, 0):
        from kernels.fp8 import hopper

        modules.append(hopper)
    hopper = quantize.is_hopper
    for name, choose in (("as dispatched", hopper), ("plain Triton", lambda device: False)):
        print(f"quantisation, {name}")
        quantize.is_hopper = choose
        for case in (quantization, gathers, norms_of_rows, swiglu):
            torch.manual_seed(0)
            case()
        if not CUDA:
            break
    quantize.is_hopper = hopper
    for module in modules:
        torch.manual_seed(0)
        products(module)
        grouped_products(module)


if __name__ == "__main__":
    sys.exit(main())
