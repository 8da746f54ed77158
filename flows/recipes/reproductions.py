"""Reproductions of R1-Zero's and R1's roads by others, at their sizes, from the checkpoint that they began with.

    fathom run imported_zero --recipe logic_rl --set import_base.path=DIRECTORY
    fathom run imported_zero --recipe tiny_zero --set import_base.path=DIRECTORY
    fathom run imported_traces --recipe open_r1 --set import_base.path=DIRECTORY --set math.path=FILE

Paths are the user's: no recipe downloads anything. All three use GRPO, whatever the original used, in bf16 with the
importance weights of `h100`; what else differs is said beside the numbers. The problems are drawn anew by our families,
so published accuracies are a direction and not a bar: the same game, other wording.

No stage shards a model over GPUs. Reinforcement learning keeps 20 bytes a parameter on each: bf16 weights and what
rounding took of their masters (4), fp32 moments (8), fp32 gradients and autograd's in bf16 (6), the bf16 reference (2);
fine-tuning all but the reference. By that count, which was not run, TinyZero's 3B (62 GB) fits a GPU of 80 GB beside
its activations. The 7B of the others (152 GB; 137 to fine-tune) does not: give `import_base.path` a smaller model of
the series, such as the 1.5B (31 GB).
"""

from __future__ import annotations

from typing import Any

from flows.recipes import Recipe

BF16 = {"precision": "bf16"}
GPU = {**BF16, "importance_cap": 2.0}

# Logic-RL (Xie et al. 2025, 2502.14768): Qwen2.5-7B-Instruct-1M on fewer than 5K puzzles of 3 to 7 people; 3600 steps
# of 8 questions and 8 replies, constant rate 4e-7, temperature 0.7, KL 0.001, REINFORCE++ (ours: GRPO, which the paper
# compares). Published accuracy by people, 2 to 8: before 0.64 0.39 0.33 0.21 0.13 0.03 0.08 (mean 0.26), after
# 0.99 0.99 0.94 0.92 0.91 0.80 0.67 (mean 0.89). Level n of our islanders has n + 1 people. A system prompt names the
# form of a reply, as theirs does, in words of ours.
LOGIC_FORM = (
    "You solve logic puzzles. Think each one through between <think> and </think>: go through the cases, and check "
    "every claim before you rely on it. Then give the result alone between <answer> and </answer>, one word for each "
    "person in the order asked. A reply looks like <think> your reasoning </think> <answer> knight, knave </answer> "
    "and has nothing outside these tags."
)
LOGIC_ASKED = {"system_prompt": LOGIC_FORM, "max_new_tokens": 4096, **BF16}
LOGIC_RL: dict[str, dict[str, Any]] = {
    "import_base": {"path": "Qwen2.5-7B-Instruct-1M"},
    "puzzles": {"families": ["islanders"], "languages": ["en"], "levels": [2, 3, 4, 5, 6], "n_train": 5_000},
    "evaluate_start": {"name": "start", "samples": 8, **LOGIC_ASKED},
    "puzzle_rl": {
        **{"name": "logic_rl", "steps": 3600, "groups_per_step": 8, "rollout_groups": 8, "group_size": 8},
        **{"rewards": {"scheme": "logic_rl"}, "learning_rate": 4e-7, "temperature": 0.7, "kl_coefficient": 0.001},
        **{"reference_renew_every": 0, "problems": {"languages": ["en"]}, **LOGIC_ASKED, **GPU},
    },
    "evaluate_puzzle_rl": {"name": "logic_rl", "samples": 8, **LOGIC_ASKED},
    "report_zero": {
        "title": "Logic-RL",
        "claims": [{"left": "logic_rl", "right": "start", "margin": 0.5}],
        "rises": [],
    },
}

