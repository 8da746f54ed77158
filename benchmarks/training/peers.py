"""The peers of `step.py`: the same V2-Lite-shaped model by torchtitan and by transformers, bf16 weights, fused AdamW.

Each builder returns (parameters, loss function of tokens [B, T + 1]). torchtitan 0.2.2 is read from an unpacked wheel
(`--titan`); its data and command-line dependencies are not needed for a model and are stood in for when absent.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig

Peer = tuple[Iterable[nn.Parameter], Callable[[Tensor], Tensor]]
UNUSED_BY_A_MODEL = (
    *("datasets", "datasets.distributed", "torchdata", "torchdata.stateful_dataloader", "torchdata.nodes"),
    *("tyro", "tyro.conf", "tyro.constructors", "tyro.extras", "tomli"),
)


def torchtitan(config: ModelConfig, folder: str) -> Peer:
    """torchtitan's DeepSeek-V3 model, compiled piece by piece as its own `parallelize` does for mixtures of experts."""
    sys.path.insert(0, folder)
    for name in UNUSED_BY_A_MODEL:
        _stand_in(name)
    from torchtitan.models.deepseek_v3.model.args import DeepSeekV3ModelArgs
    from torchtitan.models.deepseek_v3.model.model import DeepSeekV3Model
    from torchtitan.models.moe import MoEArgs
    from torchtitan.models.moe import moe as titan_moe

    args = DeepSeekV3ModelArgs(
        vocab_size=config.vocab_size,
        dim=config.d_model,
        inter_dim=config.d_ff,
        moe_inter_dim=config.moe_d_ff,
        n_layers=config.n_layers,
        n_dense_layers=config.n_dense_layers,
        n_heads=config.n_heads,
        moe_args=MoEArgs(
            num_experts=config.n_routed_experts,
            num_shared_experts=config.n_shared_experts,
            top_k=config.n_activated_experts,
            score_func="softmax",
            route_norm=False,
            score_before_experts=False,
        ),
        q_lora_rank=0,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        max_seq_len=config.max_position,
    )
    args.moe_impl = "standard"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = DeepSeekV3Model(args)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cuda"))
    model.to("cuda")
    torch._dynamo.config.capture_scalar_outputs = True
    for block in model.layers.values():
        if not block.moe_enabled:
            block.compile()
            continue
        for name, child in list(block.named_children()):
            if isinstance(child, titan_moe.MoE):
                for inner, part in list(child.named_children()):
                    if inner != "experts":
                        setattr(child, inner, torch.compile(part))
            else:
                setattr(block, name, torch.compile(child))
    titan_moe._run_experts_grouped_mm = torch.compile(titan_moe._run_experts_grouped_mm)
    return model.parameters(), lambda tokens_BT: _loss(model(tokens_BT[:, :-1]), tokens_BT)


def transformers(config: ModelConfig, compiled: bool) -> Peer:
    """transformers' DeepseekV3ForCausalLM with SDPA; `compiled` compiles every layer."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    published = DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        moe_intermediate_size=config.moe_d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_heads,
        n_shared_experts=config.n_shared_experts,
        n_routed_experts=config.n_routed_experts,
        num_experts_per_tok=config.n_activated_experts,
        first_k_dense_replace=config.n_dense_layers,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        kv_lora_rank=config.kv_lora_rank,
        max_position_embeddings=config.max_position,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(published, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train()
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    return model.parameters(), lambda tokens_BT: _loss(model(tokens_BT[:, :-1], use_cache=False).logits, tokens_BT)


def _loss(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


def _stand_in(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []

        def attribute(wanted: str) -> Any:
            if wanted.startswith("__"):
                raise AttributeError(wanted)
            return type(wanted, (), {})

        module.__getattr__ = attribute  # type: ignore[method-assign]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
