"""What runs under inference mode computes what the reference defines."""

import pytest
import torch

import kernels
from kernels import inference, reference


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bare_operations_are_the_reference(dtype):
    x_ND, weight_D, scale_N = torch.randn(7, 24, dtype=dtype), torch.randn(24), torch.rand(7)
    cos_NR2, sin_NR2 = torch.randn(2, 7, 4, dtype=dtype)
    pairs = {
        "rms_norm": [one.rms_norm(x_ND, weight_D, 1e-6) for one in (inference, reference)],
        "swiglu": [one.swiglu(x_ND) for one in (inference, reference)],
        "swiglu scaled": [one.swiglu(x_ND, scale_N) for one in (inference, reference)],
        "rope": [one.apply_rope(x_ND, cos_NR2, sin_NR2) for one in (inference, reference)],
        "rope of all": [one.apply_rope(x_ND[:, -8:], cos_NR2, sin_NR2) for one in (inference, reference)],
    }
    for name, (ours, expected) in pairs.items():
        assert ours.dtype == dtype, name
        torch.testing.assert_close(ours, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_inference_mode_takes_the_bare_operations_and_leaves_the_input_alone():
    x_ND, gate_up_E2FD, down_EDF = torch.randn(9, 16), torch.randn(5, 16, 16), torch.randn(5, 16, 8)
    before_ND = x_ND.clone()
    gates_NK, indices_NK = torch.rand(9, 5).topk(2)
    expected_ND = reference.routed_experts(x_ND, gates_NK, indices_NK, gate_up_E2FD, down_EDF)
    with torch.inference_mode():
        y_ND = kernels.routed_experts(x_ND, gates_NK, indices_NK, gate_up_E2FD, down_EDF)
        assert torch.equal(kernels.swiglu(x_ND), inference.swiglu(x_ND))
    torch.testing.assert_close(y_ND, expected_ND)
    assert torch.equal(x_ND, before_ND)


def test_an_expert_that_no_token_visits_changes_nothing():
    x_ND, gate_up_E2FD, down_EDF = torch.randn(3, 16), torch.randn(6, 16, 16), torch.randn(6, 16, 8)
    indices_NK = torch.tensor([[4, 1], [1, 4], [4, 1]])
    gates_NK = torch.rand(3, 2)
    expected_ND = reference.routed_experts(x_ND, gates_NK, indices_NK, gate_up_E2FD, down_EDF)
    with torch.inference_mode():
        y_ND = kernels.routed_experts(x_ND, gates_NK, indices_NK, gate_up_E2FD, down_EDF)
    torch.testing.assert_close(y_ND, expected_ND)
