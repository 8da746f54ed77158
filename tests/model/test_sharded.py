"""Training in float8 with blocks sharded by FSDP2 is training in float8."""

import pytest
import torch

COMPARE = """
    import weakref

    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from kernels import fp8
    from model.checkpointing import Recompute
    from model.config import ModelConfig
    from model.float8 import use_float8
    from model.transformer import Transformer

    CONFIG = ModelConfig(
        **{"vocab_size": 64, "d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 96, "init_std": 0.1},
        **{"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "max_position": 128},
        **{"n_dense_layers": 1, "n_routed_experts": 4, "n_activated_experts": 2, "n_shared_experts": 1},
        **{"moe_d_ff": 32},
    )
    device = torch.device(DEVICE, int(environment["LOCAL_RANK"]) if DEVICE == "cuda" else None)
    if DEVICE == "cuda":
        torch.cuda.set_device(device)
    made, quantizer = [], fp8.quantizer(device)
    quantize_weight = quantizer.quantize_weight

    def spied(weight, **options):
        form = quantize_weight(weight, **options)
        made.append(weakref.ref(form.backward.codes))
        return form

    quantizer.quantize_weight = spied

    def trained(reshard=None, recompute=(), late=False):
        '''Losses of three steps, weights, and how many quantised weights lived between forward and backward.'''
        torch.manual_seed(0)
        model, recompute = Transformer(CONFIG).to(device), Recompute(recompute)
        if DEVICE == "cuda":
            model.round_weights()
        recompute.attach(model)
        if not late:
            use_float8(model)
        if reshard is not None:
            # A group has one precision: what stays in fp32 beside bf16 weights stays whole.
            low = {weight.dtype for weight in model.parameters()} == {torch.bfloat16, torch.float32}
            whole = {weight for weight in model.parameters() if low and weight.dtype == torch.float32}
            for block in model.blocks:
                fully_shard(block, reshard_after_forward=reshard, ignored_params=whole)
            fully_shard(model, ignored_params=whole)
        # Not Adam: it makes the rounding of a shard's odd end visible where a gradient is next to nothing.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        if late:  # once weights lie gathered
            model(torch.zeros(1, 4, dtype=torch.int64, device=device))
            use_float8(model)
        losses = []
        for step in range(3):
            tokens_BT = torch.randint(64, (2, 25), generator=torch.Generator().manual_seed(step)).to(device)
            made.clear()
            with recompute.tape():
                loss = -model(tokens_BT[:, :-1]).log_probs(tokens_BT[:, 1:]).mean()
            alive = sum(codes() is not None for codes in made)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        weights = [weight.detach() for weight in model.parameters()]
        gathered = [(each.full_tensor() if isinstance(each, DTensor) else each).clone() for each in weights]
        return losses, gathered, alive

    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    losses, weights, alive = trained()
    assert alive == len(made) == 12, "a weight that is not sharded is quantised once a step"
    for options in OPTIONS:
        sharded_losses, sharded_weights, alive = trained(**options)
        assert sharded_losses == losses, (options, sharded_losses, losses)
        assert all(map(torch.equal, sharded_weights, weights)), options
        assert alive == 0 and len(made) >= 24, "what is made of a gathered weight goes with it, and is made again"
    dist.destroy_process_group()
"""


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_three_steps_of_a_sharded_model_are_those_of_the_whole_to_the_bit(run_ranks, device):
    recomputed = (["rms_norm", "mla_up", "swiglu"], ["block"])
    options = [{"reshard": False}, {"reshard": False, "late": True}, *({"recompute": names} for names in recomputed)]
    run_ranks(COMPARE, DEVICE=device, OPTIONS=[{"reshard": True} | each for each in ({}, *options)])
