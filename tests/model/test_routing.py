"""Routers, balance losses and dropping against the papers' rules written out token by token, in Python's doubles."""

import math

import pytest
import torch

from infra.errors import ConfigError
from model.balance import BalanceWeights, balance_loss
from model.config import ModelConfig
from model.dropping import kept_rows, spared
from model.exchange.deepseek import to_published
from model.generate import Generator
from model.moe import MoE
from model.router import HashRouter, Router, Routing, build_router, scramble, update_routing_bias
from model.transformer import Transformer

GROUPS = {"n_groups": 4, "n_limited_groups": 2}
ROUTERS = {
    "v3": {"n_activated_experts": 3, **GROUPS, "route_scale": 2.5},
    "v2": {"n_activated_experts": 3, **GROUPS, "route_scale": 16.0, "score_function": "softmax"},
    "moe": {"n_activated_experts": 3, "score_function": "softmax"},
    "gshard": {"n_activated_experts": 2, "router": "gshard"},
    "switch": {"n_activated_experts": 1, "router": "switch"},
    "hash": {"n_activated_experts": 1, "router": "hash"},
}
BATCH, LENGTH, EXPERTS = 3, 20, 8


def config_of(name: str, **changes) -> ModelConfig:
    widths = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 48, "init_std": 0.1}
    experts = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "moe_d_ff": 16}
    return ModelConfig(**{**widths, **experts, **ROUTERS[name], **changes})


def routed(name: str, **changes) -> tuple[ModelConfig, torch.nn.Module, torch.Tensor, torch.Tensor, Routing]:
    """A router with biases, states and tokens, of which the first sequence is spared, and what it makes of them."""
    torch.manual_seed(0)
    config = config_of(name, **changes)
    router = build_router(config)
    if isinstance(router, Router):
        torch.nn.init.normal_(router.weight, std=0.3)
        if config.score_function == "sigmoid":
            router.bias += torch.randn(EXPERTS) * 0.1
    x_ND, pool_NT = torch.randn(BATCH * LENGTH, 32), torch.randint(64, (200, LENGTH))
    tokens_BT = torch.cat([pool_NT[spared(pool_NT)][:1], pool_NT[~spared(pool_NT)][: BATCH - 1]])
    return config, router, x_ND, tokens_BT, router(x_ND, tokens_BT.flatten())


def affinities(config: ModelConfig, weight: list[list[float]], x: list[float]) -> list[float]:
    logits = [sum(w * v for w, v in zip(row, x, strict=True)) for row in weight]
    if config.score_function == "sigmoid":
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def best(values: dict[int, float], count: int) -> list[int]:
    return sorted(values, key=lambda key: -values[key])[:count]


