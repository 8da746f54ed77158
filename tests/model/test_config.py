"""What a config counts is what gets built, and what the papers print."""

import pytest
import torch

from infra.errors import ConfigError
from model.config import ModelConfig
from model.presets import PRESET_NAMES, preset
from model.transformer import Transformer

MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
TABLES = ("embedding.weight", "head.weight")
MOE = {"n_routed_experts": 8, "n_activated_experts": 2, "moe_d_ff": 16, "n_dense_layers": 1}


def built(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def check_counts(config: ModelConfig) -> None:
    model = built(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    experts = sum(size for name, size in sizes.items() if ".experts." in name and not name.startswith("mtp."))
    idle = experts * (config.n_routed_experts - config.n_activated_experts) // max(config.n_routed_experts, 1)
    assert config.n_parameters() == sum(sizes.values())
    assert config.n_mtp_parameters() == mtp
    assert config.n_active_parameters() == sum(sizes.values()) - mtp - idle
    assert config.n_embedding_parameters() == sum(size for name, size in sizes.items() if name in TABLES)
    assert config.cache_bytes_per_token() == 2 * sum(block.attention.cache().width for block in model.blocks)
    # 6 FLOPs a weight that a token meets, and attention to 512 tokens: 2 for scores, 2 for values, thrice.
    met = config.n_active_parameters() - sum(p.numel() for p in model.parameters() if p.ndim == 1)
    met -= 0 if config.tie_embeddings else config.vocab_size * config.d_model  # looked up
    attention = 6 * 512 * config.n_layers * config.n_heads * (config.head_dim + config.value_dim)
    if config.n_mtp == 0:
        assert config.flops_per_token(512) == 6 * met + attention


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_the_counts_equal_the_model_built_on_the_meta_device(name):
    config = preset(name)
    check_counts(config)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(**MLA, **MOE, n_shared_experts=2, n_mtp=2, q_lora_rank=12),
        ModelConfig(**MLA, tie_embeddings=True),
        ModelConfig(**MLA, **MOE, score_function="softmax", n_groups=4, n_limited_groups=2, capacity_factor=1.0),
        ModelConfig(**MOE, router="gshard", capacity_factor=1.0),
        ModelConfig(**{**MOE, "n_activated_experts": 1}, router="hash", n_mtp=1),
        ModelConfig(family="qwen2", n_kv_heads=2),
        ModelConfig(family="qwen3", n_kv_heads=2, head_dim=48),
        ModelConfig(family="llama", n_kv_heads=1, head_dim=48),
    ],
)
def test_the_counts_hold_for_every_switch(config):
    check_counts(config)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("v1_7b", 6.9e9, None),
        ("v1_67b", 67e9, None),
        ("moe_2b", 2.0e9, 0.3e9),
        ("moe_16b", 16.4e9, 2.8e9),
        ("v2_lite", 15.7e9, 2.4e9),
        ("v2", 236e9, 21e9),
        ("v3", 671e9, 37e9),
    ],
)
def test_totals_are_the_published_ones(name, total, active):
    config = preset(name)  # the papers count the main model
    assert config.n_parameters() - config.n_mtp_parameters() == pytest.approx(total, rel=0.01)
    if active:
        # They round to two digits and differ in whether the embedding table, of which a token reads one row, counts.
        table = config.vocab_size * config.d_model
        counts = (config.n_active_parameters(), config.n_active_parameters() - table)
        assert min(abs(count / active - 1) for count in counts) < (0.022 if active > 1e9 else 0.05)


def test_cache_and_flops_are_the_papers():
    v2, v1 = preset("v2"), preset("v1_67b")
    assert v2.cache_bytes_per_token(1) == 60 * 576  # V2: kv_lora_rank + rope width a layer
    assert v1.cache_bytes_per_token(1) == 95 * 2 * 8 * 128  # keys and values of 8 heads
    # V2, table 1 of section 2.1: MLA's cache is that of GQA with 2.25 groups.
    assert v2.cache_bytes_per_token() == 2.25 * 2 * 128 * 60 * 2
    # DeepSeek LLM, section 3.1: attention costs 12 n_layer d_model l_seq a token.
    extra = v1.flops_per_token(4096) - v1.flops_per_token(2048)
    assert extra == 12 * 95 * 8192 * 2048
    assert v1.flops_per_token(1) == pytest.approx(6 * 67e9, rel=0.02)


def test_the_cache_shrinks_by_the_papers_93_percent_in_its_convention():
    """V2, figure 1: its cache at 6 bits an element (section 3.2.3) against DeepSeek 67B's in BF16."""
    v2, v1 = preset("v2"), preset("v1_67b")
    assert round(100 * (1 - v2.cache_bytes_per_token(6 / 8) / v1.cache_bytes_per_token(2)), 1) == 93.3
    assert round(100 * (1 - v2.cache_bytes_per_token() / v1.cache_bytes_per_token()), 1) == 82.2


def test_non_embedding_flops_are_the_scaling_laws_m():
    """DeepSeek LLM, equation 2: M = 72 n_layer d² + 12 n_layer d l_seq, where the FFN has 8 d² weights."""
    config = ModelConfig(family="llama", d_model=96, n_layers=5, n_heads=6, d_ff=256, vocab_size=1000)
    assert config.non_embedding_flops_per_token(2048) == 72 * 5 * 96**2 + 12 * 5 * 96 * 2048


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "llama", "n_routed_experts": 8}, "family 'llama' is dense"),
        ({"kv_lora_rank": 16}, "qk_nope_head_dim"),
        ({"q_lora_rank": 16}, "belong to MLA"),
        ({"n_heads": 4, "n_kv_heads": 3}, "multiple of n_kv_heads"),
        ({"head_dim": 31}, "must be even"),
        ({**MOE, "n_activated_experts": 9}, "n_activated_experts"),
        ({"n_shared_experts": 1}, "need n_routed_experts"),
        ({**MOE, "n_dense_layers": 9}, "exceeds n_layers"),
        ({**MOE, "n_groups": 3}, "must divide"),
        ({**MOE, "n_groups": 8, "n_limited_groups": 4}, "at least 2"),
        ({**MOE, "n_activated_experts": 4, "n_groups": 4}, "raise n_limited_groups"),
        ({**MOE, "router": "switch"}, "n_activated_experts=1"),
        ({**MOE, "router": "gshard", "score_function": "sigmoid"}, "score_function='softmax'"),
        ({"router": "hash"}, "needs n_routed_experts"),
        ({**MOE, "capacity_factor": 1.0}, "n_groups > 1"),
        ({"capacity_factor": 1.0}, "set n_routed_experts"),
        ({"rope_factor": 4.0}, "original_max_position"),
        ({"rope_factor": 4.0, "original_max_position": 64, "max_position": 1024}, "exceeds rope_factor"),
        ({"kv_lora_rnak": 3}, "kv_lora_rank"),
    ],
)
def test_a_contradiction_says_what_to_change(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.parse(changes)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="v2_lite"):
        preset("v2_light")
