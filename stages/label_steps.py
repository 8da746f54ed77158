"""Labels for a process reward model: each step of a reply with the share of its completions that are right."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

from infra.config import Config, Field
from infra.errors import InputError
from infra.ray import spmd
from infra.stage import Context, Inputs, one_of, stage
from stages.corpus.document import fraction
from stages.rl.engines import EngineName
from stages.rl.rollout import read_rollouts, write_rollouts
from stages.rl.step_labels import LabelJob, label
from stages.training.checkpoint import Precision

STORE = "labels"  # folder inside scratch


class LabelStepsConfig(Config):
    replies_per_problem: int = Field(4, title="Replies a problem", description="Different ones, at most.", ge=1)
    max_replies: int | None = Field(None, title="At most", description="Replies in all.", ge=1)
    completions: int = Field(8, title="Completions a step", description="Math-Shepherd: 8.", ge=1)
    max_new_tokens: int = Field(64, title="Longest completion", ge=1)
    temperature: float = Field(1.0, title="Temperature", gt=0)
    top_p: float = Field(1.0, title="Top-p", gt=0, le=1)
    engine: EngineName = Field("native", title="Engine")
    precision: Precision = Field("fp32", title="Precision", description="Of our engine; vLLM: bf16 on CUDA")
    chunk: int = Field(16, title="Replies a chunk", description="Completed together; a kill costs one at most.", ge=1)
    seed: int = Field(0, title="Seed")


@stage(version=4, takes={"checkpoint": "checkpoint", "rollouts": one_of("rollouts", "checkpoint")}, makes="rollouts")
def label_steps(config: LabelStepsConfig, inputs: Inputs, ctx: Context) -> dict:
    """Label each step of well-formed replies by completing it with a checkpoint and judging the answers."""
    order: dict[str, dict] = {}  # by problem and text: of replies that say the same, one
    for row in read_rollouts(inputs["rollouts"].path):
        if row["finished"] and row["format"] >= 1 and row["accuracy"] is not None:  # no step of an open one is right
            order.setdefault(f"{row['problem_id']} {row['completion']}", row)
    kept, seen = [], Counter()
    for key in sorted(order, key=lambda key: fraction(key, f"steps {config.seed}")):
        problem = order[key]["problem_id"]
        seen[problem] += 1
        if seen[problem] <= config.replies_per_problem:
            kept.append(order[key])
    # Replies to one problem share prefixes: side by side, they are completed once.
    rows = sorted(kept[: config.max_replies], key=lambda row: row["problem_id"])
    if not rows:
        raise InputError(
            f"{inputs['rollouts'].id} has no well-formed reply: its steps could not be told (those to general prompts "
            "lead to no answer and are left out)"
        )
    job = LabelJob(
        checkpoint=str(inputs["checkpoint"].path),
        rows=tuple(rows),
        completions=config.completions,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        engine=config.engine,
        precision=config.precision,
        chunk=config.chunk,
        seed=config.seed,
        store=str(ctx.scratch / STORE),
    )
    spmd(label, job, ctx, keep=config.engine == "native")
    done = list(read_rollouts(ctx.scratch / STORE))
    write_rollouts(ctx.out / "rollouts-00000-0000.parquet", done)
    labels = [reward for row in done for reward in row["step_rewards"]]
    return {
        "replies": len(done),
        "problems": len({row["problem_id"] for row in done}),
        "steps": len(labels),
        "mean_label": round(fmean(labels), 4),
        "hopeless_steps": round(fmean(reward == 0 for reward in labels), 4),
        "accuracy": round(fmean(row["accuracy"] for row in done), 4),
    }