def chosen_by_hand(config: ModelConfig, scores: list[float], bias: list[float]) -> list[int]:
    """V3 equations 13-16 and section 2.1.2; V2 equation 21 and section 2.2.2; the rest is top K."""
    biased = {expert: score + shift for expert, (score, shift) in enumerate(zip(scores, bias, strict=True))}
    size = EXPERTS // config.n_groups
    counted = 2 if config.score_function == "sigmoid" else 1
    groups = {}
    for group in range(config.n_groups):
        members = sorted((biased[expert] for expert in range(group * size, (group + 1) * size)), reverse=True)
        groups[group] = sum(members[:counted])
    allowed = best(groups, config.n_limited_groups)
    return best({e: value for e, value in biased.items() if e // size in allowed}, config.n_activated_experts)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "hash"])
def test_a_learnt_router_chooses_and_weighs_as_the_paper_says(name):
    config, router, x_ND, _, routing = routed(name)
    weight, bias = router.weight.double().tolist(), router.bias.double().tolist()
    for token, x in enumerate(x_ND.double().tolist()):
        scores = affinities(config, weight, x)
        chosen = chosen_by_hand(config, scores, bias)
        gates = [scores[expert] for expert in chosen]
        if name in ("v3", "gshard"):
            gates = [gate / sum(gates) for gate in gates]
        assert routing.indices_NK[token].tolist() == chosen
        assert routing.gates_NK[token].tolist() == pytest.approx([config.route_scale * g for g in gates], rel=1e-5)
        assert routing.scores_NE[token].tolist() == pytest.approx(scores, rel=1e-5)


def murmur(x: int) -> int:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x


def test_a_hash_router_sends_a_token_id_to_one_expert_with_gate_one_and_learns_nothing():
    _, router, _, tokens_BT, routing = routed("hash")
    assert routing.indices_NK[:, 0].tolist() == [murmur(token) % EXPERTS for token in tokens_BT.flatten().tolist()]
    assert routing.gates_NK.unique().tolist() == [1.0]
    assert [*router.parameters(), *router.buffers()] == []
    counts = (scramble(torch.arange(100_000)) % EXPERTS).bincount(minlength=EXPERTS)
    # A multinomial's chi-square: 7 degrees of freedom, beyond 24.3 once in a thousand.
    assert float(((counts - 12_500.0) ** 2 / 12_500).sum()) < 24.3
    assert len(scramble(torch.arange(100_000)).unique()) == 100_000


@pytest.mark.parametrize("name", ROUTERS)
def test_generation_routes_as_the_forward_pass_does(name):
    torch.manual_seed(0)
    model = Transformer(config_of(name)).eval()
    completion = Generator(model).generate([[5, 6, 7], [9]], max_new_tokens=8, temperature=0)
    for prompt, made in zip(([5, 6, 7], [9]), completion, strict=True):
        tokens = torch.tensor([prompt + made.tokens])
        assert model(tokens).logits_BTV[0, len(prompt) - 1 : -1].argmax(-1).tolist() == made.tokens


@pytest.mark.parametrize("name", ["gshard", "switch", "hash"])
def test_a_baseline_has_no_published_layout(name):
    latent = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    with pytest.raises(ConfigError, match="only router='deepseek' has one"):
        to_published(config_of(name, **latent))


def loss_by_hand(config: ModelConfig, routing: Routing, weights: BalanceWeights) -> float:
    """V2 equations 23-31; V3 17-20; Switch equation 4; GShard algorithm 1, lines 3, 11 and 13, times E²."""
    n_groups, size = config.n_groups, EXPERTS // config.n_groups
    total = 0.0
    for sequence in range(BATCH):
        tokens = range(sequence * LENGTH, (sequence + 1) * LENGTH)
        f, p, received = [0.0] * EXPERTS, [0.0] * EXPERTS, [0.0] * n_groups
        for token in tokens:
            scores, chosen = routing.scores_NE[token].double().tolist(), routing.indices_NK[token].tolist()
            for group in {expert // size for expert in chosen}:
                received[group] += n_groups / (config.n_limited_groups * LENGTH)
            if config.score_function == "sigmoid":
                chosen = best(dict(enumerate(scores)), config.n_activated_experts)
                scores = [score / sum(scores) for score in scores]
            if config.router == "gshard":
                chosen = chosen[:1]
            for expert in chosen:
                f[expert] += EXPERTS / (len(chosen) * LENGTH)
            p = [a + b / LENGTH for a, b in zip(p, scores, strict=True)]
        groups = [range(group * size, (group + 1) * size) for group in range(n_groups)]
        total += weights.expert * sum(a * b for a, b in zip(f, p, strict=True))
        total += weights.device * sum(sum(f[e] for e in g) / size * sum(p[e] for e in g) for g in groups)
        total += weights.communication * sum(received[i] * sum(p[e] for e in g) for i, g in enumerate(groups))
    return total / BATCH


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.003, 0.05, 0.02)])
@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "hash"])
def test_balance_losses_are_the_papers_sums(name, weights):
    config, router, _, _, routing = routed(name)
    weights = BalanceWeights(*weights)
    loss = balance_loss(config, routing, BATCH, weights)
    assert loss.item() == pytest.approx(loss_by_hand(config, routing, weights), rel=1e-5)
    if weights.expert:
        loss.backward()
        assert router.weight.grad.abs().sum() > 0


def test_v3_counts_the_choice_without_its_bias():
    config, router, x_ND, tokens_BT, routing = routed("v3")
    router.bias.zero_()
    router.bias[:3] = 10.0  # every token is sent to the same experts
    forced = router(x_ND, tokens_BT.flatten())
    assert not torch.equal(forced.indices_NK, routing.indices_NK)
    losses = [balance_loss(config, r, BATCH, BalanceWeights(1.0)).item() for r in (forced, routing)]
    assert losses[0] == losses[1]


