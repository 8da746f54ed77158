"""M from a config against V1's formula, and the shapes that a ladder takes."""

from __future__ import annotations

import pytest

from infra.errors import ConfigError
from model.config import ModelConfig
from model.presets import preset
from stages.scaling.points import plan_point, round_batch
from stages.scaling.shapes import at_shape, shape_for

DENSE = ModelConfig(family="llama", d_model=96, n_layers=6, n_heads=6, d_ff=256)
MIXTURE = ModelConfig(
    **{"d_model": 64, "n_layers": 4, "n_heads": 4, "d_ff": 192, "kv_lora_rank": 32, "q_lora_rank": 48},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_dense_layers": 1, "n_routed_experts": 8},
    **{"n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 64, "n_mtp": 1},
)


def published_formula(n_layers: int, d_model: int, sequence_length: int) -> int:
    """V1, section 3.2: M = 72·n_layer·d² + 12·n_layer·d·l_seq."""
    return 72 * n_layers * d_model**2 + 12 * n_layers * d_model * sequence_length


def v1_shape(n_layers: int, d_model: int) -> ModelConfig:
    """Multi-head attention and an FFN of 8/3 of the width, which the formula stands for."""
    return ModelConfig(family="llama", d_model=d_model, n_layers=n_layers, n_heads=4, d_ff=d_model * 8 // 3)


@pytest.mark.parametrize(("n_layers", "d_model"), [(1, 24), (6, 96), (12, 768), (30, 1536), (80, 6144)])
@pytest.mark.parametrize("sequence_length", [64, 4096])
def test_the_scale_of_v1s_shape_is_v1s_formula_exactly(n_layers, d_model, sequence_length):
    found = v1_shape(n_layers, d_model).non_embedding_flops_per_token(sequence_length)
    assert found == published_formula(n_layers, d_model, sequence_length)


def test_the_vocabulary_does_not_enter_the_scale():
    assert DENSE.replace(vocab_size=9).non_embedding_flops_per_token(64) == DENSE.replace(
        vocab_size=99999
    ).non_embedding_flops_per_token(64)


def test_7b_differs_from_the_formula_by_its_ffn_and_67b_by_its_grouped_queries_too():
    for name, d_model, n_layers, per_layer in (
        ("v1_7b", 4096, 30, 6 * (4 * 4096**2 + 3 * 4096 * 11008)),
        ("v1_67b", 8192, 95, 6 * (2 * 8192**2 + 2 * 8192 * 8 * 128 + 3 * 8192 * 22016)),
    ):
        found = preset(name).non_embedding_flops_per_token(4096)
        assert found == n_layers * per_layer + 12 * n_layers * d_model * 4096
        assert found / published_formula(n_layers, d_model, 4096) == pytest.approx(1, abs=0.13)


@pytest.mark.parametrize("base", [DENSE, MIXTURE])
@pytest.mark.parametrize("scale", [2e6, 1e7, 1e8, 1e9])
def test_a_shape_has_the_scale_asked_for_and_the_proportion_of_the_base(base, scale):
    model = shape_for(base, scale, 64)
    assert model.non_embedding_flops_per_token(64) == pytest.approx(scale, rel=0.25)
    assert model.d_model / model.n_heads == base.d_model / base.n_heads
    assert model.head_dim == base.head_dim
    assert 0.6 < (model.n_layers / model.d_model) / (base.n_layers / base.d_model) < 1.7
    assert model.d_ff / model.d_model == pytest.approx(base.d_ff / base.d_model, rel=0.3)


def test_a_bigger_scale_is_never_a_smaller_model():
    scales = [3e5 * 1.5**n for n in range(12)]
    found = [shape_for(DENSE, scale, 64).non_embedding_flops_per_token(64) for scale in scales]
    assert found == sorted(set(found))


def test_the_base_itself_comes_back_at_its_own_scale():
    for base in (DENSE, MIXTURE):
        assert shape_for(base, base.non_embedding_flops_per_token(64), 64) == base


def test_grouped_queries_keep_a_number_of_groups_that_divides_the_heads():
    base = DENSE.replace(n_kv_heads=2)
    for n_heads in (1, 2, 5, 6, 9, 12):
        model = at_shape(base, n_heads, 4)
        assert model.n_heads % model.n_kv_heads == 0
        assert model.n_kv_heads <= max(1, n_heads / 3)


def test_a_scale_below_every_shape_says_what_to_change():
    with pytest.raises(ConfigError, match=r"no shape like the base has M = 1e\+03 .* narrower heads"):
        shape_for(DENSE, 1e3, 64)


def test_a_point_spends_its_compute_to_the_nearest_step():
    point = plan_point("ladder", 1e11, DENSE, 1e-3, 8, 64, seed=0)
    spent = point.steps * point.batch_size * 64 * DENSE.non_embedding_flops_per_token(64)
    assert spent == pytest.approx(1e11, abs=0.5 * 8 * 64 * DENSE.non_embedding_flops_per_token(64))
    assert point.flops(64) == point.steps * 8 * 64 * DENSE.flops_per_token(64)


def test_a_point_of_too_few_steps_says_what_to_change():
    with pytest.raises(ConfigError, match=r"is 4 steps of 8 × 64 tokens; 20 are needed: lower that scale"):
        plan_point("ladder", 1e10, DENSE, 1e-3, 8, 64, seed=0)


def test_batches_are_rounded_to_what_ranks_and_micro_batches_divide():
    assert [round_batch(n * 64, 64) for n in (0.2, 1, 5.1, 7, 13, 37, 100)] == [1, 1, 6, 8, 12, 32, 96]
