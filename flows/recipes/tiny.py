"""Two CPU cores, minutes for the whole line. Every number stands here, node by node."""

from __future__ import annotations

from typing import Any

from flows.recipes import Recipe

# What a model of three million parameters learns in minutes and does not master at once: gains have room to show.
FAMILIES = ("chain_sum", "word_sum", "compare", "sort", "reverse")
LEVELS = (1,)
REPLY = {"max_new_tokens": 48}
EVALUATE = {"samples": 16, **REPLY}

MODEL = {
    **{"family": "deepseek_v3", "d_model": 128, "n_layers": 4, "n_heads": 4, "d_ff": 384, "init_std": 0.05},
    **{"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
    **{"n_dense_layers": 1, "n_routed_experts": 8, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 128},
    **{"n_groups": 4, "n_limited_groups": 2, "n_mtp": 1},
}
STUDENT = {"d_model": 96, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "d_ff": 256, "init_std": 0.05}
# Attention stays inside a document: the problems of a few dozen tokens that share a window with others teach a model of
# this size little (benchmarks/LOG.md, 2026-11-26). The published way is to let it cross.
WINDOWS = {"batch_size": 8, "sequence_length": 128, "mask_documents": True}
STUDENT_BASE = {
    **{"steps": 480, **WINDOWS, "validation_every": 160},
    "learning_rate": {"schedule": "wsd", "peak": 2e-3, "warmup_steps": 20},
}
# Small batches of short rows: a tiny model gains from many steps more than from exact gradients.
TUNE = {
    **{"batch_size": 8, "sequence_length": 128},
    "learning_rate": {"schedule": "cosine", "peak": 5e-4, "warmup_steps": 5},
}
GRPO = {
    **{"groups_per_step": 64, "rollout_groups": 32, "group_size": 8, "learning_rate": 1.3e-4, "warmup_steps": 3},
    "micro_batch_tokens": 2048,  # what stays in a core's cache
    "rewards": {"accuracy": 1.0, "format": 0.1, "language": 0.1},
    **REPLY,
}

ZERO = {"rewards": {"accuracy": 1.0, "format": 0.1}}  # R1-Zero has no language reward (DeepSeek-R1, section 2.2)

# Round by round (DeepSeekMath, section 4.1.4). There the reward model alone says what is good; at this size it was
# hacked until hardly a reply was right (benchmarks/LOG.md, 2026-11-26), so the verifier is paid beside it.
ROUND = {
    "preferences": {"judge": "accuracy", "pairs_per_problem": 2},
    "reward_model": {
        **{"epochs": 2.0, "batch_size": 16, "target": "response"},
        "learning_rate": {"schedule": "cosine", "peak": 5e-4, "warmup_steps": 5},
    },
    "iterative_rl": {
        **{"name": "iterative_rl", **GRPO, "steps": 20},
        "rewards": {"accuracy": 1.0, "format": 0.1, "preference": 0.2},
        "kl_coefficient": 0.04,
    },
}
# A chain without words mixes none: the last keeps a silent model from passing by the one before.
REQUIRED = ("pass_1 >= 0.5", "format >= 0.9", "chain_mixed <= 0.1", "chain_wordless <= 0.1")
# The prompt behind which V3's expert learns R1's replies asks for reflection and verification (V3, section 5.1); its
# words are not published. These are what a row of 128 tokens has room for.
REFLECT = "Reflect and verify."
EQUAL_COMPUTE = tuple({"left": name, "right": "rl_only_llama"} for name in ("distilled_equal", "distilled_equal_all"))
CONCISE = (
    {"left": "r1", "right": "v3_from_r1", "measure": "length"},
    {"left": "v3_from_r1", "right": "r1", "margin": -0.05, "strict": False},
)

# General prompts may cost no skill.
SCENARIOS = ({"left": "r1_all_scenarios", "right": "r1", "margin": -0.05, "strict": False},)

# At the budgets below the best size is a few 10⁴ FLOPs per token. Heads four wide let the width grow in small steps.
LADDER = {"family": "llama", "d_model": 64, "n_layers": 2, "n_heads": 16, "d_ff": 176, "init_std": 0.1}

CONFIGS: dict[str, dict[str, Any]] = {
    "ingest_api_zh": {"source": {"kind": "builtin", "name": "api_reference_zh"}, "max_bytes": 3_000_000},
    "ingest_api_en": {"source": {"kind": "builtin", "name": "api_reference_en"}, "max_bytes": 2_000_000},
    "ingest_python_docs": {"source": {"kind": "builtin", "name": "python_docs"}, "max_bytes": 1_000_000},
    "ingest_python_code": {"source": {"kind": "builtin", "name": "python_code"}, "max_bytes": 1_000_000},
    "ingest_math": {"source": {"kind": "worked_problems", "families": FAMILIES, "levels": LEVELS, "n": 13_000}},
    "deduplicate": {"threshold": 0.8},
    "filter": {"quality_documents": 1500},
    "mix": {
        "shares": [
            {"language": "en", "domain": "math", "weight": 0.35},
            {"language": "zh", "domain": "math", "weight": 0.35},
            {"language": "zh", "weight": 0.12},
            {"language": "en", "weight": 0.12},
            {"language": "code", "weight": 0.06},
        ],
        "max_epochs": 2.0,
    },
    "train_tokenizer": {"vocab_size": 2048, "digits": "single", "max_bytes": 4_000_000},
    "tokenize": {"validation_fraction": 0.05},
    # Not the corpus's own seed, with which all that is learnt from here has been read, solved: so has 45 %.
    "generate_problems": {"families": FAMILIES, "levels": LEVELS, "n_train": 8_000, "n_heldout": 320, "seed": 1},
    "pretrain": {
        "model": MODEL,
        **{"steps": 640, **WINDOWS, "validation_every": 160},
        "learning_rate": {"schedule": "v3", "peak": 2e-3, "warmup_steps": 20},
        "bias_update_speed": 1e-2,
    },
    "scaling_laws": {
        "model": LADDER,
        "sequence_length": 64,
        "batch_size": 4,
        "learning_rate": {"schedule": "multi_step_v1", "peak": 3e-2, "warmup_steps": 5},
        "hyper": {
            "budgets": [
                {"compute": 5e8, "scale": 2e4},
                {"compute": 1.2e9, "scale": 2e4},
                {"compute": 3e9, "scale": 3.2e4},
            ]
        },
        "budgets": [
            {"compute": 2.5e9, "scales": [1.1e4, 2e4, 3.2e4, 4.5e4, 6e4]},
            {"compute": 4e9, "scales": [1.1e4, 2e4, 3.2e4, 4.5e4, 7.8e4]},
            {"compute": 7e9, "scales": [1.1e4, 2e4, 3.2e4, 6e4, 1e5]},
            {"compute": 1.2e10, "scales": [2e4, 3.2e4, 4.5e4, 7.8e4, 1.2e5]},
        ],
        "held_out": 3e10,
    },
    "extend_context": {
        "phases": [
            {"sequence_length": 256, "rope_factor": 4.0, "steps": 15, "batch_size": 8},
            {"sequence_length": 512, "rope_factor": 4.0, "steps": 15, "batch_size": 4},
        ],
        "mask_documents": True,
        "documents": {"windows": None},  # the mixture as it is: what comes next needs the short texts too
        "learning_rate": {"schedule": "constant", "peak": 2e-4},
        # At chance: a model of this size looks back after some 26,000 lookups, and the whole line reads 9,000 windows.
        "needle": {"lengths": (128, 256, 512), "depths": 5, "cases": 3},
    },
    "probe_r1": {"name": "r1", "cases": 40, **REPLY},
    "model_card_r1": {"name": "Fathom R1 tiny", "license": "apache-2.0"},
    "promote_r1": {"tag": "r1@released", "require": REQUIRED},
    "evaluate_base": {"name": "base", "template": "r1_zero", **EVALUATE},
    "r1_zero": {"name": "r1_zero", "template": "r1_zero", **GRPO, **ZERO, "steps": 30},
    "evaluate_r1_zero": {"name": "r1_zero", "template": "r1_zero", **EVALUATE},
    # No shots: a model that has met every problem alone in its window cannot read past an example. Behind one, 19 % of
    # R1-Zero's replies were well-formed and 0.5 % right, against 99 % and 67 % without.
    "sample_zero": {"problems": {"limit": 500}, "template": "r1_zero", "samples": 4, **REPLY},
    "cold_start_samples": {"keep_per_problem": 2},
    "cold_start": {"epochs": 2.0, **TUNE},
    "evaluate_cold_start": {"name": "cold_start", **EVALUATE},
    "reasoning_rl": {"name": "reasoning_rl", **GRPO, "steps": 80},
    "evaluate_reasoning_rl": {"name": "reasoning_rl", **EVALUATE},
    "sample": {"problems": {"limit": 2_000}, "samples": 4, **REPLY},
    "rejection_sample": {"keep_per_problem": 2},
    "general": {"max_characters": 120, "max_conversations": 2_000},
    "sft": {"epochs": 1.0, **TUNE},
    "final_rl": {"name": "final_rl", **GRPO, "steps": 25},
    "evaluate_r1": {"name": "r1", **EVALUATE},
    "sample_teacher": {"problems": {"limit": 3_000}, "samples": 4, **REPLY},
    "teacher_samples": {"keep_per_problem": 2},
    "student_base_llama": {"model": {"family": "llama", **STUDENT}, **STUDENT_BASE},
    "student_base_qwen": {"model": {"family": "qwen2", **STUDENT}, **STUDENT_BASE},
    "distill_llama": {"epochs": 2.0, **TUNE},
    "distill_qwen": {"epochs": 2.0, **TUNE},
    "rl_student_llama": {"name": "rl_only_llama", "template": "r1_zero", **GRPO, **ZERO, "steps": 40},
    "evaluate_distill_llama": {"name": "distilled_llama", **EVALUATE},
    "evaluate_distill_qwen": {"name": "distilled_qwen", **EVALUATE},
    "evaluate_rl_student_llama": {"name": "rl_only_llama", "template": "r1_zero", **EVALUATE},
    "report": {"title": "The tiny line"},
    "sample_start": {"problems": {"limit": 1_000}, "samples": 8, **REPLY},
    **{f"{name}_{number}": values for number in (1, 2) for name, values in ROUND.items()},
    "evaluate_iterative_rl": {"name": "iterative_rl", **EVALUATE},
    "distill_equal": {"budget": "student", **TUNE},
    "evaluate_distill_equal": {"name": "distilled_equal", **EVALUATE},
    "distill_equal_all": {"budget": "with_teacher", **TUNE},
    "evaluate_distill_equal_all": {"name": "distilled_equal_all", **EVALUATE},
    "report_equal": {"title": "Distillation or reinforcement learning", "claims": EQUAL_COMPUTE, "rises": ()},
    "r1_patterns": {"keep_per_problem": 2, "system_prompt": REFLECT},
    "expert": {"problems": {"limit": 1_000}, "epochs": 1.0, **TUNE},
    "expert_rl": {"name": "expert_rl", **GRPO, "rewards": {**GRPO["rewards"], "overlong": 0.2}, "steps": 25},
    "sample_expert": {"problems": {"limit": 1_000}, "samples": 8, **REPLY},
    "concise": {"keep_per_problem": 1, "prefer": "shortest"},
    "v3_sft": {"epochs": 2.0, **TUNE},
    "evaluate_v3_sft": {"name": "v3_from_r1", **EVALUATE},
    "general_preferences": {"pairs_per_prompt": 2},
    "general_judge": {
        **{"epochs": 1.0, "batch_size": 16, "target": "answer", "heldout_share": 0.08},
        "learning_rate": {"schedule": "cosine", "peak": 5e-4, "warmup_steps": 5},
    },
    "scenarios_rl": {
        **{"name": "r1_all_scenarios", **GRPO, "general_groups": 16},
        **{"rewards": {**GRPO["rewards"], "preference": 1.0}, "steps": 25},
    },
    "evaluate_scenarios_rl": {"name": "r1_all_scenarios", **EVALUATE},
    "report_scenarios": {"title": "R1 over all scenarios", "claims": SCENARIOS, "rises": ()},
    "report_v3": {"title": "R1's reasoning in a chat model", "claims": CONCISE, "rises": ()},
}


def recipe(name: str) -> Recipe:
    return Recipe(name, "two CPU cores, minutes", CONFIGS)
