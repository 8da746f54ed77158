"""The cache of latents in float8: what it costs in exactness and what it saves in bytes."""

import pytest
import torch

from infra.errors import ConfigError
from model.cache import Cache, Float8Cache
from model.config import ModelConfig
from model.generate import Generator
from model.presets import preset
from model.transformer import Transformer

LATENT, ROPE = 24, 8


def filled(cache: Cache, x_BTW: torch.Tensor) -> Cache:
    cache.resize(torch.empty(0, dtype=torch.int64), len(x_BTW), (len(x_BTW), x_BTW.shape[1] + 3), 0, x_BTW.dtype)
    cache.fill(x_BTW)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_latent_is_within_half_a_step_of_float8_and_the_rest_is_exact(dtype):
    torch.manual_seed(0)
    x_BTW = (torch.randn(4, 6, LATENT + ROPE) * torch.logspace(-3, 3, 6)[:, None]).to(dtype)
    read_BTW = filled(Float8Cache(LATENT + ROPE, LATENT), x_BTW).read(4, 6)
    assert read_BTW.dtype == dtype
    assert torch.equal(read_BTW[..., LATENT:], x_BTW[..., LATENT:])
    latent, back = x_BTW[..., :LATENT].float(), read_BTW[..., :LATENT].float()
    step = latent.abs().amax(-1, keepdim=True) / 448
    # 3 bits of mantissa: half a step is 2⁻⁴ of the number, or 2⁻¹⁰ steps of the scale below the normal numbers.
    allowed = torch.maximum(latent.abs() * 2**-4, step * 2**-10)
    rounding = torch.finfo(dtype).eps * latent.abs()
    assert bool(((latent - back).abs() <= allowed + rounding).all())
    assert bool((latent != back).any())


def test_a_latent_of_zeros_comes_back_as_zeros():
    x_BTW = torch.zeros(1, 2, LATENT + ROPE)
    assert torch.equal(filled(Float8Cache(LATENT + ROPE, LATENT), x_BTW).read(1, 2), x_BTW)


@pytest.mark.parametrize("make", [lambda: Cache(LATENT + ROPE), lambda: Float8Cache(LATENT + ROPE, LATENT)])
def test_rows_keep_their_slots_when_others_leave_and_join(make):
    torch.manual_seed(0)
    x_BTW = torch.randn(4, 5, LATENT + ROPE)
    cache = filled(make(), x_BTW)
    before_BTW = cache.read(4, 5).clone()
    cache.resize(torch.tensor([3, 1]), 5, (5, 11), 5, x_BTW.dtype)
    assert torch.equal(cache.read(5, 5)[:2], before_BTW[[3, 1]])
    cache.fill(x_BTW[:3])
    assert torch.equal(cache.read(5, 5)[2:], before_BTW[:3])
    cache.write(torch.tensor([0 * 11 + 5, 1 * 11 + 6]), x_BTW[0, :2])
    assert torch.equal(cache.read(5, 11)[0, 5], before_BTW[0, 0])
    assert torch.equal(cache.read(5, 11)[1, 6], before_BTW[0, 1])


@pytest.mark.parametrize("make", [lambda: Cache(LATENT + ROPE), lambda: Float8Cache(LATENT + ROPE, LATENT)])
def test_rows_that_share_a_prompt_share_what_it_filled(make):
    torch.manual_seed(0)
    x_BTW = torch.randn(3, 5, LATENT + ROPE)
    cache = filled(make(), x_BTW[:1])
    cache.resize(torch.tensor([0]), 5, (5, 8), 5, x_BTW.dtype)
    cache.fill(x_BTW[1:])
    cache.spread(torch.tensor([1, 0, 1, 1]), 2, 5)
    alone_BTW = filled(make(), x_BTW).read(3, 5)
    assert torch.equal(cache.read(5, 5), alone_BTW[[0, 2, 1, 2, 2]])


def test_log_probabilities_from_a_float8_cache_stay_near_the_exact_ones():
    config = ModelConfig(
        **{"vocab_size": 96, "d_model": 64, "n_layers": 3, "n_heads": 4, "d_ff": 96, "init_std": 0.1},
        **{"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "max_position": 128},
    )
    torch.manual_seed(0)
    model = Transformer(config)
    prompts = [torch.randint(96, (n,)).tolist() for n in (4, 9, 30, 17)]
    for completion, prompt in zip(
        Generator(model, cache_dtype="float8").generate(prompts, 40, temperature=0), prompts, strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.tokens])).logits_BTV[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        difference = (torch.tensor(completion.logprobs) - exact).abs()
        assert difference[0] < 1e-5  # the prompt attends to itself unquantised
        assert 0 < difference.max() < 0.1


def test_the_cache_takes_the_bytes_that_the_config_counts():
    config = preset("v3")
    assert config.cache_bytes_per_token() == 61 * 2 * 576
    assert config.cache_bytes_per_token(float8=True) == 61 * (512 + 4 + 2 * 64)
    for float8 in (False, True):
        model = Transformer(
            ModelConfig(
                **{"d_model": 32, "n_layers": 2, "n_heads": 2, "kv_lora_rank": LATENT, "qk_rope_head_dim": ROPE},
                **{"qk_nope_head_dim": 8, "v_head_dim": 8},
            )
        )
        cache = model.blocks[0].attention.cache(float8)
        cache.resize(torch.empty(0, dtype=torch.int64), 3, (3, 7), 0, torch.bfloat16)
        assert cache.nbytes == 3 * 7 * model.config.cache_bytes_per_token(float8=float8) // 2


def test_only_a_latent_can_be_quantised():
    model = Transformer(ModelConfig(family="llama", vocab_size=96, d_model=32, n_layers=1))
    with pytest.raises(ConfigError, match="cache_dtype"):
        Generator(model, cache_dtype="float8").generate([[1]], 2)
