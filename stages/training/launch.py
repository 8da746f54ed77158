"""From a job to its result, and from a result to the summary that every training stage shares."""

from __future__ import annotations

from statistics import mean

from infra.artifact import Scalar
from infra.ray import most_ranks, spmd
from infra.stage import Context
from stages.training.job import TrainJob, TrainResult
from stages.training.trainer import train


def launch(job: TrainJob, ctx: Context) -> TrainResult:
    """Run `job` on as many of the context's workers, or GPUs, as its batch divides over."""
    workers = max(count for count in range(1, most_ranks(ctx.workers) + 1) if job.unit % count == 0)
    if job.lesson:
        from stages.rl.distiller import teach  # which is built on this package

        # On policy each rank draws its own replies: more ranks would be other replies under the same id.
        return spmd(teach, job, ctx, workers=1 if job.lesson.on_policy else workers)[0]
    return spmd(train, job, ctx, workers=workers)[0]


def summarize(job: TrainJob, result: TrainResult) -> dict[str, Scalar]:
    """Sizes, cost, losses, and bits per byte by language at start and end, as a flat summary."""
    progress = result.progress
    summary: dict[str, Scalar] = {
        "parameters": job.model.n_parameters(),
        "active_parameters": job.model.n_active_parameters(),
        "steps": progress.step,
        "tokens": progress.tokens,
        "train_flops": result.flops,
        "tokens_per_second": round(result.tokens_per_second, 1),
        "train_seconds": round(progress.seconds, 1),
        "train_workers": result.world,
        "skipped_steps": progress.skipped,
    }
    for name in ("loss", "mtp_loss", "max_violation", "bias_drift", "drop_rate"):
        if (value := result.last(name)) is not None:
            summary[name] = value
    if result.health:
        summary["global_max_violation"] = mean(result.health["rows"][-1]["global_violation"])
    measured = "ema_bits_per_byte" if job.optimization.checkpoint_weights == "ema" else "bits_per_byte"
    for language in result.languages:
        values = result.values(f"{measured}_{language}")
        summary[f"bits_per_byte_{language}_start"], summary[f"bits_per_byte_{language}"] = values[0][1], values[-1][1]
    return summary
