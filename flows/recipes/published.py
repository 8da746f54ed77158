"""The published sizes, to plan, to build on the meta device and, where one GPU holds the model in training, to run: no
stage shards a model over GPUs yet, so of 80 GB that is `moe_2b` (up to 18 bytes a parameter) and no other.

Pre-training is the papers': DeepSeek LLM 67B (2401.02954), DeepSeekMoE 2B and 16B (2401.06066), V2 and V2-Lite
(2405.04434), V3 (2412.19437), as is the context extension of V2 and V3 and the reinforcement learning of R1-Zero
(2501.12948). The three older models were not extended; the phase here is ours. All other nodes are those of `h100`.
"""

from __future__ import annotations

from typing import Any

from flows.recipes import Recipe, h100
from model.presets import preset

# (sequences a step, peak rate, schedule, tokens, first batch and share of the tokens over which it grows)
PRETRAIN: dict[str, tuple[int, float, str, float, tuple[int, float] | None]] = {
    "v1_67b": (4608, 3.2e-4, "multi_step_v1", 2.0e12, None),
    "moe_2b": (2048, 1.08e-3, "multi_step_v1", 1.0e11, None),
    "moe_16b": (4608, 4.2e-4, "multi_step_v1", 2.0e12, None),
    "v2_lite": (4608, 4.2e-4, "multi_step_v1", 5.7e12, None),
    "v2": (9216, 2.4e-4, "multi_step_v2", 8.1e12, (2304, 225e9 / 8.1e12)),
    "v3": (15360, 2.2e-4, "v3", 14.8e12, (3072, 469e9 / 14.8e12)),
}
CONTEXT = {"moe_2b": 2048}  # of pre-training; 4096 in all others
YARN_V2 = [{"sequence_length": 32768, "rope_factor": 40.0, "steps": 1000, "batch_size": 576}]
YARN_V3 = [
    {"sequence_length": 32768, "rope_factor": 40.0, "steps": 1000, "batch_size": 1920},
    {"sequence_length": 131072, "rope_factor": 40.0, "steps": 1000, "batch_size": 480},
]
# V3's router balances itself by its biases, with the stages' default loss as an aid. The older routers are softmax
# gates without biases and have losses alone: DeepSeekMoE sections 4.1.2 and 5.1.2, V2 section 3.1.2 and appendix B.
# Only V2 spreads the experts of a layer over devices; there it has losses between them, and drops tokens.
ALPHAS = {
    "moe_2b": {"balance_alpha": 0.01},
    "moe_16b": {"balance_alpha": 0.001},
    "v2_lite": {"balance_alpha": 0.001},
    "v2": {"balance_alpha": 0.003, "device_balance_alpha": 0.05, "communication_balance_alpha": 0.02},
}
DROPPING = {"v2": {"capacity_factor": 1.0}}
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
    context = CONTEXT.get(name, 4096)
    # The context grows in extend_context: pre-training begins without YaRN at its own length.
    plain = {"max_position": context, "rope_factor": 1.0, "original_max_position": None}
    pretrain: dict[str, Any] = {
        "model": {**model.model_dump(exclude_unset=True), **plain, **DROPPING.get(name, {})},
        "steps": _steps(tokens / context, batch, ramp),
        "batch_size": batch,
        "sequence_length": context,
        "learning_rate": {"schedule": schedule, "peak": peak, "warmup_steps": 2000},
        "precision": "bf16",
        "micro_batch_size": 1,
        "validation_every": 1000,
    }
    if ramp:
        pretrain["batch_ramp"] = {"start": ramp[0], "until": _until(batch, ramp)}
    longer = {"sequence_length": 4 * context, "rope_factor": 4.0, "steps": 1000, "batch_size": 576}
    extend: dict[str, Any] = {
        "phases": PHASES.get(name, [longer]),
        "learning_rate": {"schedule": "constant", "peak": END_RATES.get(name, peak / 10)},
        "micro_batch_size": 1,
        "precision": "bf16",
    }
    if name in ALPHAS:
        balance = {**ALPHAS[name], "bias_update_speed": 0.0}
        pretrain |= balance
        extend |= balance
    changed: dict[str, dict[str, Any]] = {
        "train_tokenizer": {
            "vocab_size": model.vocab_size,
            "digits": "triples" if name == "v3" else "single",
            "tool_marks": name == "v3",
        },
        "pretrain": pretrain,
        "extend_context": extend,
    }
    changed["sample_zero"] = {**h100.CONFIGS["sample_zero"], "shots": 4}  # which ours are too small to read past
    changed |= {node: {**h100.CONFIGS[node], **R1_ZERO} for node in ("r1_zero", "reasoning_rl", "final_rl")}
    return Recipe(name, f"the published size {name}", {**h100.CONFIGS, **changed})


def _steps(sequences: float, batch: int, ramp: tuple[int, float] | None) -> int:
    """Steps that read so many sequences, when a ramp begins with smaller batches."""
    mean = batch if ramp is None else batch - batch / 2 * _until(batch, ramp)
    return round(sequences / mean)


def _until(batch: int, ramp: tuple[int, float]) -> float:
    """The share of the *steps* in which a ramp reads its share of the tokens.

    The ramp grows by whole first batches, from one to one less than the full batch: on average half the full batch.
    """
    inside, outside = ramp[1] / (batch / 2), (1 - ramp[1]) / batch
    return inside / (inside + outside)
