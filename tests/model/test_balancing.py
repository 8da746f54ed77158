"""Each way of balancing, in a run of 50 steps on skewed tokens, against the same run without it."""

from functools import cache

import pytest
import torch
from torch import Tensor

from model.balance import BalanceWeights
from model.config import ModelConfig
from model.optimizer import build_optimizer
from model.router import update_routing_bias
from model.transformer import Transformer

STEPS, BATCH, LENGTH, VOCABULARY = 50, 8, 32, 64
NOTHING = BalanceWeights()
MOE = {"n_activated_experts": 2, "score_function": "softmax"}
V2 = {"n_activated_experts": 3, "score_function": "softmax", "n_groups": 4, "n_limited_groups": 2}


@cache
def text() -> Tensor:
    """[steps, B, T + 1] tokens of a Markov chain whose every next token is Zipf-distributed."""
    generator = torch.Generator().manual_seed(0)
    zipf_V = 1 / torch.arange(1, VOCABULARY + 1)
    table_VV = torch.stack([zipf_V[torch.randperm(VOCABULARY, generator=generator)] for _ in range(VOCABULARY)])
    rows = [torch.multinomial(zipf_V, STEPS * BATCH, replacement=True, generator=generator)]
    for _ in range(LENGTH):
        rows.append(torch.multinomial(table_VV[rows[-1]], 1, generator=generator)[:, 0])
    return torch.stack(rows, dim=1).view(STEPS, BATCH, LENGTH + 1)


@cache
def load_after(changes: tuple[tuple[str, object], ...], weights: BalanceWeights, gamma: float) -> Tensor:
    """[L, E] tokens per expert in the last ten steps."""
    torch.manual_seed(0)
    config = ModelConfig(
        **{"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 2, "init_std": 0.1},
        **{"n_routed_experts": 8, "n_shared_experts": 1, "moe_d_ff": 16},
        **dict(changes),
    )
    model = Transformer(config)
    optimizer = build_optimizer(model, learning_rate=5e-3)
    loads = []
    for tokens_BT in text():
        out = model(tokens_BT[:, :-1])
        loss = -out.log_probs(tokens_BT[:, 1:]).mean() + out.balance_loss(weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if gamma:
            update_routing_bias(model, out.load_LE, gamma)
        loads.append(out.load_LE)
    return torch.stack(loads[-10:]).sum(0).float()


def max_violation(load_LX: Tensor) -> float:
    mean_L = load_LX.mean(-1)
    return float(((load_LX.amax(-1) - mean_L) / mean_L).mean())


@pytest.mark.parametrize(
    ("model", "weights", "gamma", "groups"),
    [
        pytest.param({"n_activated_experts": 2}, NOTHING, 0.01, 8, id="V3: bias"),
        pytest.param({"n_activated_experts": 2}, BalanceWeights(0.01), 0.0, 8, id="V3: sequence-wise loss"),
        pytest.param(MOE, BalanceWeights(0.03), 0.0, 8, id="DeepSeekMoE: expert-level loss"),
        pytest.param(V2, BalanceWeights(device=0.05), 0.0, 4, id="V2: device-level loss"),
        pytest.param(V2, BalanceWeights(communication=0.02), 0.0, 4, id="V2: communication loss"),
        pytest.param(V2, BalanceWeights(0.003, 0.05, 0.02), 0.0, 8, id="V2: all three"),
        pytest.param({"router": "gshard", "n_activated_experts": 2}, BalanceWeights(0.01), 0.0, 8, id="GShard"),
        pytest.param({"router": "switch", "n_activated_experts": 1}, BalanceWeights(0.01), 0.0, 8, id="Switch"),
    ],
)
def test_balancing_evens_the_load(model, weights, gamma, groups):
    """MaxVio over experts, or over devices for what balances those."""
    changes = tuple(model.items())
    without, balanced = (
        max_violation(load_after(changes, *how).unflatten(-1, (groups, -1)).sum(-1))
        for how in ((NOTHING, 0.0), (weights, gamma))
    )
    print(f"MaxVio {without:.3f} without, {balanced:.3f} with")
    assert balanced < 0.7 * without
