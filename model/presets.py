"""The published architectures, ready to plan with, to build on the meta device or to train.

Figures: DeepSeek LLM (2401.02954) table 2; DeepSeekMoE (2401.06066) sections 4.1 and 5.1.2; DeepSeek-V2 (2405.04434)
section 3.1.2 and appendix B (V2-Lite); DeepSeek-V3 (2412.19437) section 4.2; context extension by YaRN to 128K in V2
and V3.

DeepSeekMoE 2B gives no FFN width, only that an expert's is a quarter of it. 3456 is 8/3·d_model, rounded up to what
divides well, and gives the printed 2.0B and, with 1.5 times the expert parameters, GShard's 2.9B.
"""

from __future__ import annotations

from infra.config import nearest
from infra.errors import ConfigError
from model.config import ModelConfig

_LLM = {"family": "llama", "vocab_size": 102400, "max_position": 4096}
_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_YARN = {"max_position": 163840, "original_max_position": 4096, "rope_factor": 40.0}
_V2 = {**_MLA, **_YARN, "vocab_size": 102400, "score_function": "softmax", "n_dense_layers": 1, "n_shared_experts": 2}
_PRESETS = {
    "v1_7b": {**_LLM, "d_model": 4096, "n_layers": 30, "n_heads": 32, "d_ff": 11008},
    "v1_67b": {**_LLM, "d_model": 8192, "n_layers": 95, "n_heads": 64, "n_kv_heads": 8, "d_ff": 22016},
    "moe_2b": {
        **{"vocab_size": 8192, "max_position": 2048, "score_function": "softmax"},
        **{"d_model": 1280, "n_layers": 9, "n_heads": 10, "d_ff": 3456},
        **{"n_routed_experts": 63, "n_activated_experts": 7, "n_shared_experts": 1, "moe_d_ff": 864},
    },
    "moe_16b": {
        **{"vocab_size": 102400, "max_position": 4096, "score_function": "softmax"},
        **{"d_model": 2048, "n_layers": 28, "n_heads": 16, "d_ff": 10944, "n_dense_layers": 1},
        **{"n_routed_experts": 64, "n_activated_experts": 6, "n_shared_experts": 2, "moe_d_ff": 1408},
    },
    "v2_lite": {
        **{**_V2, "mscale": 0.707, "mscale_all_dim": 0.707},
        **{"d_model": 2048, "n_layers": 27, "n_heads": 16, "d_ff": 10944},
        **{"n_routed_experts": 64, "n_activated_experts": 6, "moe_d_ff": 1408},
    },
    "v2": {
        **{**_V2, "q_lora_rank": 1536, "mscale": 0.707, "mscale_all_dim": 0.707},
        **{"d_model": 5120, "n_layers": 60, "n_heads": 128, "d_ff": 12288},
        **{"n_routed_experts": 160, "n_activated_experts": 6, "moe_d_ff": 1536},
        **{"n_groups": 8, "n_limited_groups": 3, "route_scale": 16.0},
    },
    "v3": {
        **{**_MLA, **_YARN, "q_lora_rank": 1536, "vocab_size": 129280, "n_mtp": 1},
        **{"d_model": 7168, "n_layers": 61, "n_heads": 128, "d_ff": 18432, "n_dense_layers": 3},
        **{"n_routed_experts": 256, "n_activated_experts": 8, "n_shared_experts": 1, "moe_d_ff": 2048},
        **{"n_groups": 8, "n_limited_groups": 4, "route_scale": 2.5},
    },
}
PRESET_NAMES = tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """The published architecture of that name (`PRESET_NAMES`); ConfigError if there is none."""
    if name not in _PRESETS:
        raise ConfigError(f"no preset {name!r}; {nearest(name, PRESET_NAMES)}")
    return ModelConfig(**_PRESETS[name])