def test_balance_losses_are_one_when_balanced_and_more_when_not():
    config = config_of("v2", n_activated_experts=2)
    even = torch.full((16, 8), 1 / 8)
    indices_NK = torch.stack([torch.arange(16), torch.arange(16) + 2], dim=-1) % 8  # two groups a token, all alike
    for kind in range(3):
        weights = BalanceWeights(*(float(kind == number) for number in range(3)))
        balanced = balance_loss(config, Routing(even, indices_NK, even), 2, weights)
        assert balanced.item() == pytest.approx(1.0)
        skewed = torch.full((16, 8), 0.02)
        skewed[:, 0], skewed[:, 2] = 0.5, 0.38
        both_NK = torch.tensor([[0, 2]]).expand(16, 2)
        worse = balance_loss(config, Routing(skewed, both_NK, skewed), 2, weights)
        assert worse.item() == pytest.approx([4 * 0.88, 2 * 0.92, 2 * 0.92][kind])


def kept_by_hand(config: ModelConfig, routing: Routing, free: list[bool]) -> list[list[bool]]:
    """V2, section 2.2.4; GShard, algorithm 1 with both experts dispatched; Switch, section 2.2."""
    k = config.n_activated_experts
    kept = [[True] * k for _ in range(BATCH * LENGTH)]
    for sequence in range(BATCH):
        tokens = range(sequence * LENGTH, (sequence + 1) * LENGTH)
        used = {}
        if config.router == "deepseek":
            size, buckets = EXPERTS // config.n_groups, config.n_groups
            rows = [(t, choice) for t in tokens for choice in range(k)]
            rows.sort(key=lambda row: -routing.scores_NE[row[0], routing.indices_NK[row]].item())
        else:
            size, buckets = 1, EXPERTS
            rows = [(t, choice) for choice in range(k) for t in tokens]
        for token, choice in rows:
            bucket = routing.indices_NK[token, choice].item() // size
            used[bucket] = used.get(bucket, 0) + 1
            full = used[bucket] > math.ceil(config.capacity_factor * LENGTH * k / buckets)
            kept[token][choice] = not full or free[sequence]
    return kept


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
@pytest.mark.parametrize("name", ["v3", "v2", "gshard", "switch", "hash"])
def test_what_is_over_capacity_is_dropped_in_the_papers_order(name, factor):
    config, _, _, tokens_BT, routing = routed(name, capacity_factor=factor)
    free = [config.router == "deepseek", False, False]
    kept_NK = kept_rows(config, routing, tokens_BT)
    assert kept_NK.tolist() == kept_by_hand(config, routing, free)
    assert not kept_NK.all() or factor > 1


def test_about_a_tenth_of_the_sequences_is_spared_and_always_the_same_ones():
    tokens_BT = torch.randint(64, (4000, 16), generator=torch.Generator().manual_seed(0))
    spared_B = spared(tokens_BT)
    assert 340 < int(spared_B.sum()) < 460  # 400 ± 3 deviations of a binomial
    assert torch.equal(spared(tokens_BT.flip(0)), spared_B.flip(0))
    assert not torch.equal(spared(tokens_BT.flip(1)), spared_B)  # the order of the tokens counts


