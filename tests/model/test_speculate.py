"""Speculative decoding changes how fast tokens come and nothing else: greedy to the token, sampled in distribution."""

import itertools

import pytest
import torch

from infra.errors import InputError
from model.config import ModelConfig
from model.generate import Completion, Generator, acceptance_rate
from model.sampling import SAMPLE, Sampler
from model.transformer import Transformer

N_TOKENS = 5  # so few that untrained modules guess right often, and every reply of three tokens can be counted
MLA = ModelConfig(
    **{"vocab_size": N_TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 48, "init_std": 0.2, "n_mtp": 1},
    **{"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "max_position": 128},
    **{"n_dense_layers": 1, "n_routed_experts": 8, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 16},
)
CONFIGS = {
    "mla": MLA,
    "mla_two_modules": MLA.replace(n_mtp=2),
    "mla_q_lora_yarn_three_modules": MLA.replace(
        n_mtp=3, q_lora_rank=16, rope_factor=4.0, original_max_position=32, vocab_size=4
    ),
    "multi_head": ModelConfig(vocab_size=N_TOKENS, d_model=32, n_layers=2, n_heads=2, d_ff=48, init_std=0.2, n_mtp=1),
}


@pytest.fixture(params=CONFIGS)
def model(request) -> Transformer:
    return build(request.param)


def build(name: str) -> Transformer:
    torch.manual_seed(1)
    return Transformer(CONFIGS[name])


def prompts(model: Transformer, n: int) -> list[list[int]]:
    torch.manual_seed(3)
    lengths = torch.randint(1, 14, (n,)).tolist()
    return [torch.randint(model.config.vocab_size, (length,)).tolist() for length in lengths]


@pytest.mark.parametrize("cache_dtype", [None, "float8"])
def test_greedy_replies_are_the_same_token_for_token(model, cache_dtype):
    if cache_dtype and not model.config.is_mla:
        pytest.skip("float8 keeps MLA's latent")
    batch = prompts(model, 24)
    plain = Generator(model, cache_dtype=cache_dtype).generate(batch, 30, temperature=0)
    drafted = Generator(model, speculate=True, cache_dtype=cache_dtype).generate(batch, 30, temperature=0)
    assert [c.tokens for c in drafted] == [c.tokens for c in plain]
    torch.testing.assert_close(*(torch.tensor([c.logprobs for c in r]) for r in (plain, drafted)), rtol=0, atol=1e-5)
    assert 0 < acceptance_rate(drafted) < 1
    assert all(c.drafted == c.accepted == 0 for c in plain)


def test_greedy_replies_are_the_same_with_stops_and_rows_that_join_and_leave(model):
    batch = prompts(model, 40)
    stop = (2,)
    plain = Generator(model).generate(batch, 24, temperature=0, stop_ids=stop)
    drafted = Generator(model, max_batch=7, speculate=True).generate(batch, 24, temperature=0, stop_ids=stop)
    assert [(c.tokens, c.finished) for c in drafted] == [(c.tokens, c.finished) for c in plain]
    assert {True, False} == {c.finished for c in plain}
    assert len({len(c.tokens) for c in plain}) > 3


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 0.9)])
def test_a_reply_does_not_depend_on_the_batch_it_ran_in(model, temperature, top_p):
    batch = prompts(model, 20)
    runs = [
        Generator(model, max_batch=size, speculate=True).generate(
            batch, 12, temperature, top_p, stop_ids=(1,), generator=torch.Generator().manual_seed(5)
        )
        for size in (3, 64)
    ]
    assert [c.tokens for c in runs[0]] == [c.tokens for c in runs[1]]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.8)])
