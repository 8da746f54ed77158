"""Weights begin as the papers have them: every matrix N(0, 0.006²), norms 1, biases 0 (V1 2.3, V2 3.1.2, V3 4.2)."""

import pytest
import torch

from model.config import ModelConfig
from model.presets import PRESET_NAMES, preset
from model.transformer import Transformer

V3 = ModelConfig(
    d_model=256,
    n_layers=2,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    n_dense_layers=1,
    n_routed_experts=64,
    n_activated_experts=4,
    n_shared_experts=1,
    moe_d_ff=64,
    n_mtp=1,
)
QWEN2 = ModelConfig(family="qwen2", d_model=256, n_heads=8, n_kv_heads=2, tie_embeddings=True)


@pytest.mark.parametrize("config", [V3, QWEN2], ids=["deepseek_v3", "qwen2"])
def test_every_parameter_begins_as_published(config):
    torch.manual_seed(0)
    model = Transformer(config)
    seen = set()
    for name, parameter in model.named_parameters():
        parameter = parameter.detach()
        seen.add(name)
        if parameter.ndim >= 2:  # embedding, head, router, experts and MTP's projection among them
            margin = 5 / parameter.numel() ** 0.5  # five standard errors
            assert abs(float(parameter.mean())) < margin * 0.006, name
            assert float(parameter.std()) == pytest.approx(0.006, rel=margin), name
        else:
            assert torch.all(parameter == (0 if name.endswith("bias") else 1)), name
    assert {"embedding.weight", "blocks.0.attention.qkv.weight"} <= seen
    if config is V3:
        assert {"head.weight", "blocks.1.ffn.router.weight", "blocks.1.ffn.experts.down"} <= seen
        assert {"mtp.0.projection.weight", "mtp.0.block.ffn.experts.gate_up", "mtp.0.norm.weight"} <= seen
        assert torch.all(model.blocks[1].ffn.router.bias == 0)


def test_all_published_sizes_have_that_deviation():
    assert {preset(name).init_std for name in PRESET_NAMES} == {0.006}
