"""Ten training steps of a small model of each family, to the last bit, on any x86-64 CPU with AVX2.

    python tests/stages/training/golden_losses.py --regenerate     # writes golden_losses.json

`test_golden_losses.py` compares. A difference means that every recipe now trains something else: find out which change
did it and whether it is meant, then regenerate in the same commit and say there what changed and why. A new torch
is such a reason too: the file names the version it was made with.

What a CPU computes depends on the instructions that it has. ENVIRONMENT takes the choice away: ATen's kernels for AVX2,
with their own exp, log and cos in place of the C library's (which picks by processor as well); MKL's products in the
one code path that Intel promises to be the same on all processors; oneDNN, which promises nothing, off; one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
RECORD = Path(__file__).with_suffix(".json")

COMMON = {"vocab_size": 256, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 64, "max_position": 32}
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MOE = {"n_dense_layers": 1, "n_routed_experts": 8, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 16}
GROUPS = {"n_groups": 4, "n_limited_groups": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**MLA, **MOE, **GROUPS, "q_lora_rank": 16, "route_scale": 2.5, "n_mtp": 1},
    "deepseek_v2": {**MLA, **MOE, **GROUPS, "score_function": "softmax", "route_scale": 16.0},
    "deepseek_moe": {**MOE, "score_function": "softmax"},
    "llama": {"family": "llama", "n_kv_heads": 2},
    "qwen2": {"family": "qwen2", "n_kv_heads": 2, "tie_embeddings": True},
}
STEPS, BATCH, LENGTH = 10, 8, 32


def losses(family: str) -> list[str]:
    """The ten losses as hexadecimal floats. Only in a process that was started with ENVIRONMENT."""
    assert all(os.environ.get(name) == value for name, value in ENVIRONMENT.items()), "start it with ENVIRONMENT"
    import torch

    from model.config import ModelConfig
    from stages.training.job import Optimization, TrainJob
    from stages.training.schedules import LearningRate
    from stages.training.trainer import train

    torch.backends.mkldnn.enabled = False
    with tempfile.TemporaryDirectory() as folder:
        job = TrainJob(
            model=ModelConfig(**{**COMMON, **FAMILIES[family]}),
            optimization=Optimization(learning_rate=LearningRate(peak=1e-2, warmup_steps=3), micro_batch_size=4),
            data=Lines(LENGTH),
            steps=STEPS,
            batch_size=BATCH,
            out=f"{folder}/out",
            scratch=f"{folder}/resume",
        )
        return [loss.hex() for _, loss in train(job, lambda *args, **metrics: None).values("loss")]


class Lines:
    """Sequences i, i + j, i + 2j … modulo the vocabulary, i and j by the sequence's number: something to learn."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length

    def open(self, micro_batch: int, seed: int, rank: int, world: int) -> Lines:
        self.rows = micro_batch
        return self

    def batch(self, index: int) -> Any:
        import torch

        from stages.training.data import Batch

        number_B = torch.arange(index * self.rows, (index + 1) * self.rows)[:, None]
        tokens_BT = number_B * 37 + (number_B % 5 + 1) * torch.arange(self.sequence_length + 1)
        return Batch(tokens_BT % COMMON["vocab_size"])


def compute() -> dict[str, list[str]]:
    """The `losses` of every family, made in a process of their own."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, __file__, "--print"]
    result = subprocess.run(
        command, env=os.environ | ENVIRONMENT | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(json.dumps({family: losses(family) for family in FAMILIES}))
    elif sys.argv[1:] == ["--regenerate"]:
        record = {"torch": version("torch").partition("+")[0], "losses": compute()}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    else:
        sys.exit(__doc__)