@pytest.mark.parametrize("n_mtp", [1, 2])
def test_sampled_replies_follow_the_models_own_distribution(n_mtp, temperature, top_p):
    torch.manual_seed(1)
    model = Transformer(CONFIGS["multi_head"].replace(d_model=16, n_layers=1, d_ff=24, n_mtp=n_mtp))
    prompt, n = [3, 1, 4], 8_000
    seeded = torch.Generator().manual_seed(11)
    replies = Generator(model, n, speculate=True).generate([prompt] * n, 3, temperature, top_p, generator=seeded)
    assert 0.1 < acceptance_rate(replies) < 0.9
    every = list(itertools.product(range(N_TOKENS), repeat=3))
    tokens_NT = torch.tensor([[*prompt, *reply] for reply in every])
    with torch.no_grad():
        probabilities_NTV = exact(model(tokens_NT).logits_BTV[:, len(prompt) - 1 : -1], temperature, top_p)
    chosen_NT = probabilities_NTV.gather(2, tokens_NT[:, len(prompt) :, None])[..., 0]
    expected_N = chosen_NT.prod(1) * n
    counts = torch.zeros(len(every), dtype=torch.float64)
    for reply in replies:
        counts[every.index(tuple(reply.tokens))] += 1
    assert chi_square(counts, expected_N.double()) < 3.3  # standard deviations above its mean: p < 0.001


def exact(logits_NTV: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The distribution to sample from, one token of one nucleus at a time."""
    probabilities_NTV = (logits_NTV / temperature).softmax(-1)
    for row in probabilities_NTV.flatten(0, 1):
        mass = 0.0
        for token in row.argsort(descending=True).tolist():
            kept = mass < top_p
            mass += row[token].item()
            row[token] *= kept
        row /= row.sum()
    return probabilities_NTV


def chi_square(counts_N: torch.Tensor, expected_N: torch.Tensor) -> float:
    """How far Pearson's statistic lies above its mean, in standard deviations (Wilson and Hilferty's cube root)."""
    assert counts_N[expected_N == 0].sum() == 0
    rare = expected_N < 8
    counts_N = torch.cat([counts_N[~rare], counts_N[rare].sum()[None]])
    expected_N = torch.cat([expected_N[~rare], expected_N[rare].sum()[None]])
    seen = expected_N > 0
    degrees = int(seen.sum()) - 1
    statistic = ((counts_N - expected_N)[seen] ** 2 / expected_N[seen]).sum().item()
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5


def test_rows_of_other_temperatures_do_not_change_a_row():
    torch.manual_seed(0)
    logits_BTV, draws_BTU = torch.randn(4, 2, 9), torch.rand(4, 3, 3)
    settings = [(0.0, 1.0), (1.0, 1.0), (0.5, 0.7), (1.3, 0.9)]

    def run(rows: list[int]) -> list[torch.Tensor]:
        sampler = Sampler(
            *zip(*(settings[row] for row in rows), strict=True), list(draws_BTU[rows]), torch.device("cpu")
        )
        place_B = torch.zeros(len(rows), dtype=torch.int64)
        tokens_B, _ = sampler.choose(logits_BTV[rows, 0], place_B)
        draft_B, guess_BV = sampler.draft(logits_BTV[rows, 0].flip(-1), place_B)
        guesses = None if guess_BV is None else guess_BV[:, None]
        return [tokens_B, draft_B, *sampler.verify(logits_BTV[rows], draft_B[:, None], guesses, place_B)]

    together = run([0, 1, 2, 3])
    for row in range(4):
        for one, all_ in zip(run([row]), together, strict=True):
            torch.testing.assert_close(one[0], all_[row])
    assert together[0][0] == logits_BTV[0, 0].argmax()
    assert draws_BTU[..., SAMPLE].unique().numel() == 12


def test_acceptance_counts_only_drafts_that_the_reply_was_tried_against():
    completions = [Completion([1, 2, 3], [], False, drafted=2, accepted=1), Completion([1], [], True)]
    assert acceptance_rate(completions) == 0.5
    model = build("mla")
    (reply,) = Generator(model, speculate=True).generate([[1, 2]], 2, temperature=0)
    assert (len(reply.tokens), reply.drafted) == (2, 1)  # the first comes with the prompt, one round brings the second


def test_a_model_without_modules_cannot_draft():
    model = Transformer(MLA.replace(n_mtp=0))
    with pytest.raises(InputError, match="n_mtp=0"):
        Generator(model, speculate=True).generate([[1]], 4)
