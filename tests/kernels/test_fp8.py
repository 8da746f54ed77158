"""Float8: the kernels under Triton's interpreter, and the layers built on them against exact ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import fp8
from kernels.fp8 import reference
from kernels.grouped import layout


def test_every_float8_kernel_equals_its_reference_under_the_interpreter():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpret_fp8.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours - exact).norm() / exact.norm()).item()


def quantized(weight: torch.Tensor, power_of_two: bool = False) -> fp8.Weight:
    return reference.quantize_weight(weight.detach(), power_of_two)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantising_costs_what_three_mantissa_bits_cost(power_of_two: bool):
    torch.manual_seed(0)
    x = torch.randn(384, 512)
    for values in (
        reference.rows_of(reference.quantize_rows(x, power_of_two)),
        reference.rows_of(reference.quantize_across(x, power_of_two)).T,
        reference.blocks_of(reference.quantize_weight(x, power_of_two).forward),
        reference.blocks_of(reference.quantize_weight(x, power_of_two).backward).T,
    ):
        assert 0.024 < relative(values, x) < 0.029
    if power_of_two:
        exponents = reference.quantize_rows(x, True).scales.log2()
        assert torch.equal(exponents, exponents.round())


def test_a_block_of_zeros_stays_zero_and_the_largest_magnitude_is_kept():
    x = torch.zeros(2, 256)
    x[0, 3], x[1, 200] = 5.0, -1e-4
    back = reference.rows_of(reference.quantize_rows(x))
    assert torch.allclose(back, x, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("shape", [(256, 128, 384), (37, 48, 208)])
def test_a_linear_layer_and_its_gradients_are_those_of_the_quantised_operands(shape: tuple[int, int, int]):
    torch.manual_seed(0)
    m, n, k = shape
    x = torch.randn(m, k, requires_grad=True)
    weight = torch.randn(n, k, requires_grad=True)
    y = fp8.linear(x, weight)
    grad = torch.randn(m, n)
    y.backward(grad)

    w = reference.blocks_of(quantized(weight).forward)
    rows = [reference.rows_of(reference.quantize_rows(t.detach())) for t in (x, grad)]
    across = [reference.rows_of(reference.quantize_across(t.detach())) for t in (x, grad)]
    assert torch.allclose(y, rows[0] @ w.T, rtol=1e-4, atol=1e-4)
    assert torch.allclose(x.grad, rows[1] @ w, rtol=1e-4, atol=1e-4)
    assert torch.allclose(weight.grad, across[1] @ across[0].T, rtol=1e-4, atol=1e-4)
    assert relative(y.detach(), F.linear(x, weight).detach()) < 0.05


def test_a_linear_layer_of_a_norm_is_the_layer_of_the_norms_numbers():
    torch.manual_seed(0)
    inputs = torch.randn(37, 208) * torch.randn(37, 1).exp(), torch.rand(208) + 0.5, torch.randn(48, 208)
    grad = torch.randn(37, 48)

    def run(layer):
        x, gain, weight = (t.clone().requires_grad_() for t in inputs)
        y = layer(x, gain, weight)
        return [y, *torch.autograd.grad(y, (x, gain, weight), grad)]

    ours = run(lambda x, gain, weight: fp8.norm_linear(x, gain, 1e-6, weight))
    exact = run(lambda x, gain, weight: fp8.linear(kernels.rms_norm(x, gain, 1e-6), weight))
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
    x, gain, weight = inputs
    with torch.no_grad():  # nothing is kept
        assert torch.equal(fp8.norm_linear(x, gain, 1e-6, weight), ours[0])


def test_a_swiglu_layer_is_near_the_exact_one_forwards_and_backwards():
    torch.manual_seed(0)
    x, grad = torch.randn(200, 96), torch.randn(200, 96)
    gate_up, down = torch.randn(2 * 144, 96) / 10, torch.randn(96, 144) / 10
    exact = [t.clone().requires_grad_() for t in (x, gate_up, down)]
    F.linear(kernels.swiglu(F.linear(exact[0], exact[1])), exact[2]).backward(grad)
    ours = [t.clone().requires_grad_() for t in (x, gate_up, down)]
    y = fp8.swiglu_linear(*ours)
    y.backward(grad)
    assert relative(y.detach(), F.linear(kernels.swiglu(F.linear(x, gate_up)), down)) < 0.07
    for a, b in zip(ours, exact, strict=True):
        assert relative(a.grad, b.grad) < 0.08


def test_experts_are_near_the_exact_ones_and_an_idle_expert_learns_nothing():
    torch.manual_seed(0)
    n, d, f, e, k = 150, 64, 128, 4, 2
    x, grad = torch.randn(n, d), torch.randn(n, d)
    gate_up, down = torch.randn(e, 2 * f, d) / 8, torch.randn(e, d, f) / 8
    scores = torch.rand(n, e)
    scores[:, 2] = -1.0  # nobody visits expert 2
    gates, indices = scores.topk(k)

    def run(differentiable: bool):
        inputs = [t.clone().requires_grad_() for t in (x, gates, gate_up, down)]
        if differentiable:
            order = layout(indices, e, tile=1)
            rows = kernels.permute(inputs[0], order)
            hidden = kernels.swiglu(
                kernels.grouped_gemm(rows, inputs[2], order), kernels.permute_gates(inputs[1], order)
            )
            y = kernels.unpermute(kernels.grouped_gemm(hidden, inputs[3], order), order, n)
        else:
            y = fp8.experts(*inputs, layout(indices, e, tile=fp8.BLOCK))
        y.backward(grad)
        return [y.detach(), *(t.grad for t in inputs)]

    for name, ours, exact in zip(("y", "x", "gates", "gate_up", "down"), run(False), run(True), strict=True):
        assert relative(ours, exact) < 0.09, name
        if name in ("gate_up", "down"):
            assert (ours[2] == 0).all()


def test_shapes_that_cannot_be_copied_are_refused_by_name():
    weight = torch.randn(24, 40)
    with pytest.raises(ValueError, match=r"weight \[24, 40\].*multiple of 16"):
        fp8.linear(torch.randn(4, 40), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("script", ["interpret_fp8.py", "interpret_fused.py", "interpret_attention.py"])
def test_every_kernel_equals_its_reference_on_the_device(script: str):
    program = [sys.executable, Path(__file__).with_name(script)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=240)  # a hung kernel is killed
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
