"""The DeepSeek-V3 and V2 layouts (one table: V2 has softmax gates, no routing bias, no MTP).

Rotary rows are interleaved there and halved here. MTP module k lives at `model.layers.{n_layers + k}` and repeats the
shared embedding and head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.errors import ConfigError
from model.config import ModelConfig
from model.exchange.layout import Entry, Part, block_norms, ends, one, swiglu
from model.exchange.llama import common_from_published, common_to_published
from model.exchange.rope import deinterleave


def entries(config: ModelConfig) -> list[Entry]:
    """Our tensors as the published ones; the MTP modules' copies of embedding and head are `shared_copies`."""
    table = ends(config.vocab_size, config.d_model, config.tie_embeddings)
    for layer in range(config.n_layers):
        table += _block(config, layer, f"blocks.{layer}")
    for depth in range(config.n_mtp):
        ours, published = f"mtp.{depth}", f"model.layers.{config.n_layers + depth}"
        table += _block(config, config.n_layers + depth, f"{ours}.block")
        table += [
            one(f"{ours}.embedding_norm.weight", f"{published}.enorm.weight", config.d_model),
            one(f"{ours}.hidden_norm.weight", f"{published}.hnorm.weight", config.d_model),
            one(f"{ours}.projection.weight", f"{published}.eh_proj.weight", config.d_model),
            one(f"{ours}.norm.weight", f"{published}.shared_head.norm.weight", config.d_model),
        ]
    return table


def shared_copies(config: ModelConfig) -> list[tuple[str, str]]:
    """(published name, ours) of what MTP modules share with the main model and the layout repeats; no MTP, none."""
    head = "embedding.weight" if config.tie_embeddings else "head.weight"
    return [
        copy
        for depth in range(config.n_layers, config.n_layers + config.n_mtp)
        for copy in (
            (f"model.layers.{depth}.embed_tokens.weight", "embedding.weight"),
            (f"model.layers.{depth}.shared_head.head.weight", head),
        )
    ]


def _block(config: ModelConfig, layer: int, ours: str) -> list[Entry]:
    published = f"model.layers.{layer}"
    table = block_norms(ours, published, config.d_model) + _attention(config, f"{ours}.attention", published)
    if not config.has_experts(layer):
        return table + swiglu(f"{ours}.ffn", f"{published}.mlp", config.d_model, config.d_ff)
    ours, published = f"{ours}.ffn", f"{published}.mlp"
    experts = [f"{published}.experts.{expert}" for expert in range(config.n_routed_experts)]
    gate_up = [Part(f"{name}.{x}_proj.weight", config.moe_d_ff) for name in experts for x in ("gate", "up")]
    down = [Part(f"{name}.down_proj.weight", config.d_model) for name in experts]
    table += [
        one(f"{ours}.router.weight", f"{published}.gate.weight", config.n_routed_experts),
        Entry(f"{ours}.experts.gate_up", tuple(gate_up)),
        Entry(f"{ours}.experts.down", tuple(down)),
    ]
    if config.score_function == "sigmoid":
        bias = f"{published}.gate.e_score_correction_bias"
        table.append(one(f"{ours}.router.bias", bias, config.n_routed_experts))
    if config.n_shared_experts:
        width = config.n_shared_experts * config.moe_d_ff
        table += swiglu(f"{ours}.shared", f"{published}.shared_experts", config.d_model, width)
    return table


