"""Cached, batched, compacted generation against the full forward pass."""

import copy

import pytest
import torch

from infra.errors import InputError
from model.config import ModelConfig
from model.generate import Generator
from model.sampling import sample
from model.transformer import Transformer

DEEPSEEK = ModelConfig(
    vocab_size=96,
    d_model=32,
    n_layers=3,
    n_heads=2,
    d_ff=48,
    max_position=128,
    init_std=0.2,
    kv_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_dense_layers=1,
    n_routed_experts=8,
    n_activated_experts=2,
    n_shared_experts=1,
    moe_d_ff=16,
)
CONFIGS = {
    "mla": DEEPSEEK,
    "mla_q_lora_yarn": DEEPSEEK.replace(q_lora_rank=16, rope_factor=4.0, original_max_position=32),
    "gqa": ModelConfig(family="llama", vocab_size=96, d_model=32, n_layers=2, n_kv_heads=2, init_std=0.2),
    "qwen2": ModelConfig(family="qwen2", vocab_size=96, d_model=32, n_layers=2, n_kv_heads=1, init_std=0.2),
    "qwen3": ModelConfig(
        family="qwen3", vocab_size=96, d_model=32, n_layers=2, n_kv_heads=2, head_dim=24, init_std=0.2
    ),
}


def prompts(n: int = 9) -> list[list[int]]:
    torch.manual_seed(3)
    return [torch.randint(96, (int(length),)).tolist() for length in torch.randint(1, 14, (n,))]


@pytest.fixture(params=CONFIGS)
def model(request) -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIGS[request.param])


def whole(model: Transformer, prompt: list[int], tokens: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities [n, V] of the completion's positions, from one full pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits_BTV[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def test_greedy_tokens_are_the_argmax_of_the_full_pass(model):
    batch = prompts()
    for prompt, completion in zip(batch, Generator(model).generate(batch, 20, temperature=0), strict=True):
        expected = whole(model, prompt, completion.tokens, 1.0)
        assert completion.tokens == expected.argmax(-1).tolist()
        assert not completion.finished


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.95)])
def test_logprobs_are_those_of_the_full_pass_with_rows_leaving_the_batch(model, temperature, top_p):
    batch = prompts(20) * 2  # a prompt's samples share its pass
    stop = tuple(range(8))
    seeded = torch.Generator().manual_seed(5)
    completions = Generator(model).generate(batch, 24, temperature, top_p, stop, seeded)
    assert len({len(completion.tokens) for completion in completions}) > 3
    for prompt, completion in zip(batch, completions, strict=True):
        expected = whole(model, prompt, completion.tokens, temperature)
        expected = expected.gather(1, torch.tensor(completion.tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-5, atol=1e-5)
        assert completion.finished == (completion.tokens[-1] in stop)
        assert not any(token in stop for token in completion.tokens[:-1])
        assert completion.finished or len(completion.tokens) == 24


def test_a_sample_does_not_depend_on_the_batch_it_ran_in(model):
    batch = [prompt for prompt in prompts(7) for _ in range(3)]
    runs = [
        Generator(model, max_batch=size).generate(
            batch, 12, stop_ids=(1, 2), generator=torch.Generator().manual_seed(5)
        )
        for size in (3, 64)
    ]
    assert [completion.tokens for completion in runs[0]] == [completion.tokens for completion in runs[1]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_steps_in_the_form_in_which_they_are_recorded_say_the_same(model, device, monkeypatch):
    """On CPU without the recording. Calls differ in rows and lengths, so that room grows and is used again."""
    calls = [(prompts(5), 20), (prompts(9), 40), (prompts(9), 40), (prompts(3), 7)]
    plain = [Generator(model, max_batch=4).generate(batch, n, stop_ids={7}, generator=seeded()) for batch, n in calls]
    monkeypatch.setattr("model.batch.SLOTS", 16)
    if device == "cpu":
        monkeypatch.setattr("model.batch.recorded", lambda device: True)
        monkeypatch.setattr("model.batch.Replayed", lambda function, shared: function)
    generator = Generator(copy.deepcopy(model).to(device), max_batch=4)
    for (batch, n), expected in zip(calls, plain, strict=True):
        found = generator.generate(batch, n, stop_ids={7}, generator=seeded(device))
        if device == "cpu":
            assert [reply.tokens for reply in found] == [reply.tokens for reply in expected]
        for prompt, reply in zip(batch, found, strict=True):
            exact_T = whole(model, prompt, reply.tokens, 1.0).gather(1, torch.tensor(reply.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(reply.logprobs), exact_T, rtol=1e-3, atol=1e-3)
            assert len(reply.tokens) == n or reply.tokens[-1] == 7


def seeded(device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(4)


def test_generation_sees_the_weights_of_the_moment():
    torch.manual_seed(0)
    model = Transformer(DEEPSEEK)
    generator, batch = Generator(model), prompts()
    before = generator.generate(batch, 8, temperature=0)
    with torch.no_grad():
        model.blocks[0].attention.out.weight.normal_(std=0.5)
    after = generator.generate(batch, 8, temperature=0)
    assert [c.tokens for c in before] != [c.tokens for c in after]
    assert after == Generator(model).generate(batch, 8, temperature=0)


def test_sampling_follows_the_distribution_and_the_nucleus():
    probabilities = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.1])
    draws = (torch.arange(10_000) / 10_000)[:, None]
    counts = sample(probabilities.expand(10_000, 5), draws).bincount(minlength=5)
    torch.testing.assert_close(counts / 10_000, probabilities, rtol=0, atol=2e-4)
    counts = sample(probabilities.expand(10_000, 5), draws, torch.full((10_000, 1), 0.65)).bincount(minlength=5)
    torch.testing.assert_close(counts / 10_000, torch.tensor([4, 0, 3, 0, 0]) / 7, rtol=0, atol=2e-4)


def test_a_wide_nucleus_is_found_beyond_the_first_look():
    probabilities = torch.full((3, 5000), 1 / 5000)
    tokens = sample(probabilities, torch.tensor([[0.0], [0.5], [0.999]]), torch.full((3, 1), 0.9))
    assert tokens.unique().numel() == 3


def test_impossible_requests_say_what_to_change():
    model = Transformer(DEEPSEEK)
    with pytest.raises(InputError, match="max_position"):
        Generator(model).generate([[1] * 100], 100)
    with pytest.raises(InputError, match="BOS"):
        Generator(model).generate([[]], 4)
    assert Generator(model).generate([], 4) == []


def test_a_reply_that_is_given_up_goes_no_further_and_leaves_the_others_alone(model):
    batch = prompts()
    whole_replies = Generator(model).generate(batch, 8, temperature=0)
    stop = whole_replies[0].tokens[2]
    cut = Generator(model, max_batch=4).generate(batch, 8, temperature=0, given_up=lambda tokens: tokens[-1] == stop)
    for reply, full in zip(cut, whole_replies, strict=True):
        length = full.tokens.index(stop) + 1 if stop in full.tokens else 8
        assert reply.tokens == full.tokens[:length]
        assert not reply.finished
