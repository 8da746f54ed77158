"""The optimiser against torch's own, in both precisions, and what its state keeps."""

import copy

import pytest
import torch

import kernels
from model.config import ModelConfig
from model.optimizer import build_optimizer
from model.transformer import Transformer

# Gates stay fp32 beside bf16 experts, so one group holds both.
TINY = ModelConfig(
    **{"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48},
    **{"n_routed_experts": 4, "n_activated_experts": 2, "moe_d_ff": 16},
)


def steps(model, optimizer, count, first=0, scale=1.0):
    """Steps on gradients that depend on their number alone."""
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step(scale) if scale != 1 else optimizer.step()


def test_splitting_a_master_loses_no_bit_and_rounds_to_the_nearest():
    special = torch.tensor([0.0, -0.0, 1.0, 1.00390625, -1.00390625, 3e38, 1e-40, torch.inf, -torch.inf])
    master = torch.cat([torch.randn(1000), torch.randn(1000) * 1e-20, special])
    high, low = kernels.split_master(master)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(kernels.join_master(high, low).view(torch.int32), master.view(torch.int32))
    finite = master[master.abs() < 3e38]
    error = (kernels.split_master(finite)[0].float() - finite).abs()
    assert (error <= (finite.to(torch.bfloat16).float() - finite).abs()).all()


def test_fp32_steps_equal_torchs():
    torch.manual_seed(0)
    ours, theirs = (Transformer(TINY) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, 1e-2)
    groups = [{"params": [p for p in theirs.parameters() if (p.ndim < 2) == flat]} for flat in (False, True)]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1, 0.0
    expected = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    steps(ours, optimizer, 5)
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        for weight in theirs.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        expected.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_split_weights_follow_fp32_masters_as_if_they_had_never_been_rounded(moments):
    torch.manual_seed(0)
    whole, halved = Transformer(TINY), Transformer(TINY)
    halved.load_state_dict(whole.state_dict())
    start = [p.detach().clone() for p in whole.parameters()]
    optimizers = [
        build_optimizer(whole, 1e-4, moment_dtype=moments),
        build_optimizer(halved, 1e-4, moment_dtype=moments, split=halved.low_precision_weights()),
    ]
    assert halved.embedding.weight.dtype == torch.bfloat16 and halved.norm.weight.dtype == torch.float32
    for number in range(20):
        for model, optimizer in zip((whole, halved), optimizers, strict=True):
            generator = torch.Generator().manual_seed(number)
            for weight in model.parameters():
                weight.grad = torch.randn(weight.shape, generator=generator).to(torch.bfloat16).to(weight.dtype)
            optimizer.step(0.5)
    optimizers[1].join()
    for a, b, before in zip(whole.parameters(), halved.parameters(), start, strict=True):
        assert b.dtype == torch.float32
        # Twenty steps of 1e-4 are far below a bf16 weight's resolution; the masters have every one of them.
        torch.testing.assert_close(b - before, a - before, rtol=1e-3, atol=1e-8)


def test_a_loaded_state_goes_on_to_the_same_bits_in_the_same_dtypes():
    torch.manual_seed(0)
    model = Transformer(TINY)
    fresh = copy.deepcopy(model)

    def build(model):
        return build_optimizer(model, 1e-2, moment_dtype=torch.bfloat16, split=model.low_precision_weights())

    optimizer = build(model)
    steps(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, 3, first=3)
    resumed = build(fresh)
    fresh.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    steps(fresh, resumed, 3, first=3)
    optimizer.join(), resumed.join()
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
        assert resumed.state[b]["exp_avg"].dtype == torch.bfloat16


def test_main_grad_comes_before_grad_and_a_weight_without_either_stays():
    torch.manual_seed(0)
    model = Transformer(TINY)
    optimizer = build_optimizer(model, 1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    model.embedding.weight.main_grad = torch.ones_like(model.embedding.weight)
    model.embedding.weight.grad = torch.zeros_like(model.embedding.weight)
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)]
    assert changed == [name == "embedding.weight" for name, _ in model.named_parameters()]
    assert (model.embedding.weight < before[0]).float().mean() > 0.99
