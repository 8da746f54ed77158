"""V3's extension is what the paper says and what transformers computes: s = 40, α = 1, β = 32, on the decoupled key."""

import math
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from flows.pipelines import LINE
from flows.recipes import load_recipe
from model.config import ModelConfig
from model.presets import preset
from model.rope import attention_factor, inverse_frequencies, rotation, softmax_scale


def extension(recipe: str) -> tuple[Any, list[ModelConfig]]:
    """The recipe's extend_context, and the model of each of its phases."""
    configs: Any = load_recipe(recipe).resolve(LINE)
    base = configs["pretrain"].model.replace(max_position=configs["pretrain"].sequence_length)
    return configs["extend_context"], configs["extend_context"].models(base)


def test_v3_goes_to_32k_and_then_to_128k_over_the_original_4k():
    config, models = extension("v3")
    assert [(phase.sequence_length, phase.steps, phase.batch_size) for phase in config.phases] == [
        (32768, 1000, 1920),
        (131072, 1000, 480),
    ]
    assert (config.learning_rate.schedule, config.learning_rate.peak) == ("constant", 7.3e-6)
    for model in models:
        yarn = (model.rope_factor, model.original_max_position, model.beta_slow, model.beta_fast)
        assert yarn == (40, 4096, 1, 32)
    published = preset("v3").replace(max_position=131072)
    assert models[-1] == published  # 163840 = 40 × 4096 is what s = 40 would allow


def test_v2_goes_to_32k_in_one_phase():
    config, _ = extension("v2")
    assert [(phase.sequence_length, phase.steps, phase.batch_size) for phase in config.phases] == [(32768, 1000, 576)]


@pytest.mark.parametrize("recipe", ["v3", "v2", "v2_lite"])
def test_frequencies_and_softmax_scale_of_each_phase_are_those_of_transformers(recipe):
    for model in extension(recipe)[1]:
        published = DeepseekV3Config(
            max_position_embeddings=model.max_position,
            qk_nope_head_dim=model.qk_nope_head_dim,
            qk_rope_head_dim=model.qk_rope_head_dim,
            rope_parameters={
                **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0},
                "original_max_position_embeddings": 4096,
                **{"mscale": model.mscale, "mscale_all_dim": model.mscale_all_dim},
            },
        )
        oracle = DeepseekV3RotaryEmbedding(published)
        torch.testing.assert_close(inverse_frequencies(model), oracle.inv_freq, rtol=1e-6, atol=0)
        assert attention_factor(model) == pytest.approx(oracle.attention_scaling)
        with torch.device("meta"):
            assert softmax_scale(model) == pytest.approx(DeepseekV3Attention(published, 0).scaling, rel=1e-12)


def test_the_temperature_is_a_tenth_of_ln_s_plus_one_and_only_64_of_192_dims_are_rotated():
    model = extension("v3")[1][-1]
    assert softmax_scale(model) == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192))
    assert attention_factor(model) == 1  # it is in the softmax scale: the cosines keep their length
    assert rotation(model, torch.arange(4), torch.float32).cos.shape[-1] * 2 == model.qk_rope_head_dim == 64


def test_yarn_keeps_fast_pairs_slows_slow_ones_by_s_and_ramps_between():
    """A pair that turns more than β times in the original context is kept, one below α turns is slowed by s."""
    model = extension("v3")[1][-1]
    plain = inverse_frequencies(model.replace(rope_factor=1.0, max_position=4096))
    turns, slowed = 4096 * plain / (2 * math.pi), plain / inverse_frequencies(model)
    torch.testing.assert_close(slowed[turns > 40], torch.ones_like(slowed[turns > 40]))
    torch.testing.assert_close(slowed[turns < 0.8], torch.full_like(slowed[turns < 0.8], 40.0))
    assert (slowed.diff() >= 0).all()
