"""TRL's side of `step.py`: its trainer for the task's model and questions, and our reward as it calls it."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.table import InMemoryTable
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.rl.task import Setting, Task
from stages.rl.prompts import prompt_ids, reply_text
from stages.rl.rewards import score
from stages.tokens import bpe

# transformers' implementations, to choose from. The third, batched_mm, copies an expert's weights for every token: more
# memory than there is, in training.
EXPERTS = ("grouped_mm", "eager")


class Paid:
    """The reward function that TRL calls: our rules on its token ids. Remembers what it saw of each step."""

    __name__ = "paid"

    def __init__(self, task: Task) -> None:
        self.task, self.tokenizer = task, bpe.load_tokenizer(task.ours)
        self.rewards: list[float] = []
        self.lengths: list[int] = []

    def __call__(self, completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        config = self.task.config
        self.lengths = [len(ids) for ids in completion_ids]
        self.rewards = [
            score(
                self.task.problems[which],
                reply_text(ids, self.tokenizer),
                ids[-1] == self.tokenizer.eos,
                config.rewards,
                config.target_language,
                len(ids),
                config.max_new_tokens,
            ).reward
            for ids, which in zip(completion_ids, number, strict=True)
        ]
        return self.rewards

    def row(self) -> dict[str, float]:
        return {
            "reward": statistics.mean(self.rewards),
            "length": statistics.mean(self.lengths),
            "reply_tokens": float(sum(self.lengths)),
            "reward_sd": statistics.stdev(self.rewards),
            "length_sd": statistics.stdev(self.lengths),
        }


@dataclasses.dataclass(frozen=True)
class Peer:
    """What is left to choose for TRL."""

    micro_batch: int
    experts: str | None  # None: the model has none


def trainer(
    task: Task, setting: Setting, device: str, steps: int, peer: Peer, folder: Path
) -> tuple[GRPOTrainer, Paid]:
    """TRL's trainer for `steps` steps of the task, and its reward function."""
    config = task.config
    options = {"experts_implementation": peer.experts} if peer.experts else {}
    model = AutoModelForCausalLM.from_pretrained(
        task.published, dtype=setting.dtype, attn_implementation="sdpa", **options
    )
    tokenizer = AutoTokenizer.from_pretrained(task.published)
    ours = bpe.load_tokenizer(task.ours)
    rows = []
    for number, problem in enumerate(task.problems):
        row = {"prompt": f"{bpe.BOS}{problem.question}\n", "number": number}
        assert tokenizer(row["prompt"])["input_ids"] == prompt_ids(problem.question, config.template, ours), row
        rows.append(row)
    replies = len(rows) * config.group_size
    arguments = GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=peer.micro_batch,
        gradient_accumulation_steps=replies // peer.micro_batch,
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        beta=config.kl_coefficient,
        loss_type="grpo",
        use_bias_correction_kl=False,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=config.max_gradient_norm,
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    paid = Paid(task)
    # The name spares `datasets` the hash of the table, which some installations of pyarrow cannot pickle.
    questions = Dataset(InMemoryTable.from_pylist(rows), fingerprint="questions")
    made = GRPOTrainer(model, paid, arguments, questions, processing_class=tokenizer)
    made.remove_callback(PrinterCallback)
    return made, paid
