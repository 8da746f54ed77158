"""Which layers compute in float8 and when; what the products are is `tests/kernels/test_fp8.py`'s."""

import copy

import pytest
import torch

from kernels import fp8
from kernels.fp8 import reference
from model.config import ModelConfig
from model.float8 import use_float8
from model.generate import Generator
from model.optimizer import build_optimizer
from model.transformer import Transformer

CONFIG = ModelConfig(
    **{"vocab_size": 64, "d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 96, "init_std": 0.1, "n_mtp": 1},
    **{"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "max_position": 128},
    **{"n_dense_layers": 1, "n_routed_experts": 4, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 32},
)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


@torch.no_grad()
def test_a_model_that_only_trains_in_float8_infers_exactly(model):
    tokens_BT = torch.randint(64, (2, 20))
    exact_BTV = model(tokens_BT).logits_BTV
    use_float8(model)
    assert torch.equal(model(tokens_BT).logits_BTV, exact_BTV)
    trained_BTV = model.train()(tokens_BT).logits_BTV
    assert 0.001 < (trained_BTV - exact_BTV).norm() / exact_BTV.norm() < 0.2


@pytest.mark.parametrize(
    "optimizer",
    [
        build_optimizer,
        lambda model, rate: torch.optim.AdamW(model.parameters(), rate),
        lambda model, rate: torch.optim.AdamW(model.parameters(), rate, fused=True),
    ],
    ids=["ours", "torch", "fused"],
)
def test_no_optimizer_leaves_a_stale_weight(model, optimizer):
    use_float8(model.train())
    steps, tokens_BT = optimizer(model, 0.1), torch.randint(64, (2, 20))
    model(tokens_BT).logits_BTV.square().mean().backward()
    steps.step()
    fresh = Transformer(CONFIG)
    fresh.load_state_dict(model.state_dict())
    use_float8(fresh)
    assert torch.equal(model(tokens_BT).logits_BTV, fresh(tokens_BT).logits_BTV)


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("aot_eager", "cpu"),
        pytest.param("inductor", "cpu", marks=pytest.mark.slow),
        pytest.param("inductor", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_a_compiled_model_is_one_graph_that_learns_as_an_eager_one(monkeypatch, backend, device):
    """Both begin each step with the same weights: float8 makes much of another order of sums. So the gradients are held
    against those of a model without it, from which they may be equally far."""
    made, module = [], fp8.quantizer(torch.device(device))
    quantize = module.quantize_weight
    monkeypatch.setattr(module, "quantize_weight", lambda w, **options: made.append(w) or quantize(w, **options))
    torch.manual_seed(0)
    eager = Transformer(CONFIG.replace(n_mtp=0)).to(device)
    if device == "cuda":
        eager.round_weights()
    models = eager, copy.deepcopy(eager), copy.deepcopy(eager)
    for model in models[:2]:
        use_float8(model)

    def loss_of(model: Transformer, tokens_BT: torch.Tensor) -> torch.Tensor:
        return -model(tokens_BT[:, :-1]).log_probs(tokens_BT[:, 1:]).mean()

    compiled_loss_of = torch.compile(loss_of, backend=backend, fullgraph=True)
    for step in range(2):
        for micro in range(2):
            tokens_BT = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(2 * step + micro)).to(device)
            losses = []
            for call, model in zip((loss_of, compiled_loss_of, loss_of), models, strict=True):
                made.clear()
                losses.append(call(model, tokens_BT))
                losses[-1].backward()
                assert len(made) == (0 if micro or model is models[2] else 12), "each weight is quantised once a step"
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
        ours, compiled, exact = (torch.cat([w.grad.float().flatten() for w in m.parameters()]) for m in models)
        error, compiled_error = ((g - exact).norm().item() for g in (ours, compiled))
        assert error < 0.2 * exact.norm().item()
        assert compiled_error == pytest.approx(error, rel=0.2)
        torch.optim.SGD(eager.parameters(), lr=0.3).step()
        for model in models[1:]:
            model.load_state_dict(eager.state_dict())
        for model in models:
            model.zero_grad()


def test_a_served_model_quantises_its_weights_once_and_decodes_what_it_scores(model, monkeypatch):
    made, quantize = [], reference.quantize_weight
    monkeypatch.setattr(
        reference, "quantize_weight", lambda w, **options: made.append(w.data_ptr()) or quantize(w, **options)
    )
    monkeypatch.setattr(reference, "quantize_across", None)  # nothing is kept for a backward pass
    prompts = [torch.randint(64, (length,)).tolist() for length in (3, 9, 6)]
    exact = Generator(model).generate(prompts, 12, temperature=0)
    use_float8(model, always=True)
    replies = Generator(model).generate(prompts, 12, temperature=0)
    drafted = Generator(model, speculate=True).generate(prompts, 12, temperature=0)
    assert len(made) == len(set(made)) > 8
    assert [reply.logprobs for reply in replies] != [reply.logprobs for reply in exact]
    assert [reply.tokens for reply in drafted] == [reply.tokens for reply in replies]
    for prompt, reply in zip(prompts, replies, strict=True):
        # The forward pass quantises W_UK and W_UV, which decoding has absorbed as they are.
        tokens_BT = torch.tensor([prompt + reply.tokens])
        with torch.no_grad():
            log_probs_BT = model(tokens_BT[:, :-1]).log_probs(tokens_BT[:, 1:])
        scored = log_probs_BT[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(reply.logprobs), scored, rtol=0, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_float8_products_on_a_float8_cache_decode_near_what_the_exact_model_scores(model, device, speculate):
    """As `fathom serve --fp8` decodes: on CUDA with the kernels, by recorded steps, the rest in bf16."""
    exact = copy.deepcopy(model)
    model.to(device)
    if device == "cuda":
        model.round_weights()
    use_float8(model, always=True)
    prompts = [torch.randint(64, (length,)).tolist() for length in (3, 9, 6, 30, 1)]
    replies = Generator(model, max_batch=3, speculate=speculate, cache_dtype="float8").generate(
        prompts, 40, temperature=0
    )
    errors = []
    for prompt, reply in zip(prompts, replies, strict=True):
        tokens_BT = torch.tensor([prompt + reply.tokens])
        for scorer, where in ((exact, "cpu"), (model, device)):
            log_probs_BT = scorer(tokens_BT[:, :-1].to(where)).log_probs(tokens_BT[:, 1:].to(where))
            errors.append(torch.tensor(reply.logprobs) - log_probs_BT[0, len(prompt) - 1 :].cpu())
    from_exact, from_served = (torch.cat(errors[first::2]).square().mean().sqrt() for first in (0, 1))
    # An expert chosen otherwise makes a large error of one token, so it is the mean that is held small.
    assert 0.001 < from_exact < 0.2
    assert 0.001 < from_served < 0.1