# TinyZero (Pan et al. 2025, github.com/Jiayi-Pan/TinyZero): Qwen2.5-3B, the base, on countdown with three and four
# numbers; 256 replies a step, at most 1024 tokens, rate 1e-6, KL 0.001, a tenth of the reward for the form; PPO with a
# critic (ours: GRPO, 32 questions with 8 replies). Published: the 3B base learns to verify and to search, the 0.5B base
# does not; the accuracies are in its run logs alone, so the claim here is a rise and nothing more. Its prompt is a
# variant of R1-Zero's, which is asked here.
TINY_ASKED = {"template": "r1_zero_described", "max_new_tokens": 1024, **BF16}
TINY_ZERO: dict[str, dict[str, Any]] = {
    "import_base": {"path": "Qwen2.5-3B"},
    "puzzles": {"families": ["countdown_wide"], "languages": ["en"], "n_train": 50_000, "n_heldout": 1_000},
    "evaluate_start": {"name": "start", "samples": 8, **TINY_ASKED},
    "puzzle_rl": {
        **{"name": "tiny_zero", "steps": 400, "groups_per_step": 32, "rollout_groups": 32},
        **{"group_size": 8, "rewards": {"accuracy": 0.9, "format": 0.1}, "learning_rate": 1e-6},
        **{"kl_coefficient": 0.001, "reference_renew_every": 0, "problems": {"languages": ["en"]}},
        **{**TINY_ASKED, **GPU, "micro_batch_tokens": 4096},  # 12 GB of activations
    },
    "evaluate_puzzle_rl": {"name": "tiny_zero", "samples": 8, **TINY_ASKED},
    "report_zero": {"title": "TinyZero", "claims": [{"left": "tiny_zero", "right": "start"}], "rises": []},
}

# Open-R1 (Hugging Face 2025, github.com/huggingface/open-r1), step 1: OpenR1-Distill-7B is Qwen2.5-Math-7B, its RoPE
# base raised to 300K, on the 350K verified traces of open-r1/Mixture-of-Thoughts, five epochs at 4e-5. Published (its
# model card): AIME 2024 52.7, MATH-500 89.0; DeepSeek-R1-Distill-Qwen-7B, which it reproduces, has 92.8 on MATH-500 by
# DeepSeek's report. Step 2, GRPO on verified maths problems, is theirs in form: the published figure, 69.4 on MATH-500,
# is of Qwen2.5-Math-7B without the traces.
OPEN_R1: dict[str, dict[str, Any]] = {
    "import_base": {"path": "Qwen2.5-Math-7B-RoPE-300k"},
    "traces": {
        "source": {"kind": "dataset", "name": "mixture_of_thoughts", "path": "open-r1/Mixture-of-Thoughts"}
        | {"subset": "all", "license": "Apache-2.0"},
        "traces": "think_answer",
    },
    "math": {"name": "math", "path": "math.jsonl", "question_field": "problem", "license": "MIT"}
    | {"answer_field": "solution"},
    "trace_sft": {
        **{"epochs": 5.0, "batch_size": 128, "sequence_length": 32768, "micro_batch_size": 1, "precision": "bf16"},
        **{"learning_rate": {"schedule": "cosine", "peak": 4e-5, "warmup_steps": 400}, "recompute": ["block"]},
    },
    "evaluate_traces": {"name": "open_r1_sft", "samples": 4, "max_new_tokens": 30720, **BF16},
    "math_rl": {
        **{"name": "open_r1", "steps": 200, "groups_per_step": 32, "rollout_groups": 32, "group_size": 16},
        **{"rewards": {"accuracy": 1.0, "format": 0.1}, "learning_rate": 1e-6, "max_new_tokens": 8192, **GPU},
    },
    "evaluate_math_rl": {"name": "open_r1", "samples": 4, "max_new_tokens": 30720, **BF16},
    "report_traces": {
        "title": "Open-R1",
        "claims": [{"left": "open_r1", "right": "open_r1_sft", "strict": False}],
        "rises": [],
    },
}

ALL = {
    "logic_rl": ("Logic-RL: knights and knaves of 3 to 7 people", LOGIC_RL, "imported_zero"),
    "tiny_zero": ("TinyZero: countdown with three and four numbers", TINY_ZERO, "imported_zero"),
    "open_r1": ("Open-R1: a traces data set, then GRPO", OPEN_R1, "imported_traces"),
}


def recipe(name: str) -> Recipe:
    doc, configs, pipeline = ALL[name]
    return Recipe(name, doc, configs, pipeline=pipeline)
