"""Parity with transformers, the oracle for every published layout, and exact round trips."""

import json
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from infra.errors import ConfigError, InputError
from model.config import ModelConfig
from model.exchange import deepseek as deepseek_layout
from model.exchange import export_hf, import_hf
from model.presets import preset
from model.rope import attention_factor, inverse_frequencies
from model.router import Router
from model.transformer import Transformer

YARN = {"rope_factor": 4.0, "original_max_position": 64, "max_position": 256, "beta_fast": 8.0}
SHARD_BYTES = 20_000


def deepseek(version: int, seed: int) -> ModelConfig:
    """Seeds walk through the switches (query latent 1 3, YaRN 2 3, V2's groups 1 3, tied 2); widths are random."""
    rng = random.Random(f"{version}/{seed}")
    groups = rng.choice([1, 2, 4]) if version == 3 else rng.choice([2, 4]) if seed % 2 else 1
    yarn = {**YARN, "mscale": 0.707, "mscale_all_dim": rng.choice([0.707, 1.0])}
    return ModelConfig(
        vocab_size=rng.choice([97, 128]),
        d_model=rng.choice([32, 48]),
        n_layers=3,
        n_heads=rng.choice([2, 4]),
        d_ff=rng.choice([40, 64]),
        q_lora_rank=rng.choice([16, 24]) if seed % 2 else None,
        kv_lora_rank=rng.choice([16, 24]),
        qk_nope_head_dim=rng.choice([8, 16]),
        qk_rope_head_dim=rng.choice([4, 8]),
        v_head_dim=rng.choice([8, 12]),
        n_dense_layers=seed % 3,
        n_routed_experts=rng.choice([8, 16]),
        n_activated_experts=rng.choice([2, 4]),
        n_shared_experts=rng.choice([1, 2]),
        moe_d_ff=rng.choice([12, 16]),
        n_groups=groups,
        n_limited_groups=max(1, groups // 2),
        route_scale=rng.choice([1.0, 2.5, 16.0]),
        score_function="sigmoid" if version == 3 else "softmax",
        tie_embeddings=seed == 2,
        init_std=0.1,
        **(yarn if seed >= 2 else {}),
    )


def grouped(family: str, seed: int) -> ModelConfig:
    """Seed 1 ties the embeddings, 2 is multi-query, both under YaRN; but for Qwen2, heads have their own width."""
    rng = random.Random(f"{family}/{seed}")
    heads, d_model = rng.choice([2, 4]), rng.choice([32, 48])
    return ModelConfig(
        family=family,
        vocab_size=rng.choice([97, 128]),
        d_model=d_model,
        n_layers=2,
        n_heads=heads,
        n_kv_heads=1 if seed == 2 else rng.choice([heads // 2, heads]),
        head_dim=d_model // heads if family == "qwen2" else rng.choice([10, 20, 28]),
        d_ff=rng.choice([40, 80]),
        rope_theta=rng.choice([1e4, 1e6]),
        tie_embeddings=seed == 1,
        init_std=0.1,
        **(YARN if seed else {}),
    )


CASES = {
    **{f"v{version}_{seed}": deepseek(version, seed) for version in (3, 2) for seed in range(4)},
    **{f"{family}_{seed}": grouped(family, seed) for family in ("llama", "qwen2", "qwen3") for seed in range(3)},
    "dense": deepseek(3, 1).replace(
        n_routed_experts=0, n_activated_experts=0, n_shared_experts=0, n_dense_layers=0, n_groups=1, n_limited_groups=1
    ),
}


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose norms, biases and routing biases are not at their initial values either."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, Router) and config.score_function == "sigmoid":
                module.bias.uniform_(-0.3, 0.3)
    return model


def same_state(a: Transformer, b: Transformer) -> None:
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers_both_ways_and_round_trips_are_exact(name, tmp_path):
    model = build(CASES[name])
    export_hf(model, tmp_path / "whole")
    export_hf(model, tmp_path / "sharded", max_shard_bytes=SHARD_BYTES)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    for folder in ("whole", "sharded"):
        back = import_hf(tmp_path / folder)
        assert back.config == model.config
        same_state(model, back)

    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype=torch.float32)
    oracle.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    oracle.save_pretrained(tmp_path / "theirs whole")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    theirs = import_hf(tmp_path / "theirs")
    same_state(model, theirs)
    same_state(model, import_hf(tmp_path / "theirs whole"))
    assert theirs.config == model.config
    tokens_BT = torch.randint(model.config.vocab_size, (3, 40))
    with torch.no_grad():
        expected_BTV = oracle(tokens_BT).logits
        errors = [float((expected_BTV - ours(tokens_BT).logits_BTV).abs().max()) for ours in (model, theirs)]
    print(f"{name}: max |Δlogit| exported {errors[0]:.2e}, imported {errors[1]:.2e}")
    assert max(errors) <= 1e-4


def test_mtp_modules_keep_the_published_layout_and_equal_transformers(tmp_path):
    model = build(CASES["v3_1"].replace(n_mtp=1))
    config = model.config
    export_hf(model, tmp_path)
    prefix = f"model.layers.{config.n_layers}."
    tensors = load_file(tmp_path / "model.safetensors")
    published = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} <= published
    assert torch.equal(tensors[prefix + "embed_tokens.weight"], model.embedding.weight)
    assert torch.equal(tensors[prefix + "shared_head.head.weight"], model.head_weight)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    same_state(model, import_hf(tmp_path))

    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    module = MtpModel(oracle, 1).eval().layers[0]
    rename = {"shared_head.norm.weight": "post_norm.weight"}
    main = {"enorm", "hnorm", "eh_proj", "shared_head", "embed_tokens"}
    state = {}
    for name in sorted(published - {"embed_tokens.weight", "shared_head.head.weight"}):
        inside = name if name.split(".")[0] in main else f"mtp_block.{name}"
        state[rename.get(name, inside)] = tensors[prefix + name]
    experts = [[state.pop(f"mtp_block.mlp.experts.{e}.{x}_proj.weight") for x in ("gate", "up", "down")]
               for e in range(config.n_routed_experts)]  # fmt: skip
    state["mtp_block.mlp.experts.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])
    state["mtp_block.mlp.experts.down_proj"] = torch.stack([down for _, _, down in experts])
    module.load_state_dict(state)
    tokens_BT = torch.randint(config.vocab_size, (2, 20))
    with torch.no_grad():
        out = model(tokens_BT)
        embedded = oracle.model.embed_tokens(tokens_BT)[:, 1:]
        positions = torch.arange(19)[None]
        hidden = module(
            embedded,
            oracle.model(tokens_BT).last_hidden_state[:, :-1],
            oracle.model.rotary_emb(embedded, positions),
            torch.full((19, 19), float("-inf")).triu(1)[None, None],
            positions,
            None,
        )
        expected = oracle.lm_head(hidden)
    assert out.mtp_logits[0].shape == expected.shape
    assert (out.mtp_logits[0] - expected).abs().max() <= 1e-4


def test_yarn_frequencies_equal_those_of_transformers(tmp_path):
    for name in ("v3_2", "v2_3", "llama_1", "qwen2_1", "qwen3_1"):
        config = CASES[name]
        export_hf(Transformer(config), tmp_path / name)
        oracle = AutoModelForCausalLM.from_pretrained(tmp_path / name).config
        frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](oracle, torch.device("cpu"))
        torch.testing.assert_close(inverse_frequencies(config), frequencies, rtol=1e-6, atol=0)
        assert attention_factor(config) == pytest.approx(factor, rel=1e-12)


def test_the_released_form_of_v3_config_and_fp8_weights_is_read(tmp_path):
    """Released V3: `rope_scaling`, `rope_theta`, FP8 weights with a scale per 128 x 128 block."""
    config = CASES["v3_1"].replace(d_model=160, **YARN)
    model = build(config)
    export_hf(model, tmp_path)
    published = json.loads((tmp_path / "config.json").read_text())
    rope = published.pop("rope_parameters")
    published["rope_theta"] = rope.pop("rope_theta")
    published["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    (tmp_path / "config.json").write_text(json.dumps(published))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    scale = torch.full((2, 1), 0.5)
    scale[1] = 0.25
    tensors[name + "_scale_inv"] = scale
    tensors[name] = (tensors[name] / scale.repeat_interleave(128, 0)[:160]).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    back = import_hf(tmp_path)
    assert back.config == config
    read = back.blocks[0].attention.out.weight.float()
    assert torch.equal(read, (tensors[name].float() * scale.repeat_interleave(128, 0)[:160]).bfloat16().float())
    torch.testing.assert_close(read, model.blocks[0].attention.out.weight, rtol=0.08, atol=0.01)


@pytest.mark.parametrize("name", ["v3_1", "v2_0", "llama_0"])
def test_an_export_in_fp8_has_the_released_form_and_is_read_back(name, tmp_path):
    config = CASES[name].replace(d_model=160)
    model = build(config)
    export_hf(model, tmp_path, fp8=True)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {
        **{"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    }
    tensors = load_file(tmp_path / "model.safetensors")
    coded = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {name for name in tensors if "_proj" in name and "scale_inv" not in name} == coded
    for name in coded:
        scale = tensors[f"{name}_scale_inv"]
        assert scale.dtype == torch.float32
        assert list(scale.shape) == [-(-size // 128) for size in tensors[name].shape]
        assert tensors[name].float().abs().amax() == 448
    assert not [name for name in coded if "embed" in name or "norm" in name or ".gate." in name or "head" in name]

    back = import_hf(tmp_path).state_dict()
    for name, exact in model.state_dict().items():
        if back[name].dtype == torch.bfloat16:
            assert 0.01 < (back[name].float() - exact).norm() / exact.norm() < 0.04, name
        else:
            assert torch.equal(back[name], exact), name


def test_a_missing_tensor_and_a_missing_folder_say_so(tmp_path):
    model = build(CASES["llama_0"])
    export_hf(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        import_hf(tmp_path)
    with pytest.raises(InputError, match="not a published checkpoint"):
        import_hf(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama_0", {"model_type": "mamba"}, "model_type 'mamba'; implemented are deepseek_v3"),
        ("llama_0", {"model_type": "deepseek"}, "model_type 'deepseek'"),
        ("llama_0", {"architectures": ["LlamaForSequenceClassification"]}, "read as LlamaForCausalLM alone"),
        ("llama_0", {"attention_bias": True}, "attention_bias"),
        ("llama_0", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama_0", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ("llama_0", {"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ("llama_0", {"hidden_size": None}, "lacks hidden_size"),
        ("qwen2_0", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3_0", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("qwen3_0", {"attention_bias": True}, "attention_bias"),
        ("v2_0", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("v2_0", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ("v3_0", {"topk_method": "greedy"}, "topk_method='greedy'"),
        ("v3_0", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, changes, message, tmp_path):
    export_hf(build(CASES[name]), tmp_path)
    published = json.loads((tmp_path / "config.json").read_text()) | changes
    published = {field: value for field, value in published.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(published))
    with pytest.raises(ConfigError, match=re.escape(message)):
        import_hf(tmp_path)


def test_a_tensor_of_another_shape_or_without_a_place_is_named(tmp_path):
    export_hf(build(CASES["llama_0"]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"llama has no place for model\.layers\.0\.self_attn\.q_norm\.weight"):
        import_hf(tmp_path)
    save_file({**tensors, "model.norm.weight": torch.ones(7)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight is \[7\]; config\.json makes it"):
        import_hf(tmp_path)


def test_qwen2_heads_of_another_width_cannot_be_published(tmp_path):
    with pytest.raises(ConfigError, match=r"qwen2: head_dim \(20\) must be d_model / n_heads"):
        export_hf(build(CASES["qwen2_0"].replace(head_dim=20)), tmp_path)


def test_a_table_of_v2_and_v2_lite_says_how_published_code_routes():
    lite, whole = (deepseek_layout.to_published(preset(name)) for name in ("v2_lite", "v2"))
    assert (lite["topk_method"], lite["scoring_func"], lite["routed_scaling_factor"]) == ("greedy", "softmax", 1.0)
    assert (whole["topk_method"], whole["n_group"], whole["topk_group"]) == ("group_limited_greedy", 8, 3)
    assert whole["routed_scaling_factor"] == 16.0
    assert not lite["norm_topk_prob"]
    for name, published in (("v2_lite", lite), ("v2", whole)):
        assert deepseek_layout.from_published(published) == preset(name)


def test_a_routing_bias_that_v2_has_no_place_for_is_refused(tmp_path):
    model = build(CASES["v2_3"])
    next(module for module in model.modules() if isinstance(module, Router)).bias[0] = 1.0
    with pytest.raises(ConfigError, match=r"router\.bias"):
        export_hf(model, tmp_path)
