"""The published sizes, to plan, to build on the meta device and, given the cluster and the corpus, to run.

Pre-training is the papers': DeepSeek LLM 67B (2401.02954), DeepSeekMoE 16B (2401.06066), V2 and V2-Lite (2405.04434),
V3 (2412.19437), as is the context extension of V2 and V3 and the reinforcement learning of R1-Zero (2501.12948). The
two older models were not extended; the phase here is ours. All other nodes are those of `h100`.
"""

from __future__ import annotations

from typing import Any

from flows.recipes import Recipe, h100
from model.presets import preset

CONTEXT = 4096  # of pre-training, in all five

# (sequences a step, peak rate, schedule, tokens, first batch and share of the tokens over which it grows)
PRETRAIN: dict[str, tuple[int, float, str, float, tuple[int, float] | None]] = {
    "v1_67b": (4608, 3.2e-4, "multi_step_v1", 2.0e12, None),
    "moe_16b": (4608, 4.2e-4, "multi_step_v1", 2.0e12, None),
    "v2_lite": (4608, 4.2e-4, "multi_step_v1", 5.7e12, None),
    "v2": (9216, 2.4e-4, "multi_step_v2", 8.1e12, (2304, 225e9 / 8.1e12)),
    "v3": (15360, 2.2e-4, "v3", 14.8e12, (3072, 469e9 / 14.8e12)),
}
YARN_V2 = [{"sequence_length": 32768, "rope_factor": 40.0, "steps": 1000, "batch_size": 576}]
YARN_V3 = [
    {"sequence_length": 32768, "rope_factor": 40.0, "steps": 1000, "batch_size": 1920},
    {"sequence_length": 131072, "rope_factor": 40.0, "steps": 1000, "batch_size": 480},
]
YARN_OLDER = [{"sequence_length": 16384, "rope_factor": 4.0, "steps": 1000, "batch_size": 576}]
# V3's router balances itself by its biases, with the stages' default loss as an aid. The older routers are softmax
# gates without biases and have the loss alone: (α, bias update speed γ).
BALANCE = {"moe_16b": (1e-3, 0.0), "v2_lite": (3e-3, 0.0), "v2": (3e-3, 0.0)}
PHASES = {"v2_lite": YARN_V2, "v2": YARN_V2, "v3": YARN_V3}
END_RATES = {"v3": 7.3e-6}  # V3 extends at the last rate of pre-training
R1_ZERO = {
    "groups_per_step": 32,
    "group_size": 16,
    "rollout_groups": 1,
    "max_new_tokens": 32768,
    "learning_rate": 3e-6,
    "kl_coefficient": 0.001,
    "reference_renew_every": 400,
}


def recipe(name: str) -> Recipe:
    batch, peak, schedule, tokens, ramp = PRETRAIN[name]
    model = preset(name)
    # The context grows in extend_context: pre-training begins without YaRN at its own length.
    plain = {"max_position": CONTEXT, "rope_factor": 1.0, "original_max_position": None}
    pretrain: dict[str, Any] = {
        "model": {**model.model_dump(exclude_unset=True), **plain},
        "steps": _steps(tokens, batch, ramp),
        "batch_size": batch,
        "sequence_length": CONTEXT,
        "learning_rate": {"schedule": schedule, "peak": peak, "warmup_steps": 2000},
        "precision": "bf16",
        "micro_batch_size": 1,
        "validation_every": 1000,
    }
    if ramp:
        pretrain["batch_ramp"] = {"start": ramp[0], "until": _until(batch, ramp)}
    extend: dict[str, Any] = {
        "phases": PHASES.get(name, YARN_OLDER),
        "learning_rate": {"schedule": "constant", "peak": END_RATES.get(name, peak / 10)},
        "micro_batch_size": 1,
        "precision": "bf16",
    }
    if name in BALANCE:
        alpha, speed = BALANCE[name]
        balance = {"balance_alpha": alpha, "bias_update_speed": speed}
        pretrain |= balance
        extend |= balance
    changed: dict[str, dict[str, Any]] = {
        "train_tokenizer": {"vocab_size": model.vocab_size, "digits": "triples" if name == "v3" else "single"},
        "pretrain": pretrain,
        "extend_context": extend,
    }
    changed |= {node: {**h100.CONFIGS[node], **R1_ZERO} for node in ("r1_zero", "reasoning_rl", "final_rl")}
    return Recipe(name, f"the published size {name}", {**h100.CONFIGS, **changed})


def _steps(tokens: float, batch: int, ramp: tuple[int, float] | None) -> int:
    """Steps that read `tokens`, when a ramp begins with smaller batches."""
    mean = batch if ramp is None else batch - batch / 2 * _until(batch, ramp)
    return round(tokens / (mean * CONTEXT))


def _until(batch: int, ramp: tuple[int, float]) -> float:
    """The share of the *steps* in which a ramp reads its share of the tokens.

    The ramp grows by whole first batches, from one to one less than the full batch: on average half the full batch.
    """
    inside, outside = ramp[1] / (batch / 2), (1 - ramp[1]) / batch
    return inside / (inside + outside)