@pytest.mark.parametrize("name", ["v2", "gshard"])
def test_dropped_rows_count_for_nothing_and_a_sequence_is_treated_alike_in_any_batch(name):
    torch.manual_seed(0)
    config = config_of(name, capacity_factor=0.6)
    moe = MoE(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_BTD, tokens_BT = torch.randn(BATCH, LENGTH, 32), torch.randint(64, (BATCH, LENGTH))
    y_BTD, balance = moe(x_BTD, tokens_BT)
    kept_NK = kept_rows(config, balance.routing, tokens_BT)
    assert int(balance.dropped) == int((~kept_NK).sum()) > 0
    assert balance.load_E.sum() == kept_NK.numel()
    expected = moe.shared(x_BTD.flatten(0, 1))
    for token, choice in kept_NK.nonzero().tolist():
        expert = balance.routing.indices_NK[token, choice]
        gate, up = (moe.experts.gate_up[expert] @ x_BTD.flatten(0, 1)[token]).chunk(2)
        row = moe.experts.down[expert] @ (torch.nn.functional.silu(gate) * up)
        expected[token] = expected[token] + balance.routing.gates_NK[token, choice] * row
    torch.testing.assert_close(y_BTD.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    alone, _ = moe(x_BTD[1:2], tokens_BT[1:2])
    torch.testing.assert_close(alone[0], y_BTD[1], rtol=1e-4, atol=1e-5)
    moe.eval()
    served, balance = moe(x_BTD, tokens_BT)
    assert balance.dropped is None
    decoded = moe.decode(x_BTD.flatten(0, 1), tokens_BT.flatten())
    torch.testing.assert_close(served.flatten(0, 1), decoded, rtol=1e-4, atol=1e-5)


def test_a_dropped_row_has_no_gradient():
    torch.manual_seed(0)
    config = config_of("switch", capacity_factor=1e-6)  # one row an expert and sequence
    moe = MoE(config.replace(n_shared_experts=0))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_BTD = torch.randn(1, LENGTH, 32, requires_grad=True)
    y_BTD, balance = moe(x_BTD, torch.randint(64, (1, LENGTH)))
    y_BTD.square().sum().backward()
    kept_N = kept_rows(config, balance.routing, torch.zeros(1, LENGTH, dtype=torch.int64))[:, 0]
    assert 0 < int(kept_N.sum()) <= EXPERTS
    assert torch.equal(y_BTD[0].abs().sum(-1) > 0, kept_N)
    assert torch.equal(x_BTD.grad[0].abs().sum(-1) > 0, kept_N)


def test_the_model_reports_what_it_dropped_in_training_alone():
    torch.manual_seed(0)
    model = Transformer(config_of("v2", capacity_factor=0.5, n_mtp=1))
    tokens_BT = torch.randint(64, (BATCH, LENGTH))
    out = model(tokens_BT)
    assert out.dropped_L.shape == (3,)
    assert (out.dropped_L > 0).all()
    assert torch.equal(out.hidden_BTD, model(tokens_BT).hidden_BTD)  # nothing is left to chance
    assert model.eval()(tokens_BT).dropped_L is None
    assert Transformer(config_of("v2"))(tokens_BT).dropped_L is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROUTERS)
def test_cuda_routes_drops_and_balances_as_the_cpu_does(name):
    torch.manual_seed(0)
    model = Transformer(config_of(name, capacity_factor=0.8 if name != "moe" else None))
    tokens_BT = torch.randint(64, (16, 64))
    weights = BalanceWeights(0.1, 0.2, 0.3)
    losses, outputs = [], []
    for device in ("cpu", "cuda"):
        out = model.to(device)(tokens_BT.to(device))
        losses.append(out.balance_loss(weights).item())
        outputs.append([out.hidden_BTD, out.load_LE, torch.zeros(2) if out.dropped_L is None else out.dropped_L])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    (hidden, load, dropped), (cuda_hidden, cuda_load, cuda_dropped) = outputs
    assert (load - cuda_load.cpu()).abs().max() <= 2  # rounding may send a token elsewhere
    assert (dropped - cuda_dropped.cpu()).abs().max() <= 2
    close = torch.isclose(hidden, cuda_hidden.cpu(), rtol=1e-2, atol=1e-2).all(-1)
    assert close.float().mean() > 0.95


def test_the_routing_bias_moves_load_and_hash_routers_have_none():
    torch.manual_seed(0)
    model = Transformer(config_of("v3"))
    tokens_BT = torch.randint(64, (8, 64))

    def violation():
        load = model(tokens_BT).load_LE.float()
        return ((load.max(-1).values - load.mean(-1)) / load.mean(-1)).mean().item()

    before = violation()
    with torch.no_grad():
        for _ in range(60):
            update_routing_bias(model, model(tokens_BT).load_LE, gamma=0.005)
        assert violation() < 0.5 * before
    hashed = Transformer(config_of("hash"))
    update_routing_bias(hashed, hashed(tokens_BT).load_LE, gamma=0.005)
    assert isinstance(hashed.blocks[0].ffn.router, HashRouter)
