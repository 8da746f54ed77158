"""What the model takes from `kernels` stands in a compiled program, forwards and backwards, without a graph break."""

from functools import partial

import pytest
import torch

import kernels
from kernels import fp8
from kernels.fp8 import passes


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), requires_grad=True)


CASES = {
    "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-6), (2, 5, 64), (64,)),
    "add_rms_norm": (lambda x, y, w: torch.cat(kernels.add_rms_norm(x, y, w, 1e-6)), (5, 64), (5, 64), (64,)),
    "swiglu": (kernels.swiglu, (2, 5, 64)),
    "swiglu of gated rows": (kernels.swiglu, (10, 64), (10,)),
    "apply_rope": (lambda x: kernels.apply_rope(x, torch.ones(5, 1, 8), torch.ones(5, 1, 8)), (2, 5, 3, 64)),
    "keys_and_values": (lambda up, key: torch.cat(kernels.keys_and_values(up, key, 16), -1), (2, 5, 3, 40), (2, 5, 8)),
    "linear_log_probs": (lambda x, w: kernels.linear_log_probs(x, w, torch.arange(10)), (10, 32), (64, 32)),
    "linear_cross_entropy": (lambda x, w: kernels.linear_cross_entropy(x, w, torch.arange(10)), (10, 32), (64, 32)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_operation_compiles_whole_and_keeps_its_gradients(case):
    operation, *shapes = case
    inputs = [leaf(*shape) for shape in shapes]
    results = []
    for called in (operation, torch.compile(operation, backend="aot_eager", fullgraph=True)):
        y = called(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tokens", [37, 128])
def test_a_float8_pass_returns_what_its_fake_says(tokens, device):
    """Strides too: where rows of codes are padded, 37 tokens tell."""
    check = partial(torch.library.opcheck, test_utils="test_faketensor")
    operators, n_experts = torch.ops.fathom, 4
    x, grad, up, down = (leaf(*s).to(device, torch.bfloat16) for s in ((tokens, 64), (tokens, 96), (96, 64), (64, 48)))
    gates, indices = leaf(tokens, n_experts).to(device).sigmoid().topk(2)
    order = passes.Order.of(kernels.layout(indices, n_experts, fp8.BLOCK))
    cases = [((up, down), None, ()), ([weight.repeat(n_experts, 1, 1) for weight in (up, down)], gates, order)]
    with torch.no_grad():
        for keep in (False, True):
            check(operators.fp8_linear, (x, up, False, keep))
            check(operators.fp8_norm_linear, (x, leaf(64).to(device), 1e-6, up, False, keep))
            for weights, gates_NK, rows in cases:
                check(operators.fp8_swiglu, (x, *weights, gates_NK, rows, False, keep))
        check(operators.fp8_linear_backward, (grad, up, passes.linear(x, up, False, True)[1:], False))
        for weights, gates_NK, rows in cases:
            kept = passes.swiglu(x, *weights, gates_NK, rows, False, True)[1:]
            check(operators.fp8_swiglu_backward, (x, *weights, kept, rows, False))
