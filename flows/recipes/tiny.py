"""Two CPU cores, minutes for the whole line. Every number stands here, node by node."""

from __future__ import annotations

from typing import Any

from flows.recipes import Recipe

FAMILIES = ("chain_sum", "word_sum", "gcd", "countdown", "compare", "sort", "reverse")
ROLLOUT = {"max_new_tokens": 96}

MODEL = {
    **{"family": "deepseek_v3", "d_model": 128, "n_layers": 4, "n_heads": 4, "d_ff": 384, "init_std": 0.02},
    **{"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
    **{"n_dense_layers": 1, "n_routed_experts": 8, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 128},
    **{"n_groups": 4, "n_limited_groups": 2, "n_mtp": 1},
}
STUDENT = {"d_model": 96, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "d_ff": 256, "init_std": 0.02}

CONFIGS: dict[str, dict[str, Any]] = {
    "ingest_api_zh": {"source": {"kind": "builtin", "name": "api_reference_zh"}, "max_bytes": 3_000_000},
    "ingest_api_en": {"source": {"kind": "builtin", "name": "api_reference_en"}, "max_bytes": 2_000_000},
    "ingest_python_docs": {"source": {"kind": "builtin", "name": "python_docs"}, "max_bytes": 1_000_000},
    "ingest_python_code": {"source": {"kind": "builtin", "name": "python_code"}, "max_bytes": 1_000_000},
    "ingest_math": {"source": {"kind": "worked_problems", "families": FAMILIES, "n": 20_000}},
    "deduplicate": {"threshold": 0.8},
    "filter": {"quality_documents": 1500},
    "mix": {
        "shares": [
            {"language": "en", "domain": "math", "weight": 0.25},
            {"language": "zh", "domain": "math", "weight": 0.25},
            {"language": "zh", "weight": 0.2},
            {"language": "en", "weight": 0.2},
            {"language": "code", "weight": 0.1},
        ],
        "max_epochs": 2.0,
    },
    "train_tokenizer": {"vocab_size": 2048, "digits": "single", "max_bytes": 4_000_000},
    "tokenize": {"validation_fraction": 0.02},
    "generate_problems": {"families": FAMILIES, "n_train": 8_000, "n_heldout": 300},
    "pretrain": {
        "model": MODEL,
        "steps": 500,
        "batch_size": 32,
        "sequence_length": 128,
        "learning_rate": {"schedule": "v3", "peak": 3e-3, "warmup_steps": 20},
        "micro_batch_size": 16,
        "validation_every": 100,
    },
    "extend_context": {
        "phases": [
            {"sequence_length": 256, "rope_factor": 4.0, "steps": 15, "batch_size": 8},
            {"sequence_length": 512, "rope_factor": 4.0, "steps": 15, "batch_size": 4},
        ],
        "learning_rate": {"schedule": "constant", "peak": 3e-4},
    },
    "evaluate_base": {"name": "base", "template": "r1_zero", "samples": 4, **ROLLOUT},
    "r1_zero": {"name": "r1_zero", "template": "r1_zero", "steps": 20, **ROLLOUT},
    "evaluate_r1_zero": {"name": "r1_zero", "template": "r1_zero", "samples": 4, **ROLLOUT},
    "cold_start": {"problems": {"limit": 1500}, "epochs": 1.0, "batch_size": 16, "sequence_length": 256},
    "evaluate_cold_start": {"name": "cold_start", "samples": 4, **ROLLOUT},
    "reasoning_rl": {
        "name": "reasoning_rl",
        "steps": 40,
        "rewards": {"accuracy": 1.0, "format": 0.2, "language": 0.1},
        **ROLLOUT,
    },
    "evaluate_reasoning_rl": {"name": "reasoning_rl", "samples": 4, **ROLLOUT},
    "rejection_sample": {"problems": {"limit": 1000}, "samples": 4, "keep_per_problem": 2, **ROLLOUT},
    "sft": {"epochs": 2.0, "batch_size": 16, "sequence_length": 256},
    "final_rl": {
        "name": "final_rl",
        "steps": 20,
        "rewards": {"accuracy": 1.0, "format": 0.2, "language": 0.1},
        **ROLLOUT,
    },
    "evaluate_r1": {"name": "r1", "samples": 8, **ROLLOUT},
    "teacher_samples": {"problems": {"limit": 1500}, "samples": 4, "keep_per_problem": 2, "seed": 1, **ROLLOUT},
    "student_base_llama": {
        "model": {"family": "llama", **STUDENT},
        "steps": 250,
        "batch_size": 32,
        "sequence_length": 256,
        "learning_rate": {"schedule": "wsd", "peak": 3e-3, "warmup_steps": 20},
        "validation_every": 125,
    },
    "student_base_qwen": {
        "model": {"family": "qwen2", **STUDENT},
        "steps": 250,
        "batch_size": 32,
        "sequence_length": 256,
        "learning_rate": {"schedule": "wsd", "peak": 3e-3, "warmup_steps": 20},
        "validation_every": 125,
    },
    "distill_llama": {"epochs": 2.0, "batch_size": 16, "sequence_length": 256},
    "distill_qwen": {"epochs": 2.0, "batch_size": 16, "sequence_length": 256},
    "rl_student_llama": {"name": "rl_only_llama", "template": "r1_zero", "steps": 20, **ROLLOUT},
    "evaluate_distill_llama": {"name": "distilled_llama", "samples": 4, **ROLLOUT},
    "evaluate_distill_qwen": {"name": "distilled_qwen", "samples": 4, **ROLLOUT},
    "evaluate_rl_student_llama": {"name": "rl_only_llama", "template": "r1_zero", "samples": 4, **ROLLOUT},
    "report": {"title": "The tiny line"},
}


def recipe(name: str) -> Recipe:
    return Recipe(name, "two CPU cores, minutes", CONFIGS)
