"""The forward pass against slower statements of the same thing."""

import pytest
import torch

from model.attention import LatentAttention
from model.cache import Slots
from model.config import ModelConfig
from model.optimizer import build_optimizer
from model.rope import rotation
from model.transformer import Transformer

MLA = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
TINY = ModelConfig(
    vocab_size=128,
    d_model=32,
    n_layers=3,
    n_heads=2,
    d_ff=48,
    init_std=0.1,
    **MLA,
    n_dense_layers=1,
    n_routed_experts=8,
    n_activated_experts=2,
    n_shared_experts=1,
    moe_d_ff=16,
    n_groups=4,
    n_limited_groups=2,
    route_scale=2.5,
    n_mtp=1,
)
FAMILIES = {
    "deepseek": TINY,
    "llama": ModelConfig(family="llama", vocab_size=128, d_model=32, n_layers=2, n_kv_heads=2, init_std=0.1),
    "qwen2": ModelConfig(family="qwen2", vocab_size=128, d_model=32, n_layers=2, n_kv_heads=1, init_std=0.1),
    "qwen3": ModelConfig(
        family="qwen3", vocab_size=128, d_model=32, n_layers=2, n_kv_heads=2, head_dim=24, init_std=0.1
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_document_mask_equals_separate_sequences(name):
    torch.manual_seed(0)
    model = Transformer(FAMILIES[name])
    tokens = torch.randint(128, (2, 30))
    document = torch.tensor([[0] * 11 + [1] * 19, [4] * 20 + [5] * 10])
    packed = model(tokens, document_BT=document)
    for row, cut in ((0, 11), (1, 20)):
        for part in (slice(0, cut), slice(cut, 30)):
            alone = model(tokens[row : row + 1, part]).logits_BTV[0]
            torch.testing.assert_close(packed.logits_BTV[row, part], alone, rtol=1e-4, atol=1e-5)


def test_mtp_of_a_packed_document_equals_the_document_alone():
    torch.manual_seed(0)
    model = Transformer(TINY)
    tokens = torch.randint(128, (1, 30))
    packed = model(tokens, document_BT=torch.tensor([[0] * 11 + [1] * 19]))
    alone = model(tokens[:, 11:])
    torch.testing.assert_close(packed.mtp_logits[0][:, 11:], alone.mtp_logits[0], rtol=1e-4, atol=1e-5)
    assert packed.mtp_logits[0].shape == (1, 29, 128)


def test_mla_equals_the_papers_equations_head_by_head():
    """V2 equations 9-19 / V3 equations 1-11, written out for one sequence."""
    torch.manual_seed(0)
    config = TINY.replace(q_lora_rank=12)
    attention = LatentAttention(config)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    h = torch.randn(9, 32)
    rope = rotation(config, torch.arange(9), torch.float32)
    w = {name: parameter.detach() for name, parameter in attention.named_parameters()}

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    def turn(x):
        a, b = x[:, :4], x[:, 4:]
        return torch.cat([a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin], dim=-1)

    down_q, down_kv, w_kr = w["qkv.weight"].split([12, 24, 8])
    c_q, c_kv, k_r = norm(h @ down_q.T, w["q_norm.weight"]), norm(h @ down_kv.T, w["kv_norm.weight"]), turn(h @ w_kr.T)
    outputs = []
    for head in range(2):
        up_q, up_qr = w["q_up.weight"].view(2, 24, 12)[head].split([16, 8])
        up_k, up_v = w["kv_up.weight"].view(2, 32, 24)[head].split([16, 16])
        q = torch.cat([c_q @ up_q.T, turn(c_q @ up_qr.T)], dim=-1)
        k = torch.cat([c_kv @ up_k.T, k_r], dim=-1)
        scores = (q @ k.T / 24**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
        outputs.append(scores.softmax(-1) @ (c_kv @ up_v.T))
    expected = torch.cat(outputs, dim=-1) @ w["out.weight"].T
    torch.testing.assert_close(attention(h[None], rope, None)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_over_the_cache_equals_attending_to_the_whole_sequence(name):
    torch.manual_seed(0)
    config = FAMILIES[name]
    attention = Transformer(config).blocks[0].attention
    x = torch.randn(3, 12, 32)
    rope = rotation(config, torch.arange(12), torch.float32)
    whole = attention(x, rope, None)
    cache, slots = attention.cache(), Slots(12, rope)
    cache.resize(torch.zeros(0, dtype=torch.int64), rows=3, room=(3, 12), filled=0, dtype=torch.float32)
    pieces = [attention.prefill(x[:, :5], slots.first(5), cache)]
    for first, last in [(5, 6), (6, 9), (9, 12)]:  # one token, then three at once
        step = slots.step(torch.arange(first, last).expand(3, -1), seen=last)
        pieces.append(attention.decode(x[:, first:last], step, cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_log_probs_equal_those_of_the_logits_for_every_depth():
    torch.manual_seed(0)
    model = Transformer(TINY)
    tokens = torch.randint(128, (2, 20))
    out = model(tokens[:, :-1])
    expected = (out.logits_BTV / 0.7).log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(out.log_probs(tokens[:, 1:], temperature=0.7), expected)
    expected = out.mtp_logits[0].log_softmax(-1).gather(2, tokens[:, 2:, None]).squeeze(2)
    torch.testing.assert_close(out.log_probs(tokens[:, 2:], depth=1), expected)


def test_gradients_of_bf16_weights_stay_near_fp32_and_norms_and_gates_stay_fp32():
    torch.manual_seed(0)
    model = Transformer(TINY)
    tokens = torch.randint(128, (4, 33))
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        for weight in model.low_precision_weights():
            weight.data = weight.data.to(dtype)
        model.zero_grad()
        loss = -model(tokens[:, :-1]).log_probs(tokens[:, 1:]).mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
    exact = {name.rsplit(".", 2)[-2] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert exact == {
        "router",
        "norm",
        "attention_norm",
        "ffn_norm",
        "kv_norm",
        "embedding_norm",
        "hidden_norm",
    }


def test_load_counts_every_routed_token_of_every_layer():
    out = Transformer(TINY)(torch.randint(128, (3, 20)))
    assert out.load_LE.shape == (TINY.n_moe_layers, 8)
    assert out.load_LE.sum(-1).tolist() == [2 * 60, 2 * 60, 2 * 57]  # MTP sees one token less a sequence


@pytest.mark.parametrize("name", FAMILIES)
def test_training_memorises_a_batch(name):
    torch.manual_seed(0)
    model = Transformer(FAMILIES[name])
    optimizer = build_optimizer(model, learning_rate=1e-2)
    assert {p.ndim >= 2 for p in optimizer.param_groups[0]["params"]} == {True}
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    tokens = torch.randint(128, (2, 17))
    for _ in range(60):
        loss = -model(tokens[:, :-1]).log_probs(tokens[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3