def _attention(config: ModelConfig, ours: str, published: str) -> list[Entry]:
    assert config.kv_lora_rank and config.qk_nope_head_dim and config.v_head_dim
    published = f"{published}.self_attn"
    query_rows = config.n_heads * config.head_dim
    query_order = deinterleave(config.n_heads, config.qk_nope_head_dim, config.rope_dim)
    latent = Part(
        f"{published}.kv_a_proj_with_mqa.weight",
        config.kv_lora_rank + config.rope_dim,
        deinterleave(1, config.kv_lora_rank, config.rope_dim),
    )
    up_rows = config.n_heads * (config.qk_nope_head_dim + config.v_head_dim)
    table = [
        one(f"{ours}.kv_norm.weight", f"{published}.kv_a_layernorm.weight", config.kv_lora_rank),
        one(f"{ours}.kv_up.weight", f"{published}.kv_b_proj.weight", up_rows),
        one(f"{ours}.out.weight", f"{published}.o_proj.weight", config.d_model),
    ]
    if config.q_lora_rank is None:
        query = Part(f"{published}.q_proj.weight", query_rows, query_order)
        return [*table, Entry(f"{ours}.qkv.weight", (query, latent))]
    compressed = Part(f"{published}.q_a_proj.weight", config.q_lora_rank)
    return [
        *table,
        Entry(f"{ours}.qkv.weight", (compressed, latent)),
        one(f"{ours}.q_norm.weight", f"{published}.q_a_layernorm.weight", config.q_lora_rank),
        Entry(f"{ours}.q_up.weight", (Part(f"{published}.q_b_proj.weight", query_rows, query_order),)),
    ]


# Ours and theirs, where the value is the same.
_SAME = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "n_dense_layers": "first_k_dense_replace",
    "n_routed_experts": "n_routed_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_shared_experts": "n_shared_experts",
    "moe_d_ff": "moe_intermediate_size",
    "n_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
}


def to_published(config: ModelConfig) -> dict[str, Any]:
    """config.json. vLLM and SGLang read `topk_method` and `scoring_func` to tell V3's routing from V2's."""
    if not config.is_mla:
        raise ConfigError("only MLA models have a published deepseek_v3 or deepseek_v2 layout: set kv_lora_rank")
    if config.router != "deepseek":
        raise ConfigError(f"router {config.router!r} has no published layout: only router='deepseek' has one")
    sigmoid = config.score_function == "sigmoid"
    greedy = "greedy" if config.n_groups == 1 else "group_limited_greedy"
    published = {
        "architectures": ["DeepseekV3ForCausalLM" if sigmoid else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        **common_to_published(config),
        **{theirs: getattr(config, ours) for ours, theirs in _SAME.items()},
        "num_key_value_heads": config.n_heads,
        "moe_layer_freq": 1,
        "norm_topk_prob": sigmoid,
        "scoring_func": config.score_function,
        "topk_method": "noaux_tc" if sigmoid else greedy,
        "rope_interleave": True,
        "attention_bias": False,
        "num_nextn_predict_layers": config.n_mtp,
    }
    return published if config.is_moe else published | {"first_k_dense_replace": config.n_layers}


def from_published(published: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig from config.json."""
    sigmoid = published["model_type"] == "deepseek_v3"
    methods = ("noaux_tc",) if sigmoid else ("greedy", "group_limited_greedy")
    method = published.get("topk_method") or methods[0]
    if method not in methods:
        raise ConfigError(f"config.json: topk_method={method!r}; implemented is {' or '.join(methods)}")
    implemented = {
        "attention_bias": False,
        "mlp_bias": False,
        "moe_layer_freq": 1,
        "rope_interleave": True,
        "norm_topk_prob": sigmoid,
        "scoring_func": "sigmoid" if sigmoid else "softmax",
    }
    for name, value in implemented.items():
        if published.get(name, value) != value:
            raise ConfigError(f"config.json: {name}={published[name]!r}; only {value!r} is implemented")
    fields = {ours: published[theirs] for ours, theirs in _SAME.items() if published.get(theirs) is not None}
    if not fields.get("n_routed_experts"):
        fields.pop("n_dense_layers", None)
    if method == "greedy":
        fields |= {"n_groups": 1, "n_limited_groups": 1}
    return ModelConfig(
        family="deepseek_v3",
        score_function="sigmoid" if sigmoid else "softmax",
        n_mtp=published.get("num_nextn_predict_layers") or 0,
        **common_from_published(published),
        **fields,
    )
