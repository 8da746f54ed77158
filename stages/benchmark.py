"""Public benchmarks by name, through lm-evaluation-harness (extra `eval`): its prompts, its answers, its scores.

A task is a name of `BENCHMARKS`, any task, group or tag of the harness, or one of `tasks_dir`, a folder of YAML tasks
of the user's own. The built-in tasks fetch their data from the Hugging Face hub; a folder's may lie in the folder, for
it is where they are run. LiveCodeBench is not in the harness.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from infra.artifact import Artifact
from infra.config import Config, Field
from infra.errors import ConfigError, InputError
from infra.ray import spmd
from infra.stage import Context, Inputs, stage
from stages.corpus.sources.files import digest_files, find_files
from stages.evaluation.intervals import bootstrap_mean, wilson
from stages.evaluation.measures import REPORT, Measure, to_json
from stages.evaluation.plots import plot_intervals

BENCHMARKS: Mapping[str, tuple[str, ...]] = {
    "mmlu": ("mmlu",),
    "gsm8k": ("gsm8k",),
    "math500": ("minerva_math500",),
    "aime": ("aime24", "aime25"),
    "gpqa": ("gpqa_diamond_cot_zeroshot",),
    "ceval": ("ceval-valid",),
    "cmmlu": ("cmmlu",),
    "humaneval": ("humaneval",),
    "ifeval": ("ifeval",),
}
SAMPLES = "samples.jsonl"


class BenchmarkConfig(Config):
    name: str = Field(min_length=1, title="Name", description="What the checkpoint is called in the report")
    tasks: tuple[str, ...] = Field(min_length=1, title="Tasks", description=f"{', '.join(BENCHMARKS)}, or others")
    tasks_dir: str | None = Field(None, title="Tasks folder", description="YAML tasks of your own, with their data")
    few_shot: int | None = Field(None, ge=0, title="Examples", description="In each prompt; None: what a task says")
    limit: int | None = Field(None, ge=1, title="At most", description="Documents of each task; None: all")
    chat: bool = Field(True, title="Chat", description="Prompts go through the chat template; off for base models")
    max_new_tokens: int = Field(256, ge=1, title="Longest reply", description="Also where a task allows more")
    run_unsafe_code: bool = Field(
        False, title="Run unsafe code", description="Let tasks such as humaneval run the model's programs unsandboxed"
    )
    seed: int = Field(0, title="Seed")


def _outside(config: BenchmarkConfig) -> dict[str, str]:
    """The harness's version decides prompts and scores; so do the user's own tasks."""
    try:
        found = {"lm_eval": version("lm_eval")}
    except PackageNotFoundError:
        raise ConfigError("benchmark needs lm-evaluation-harness: pip install 'fathom-line[eval]'") from None
    if config.tasks_dir is None:
        return found
    if not Path(config.tasks_dir).is_dir():
        raise InputError(f"tasks_dir: no folder {config.tasks_dir!r}; give one with YAML tasks")
    files = find_files(f"{config.tasks_dir}/**", (), "tasks_dir")
    return found | {"tasks": digest_files(file for file in files if file.suffix != ".pyc")}


@stage(version=1, takes={"checkpoint": "checkpoint"}, makes="report", reads=_outside)
def benchmark(config: BenchmarkConfig, inputs: Inputs, ctx: Context) -> dict:
    """Run public benchmarks on a checkpoint."""
    _outside(config)
    from stages.evaluation.harness import HarnessJob, run_harness

    job = HarnessJob(
        checkpoint=str(inputs["checkpoint"].path),
        tasks=tuple(name for task in config.tasks for name in BENCHMARKS.get(task, (task,))),
        tasks_dir=config.tasks_dir,
        few_shot=config.few_shot,
        limit=config.limit,
        chat=config.chat,
        max_new_tokens=config.max_new_tokens,
        run_unsafe_code=config.run_unsafe_code,
        seed=config.seed,
    )
    return keep(spmd(run_harness, job, ctx)[0], config, inputs["checkpoint"], ctx.out)


def keep(found: Mapping[str, Any], config: BenchmarkConfig, checkpoint: Artifact, out: Path) -> dict[str, Any]:
    """Write what the harness found; the summary."""
    measures = read_measures(found, config.seed)
    with (out / SAMPLES).open("w", encoding="utf-8") as file:
        for task, samples in sorted(found["samples"].items()):
            for sample in samples:
                file.write(json.dumps({"task": task, **sample}, ensure_ascii=False, default=str) + "\n")
    report = {
        "kind": "benchmarks",
        "name": config.name,
        "checkpoint": checkpoint.id,
        "measures": to_json(measures),
        "documents": {task: counts["effective"] for task, counts in found["n-samples"].items()},
        "examples": found["n-shot"],
        "versions": found["versions"],
        "cut": found["cut"],
    }
    (out / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=1, default=str), encoding="utf-8")
    (out / "report.md").write_text(markdown(config, report, measures), encoding="utf-8")
    shown = {name: measure for name, measure in measures.items() if measure.low is not None}
    plot_intervals(
        out / "benchmarks.png",
        list(shown),
        [(measure.value, measure.low or 0.0, measure.high or 0.0) for measure in shown.values()],
        f"Benchmarks of {config.name} with 95 % intervals",
    )
    return {
        "name": config.name,
        **{name: round(measure.value, 4) for name, measure in measures.items()},
        "documents": sum(report["documents"].values()),
        "cut": found["cut"],
    }


def read_measures(found: Mapping[str, Any], seed: int = 0) -> dict[str, Measure]:
    """The harness's figures as `task.metric` (`task.metric.filter` where a filter has a name), intervals over its
    documents: Wilson's where each is right or wrong. A group's documents are those of its parts."""
    measures: dict[str, Measure] = {}
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, comma, sieve = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            samples = _samples(found, task)
            values = [sample[metric] for sample in samples if sample["filter"] == sieve and metric in sample]
            name = f"{task}.{metric}" if sieve == "none" else f"{task}.{metric}.{sieve}"
            measures[name] = _measure(float(value), values, seed)
    return measures


def _samples(found: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Of a task, or of all tasks of a group."""
    if name in found["samples"]:
        return found["samples"][name]
    parts = found["group_subtasks"].get(name, ())
    return [sample for part in parts for sample in _samples(found, part)]


def _measure(value: float, values: Sequence[Any], seed: int) -> Measure:
    """`value` with the interval of the mean of `values`, if it is their mean."""
    if not values or not all(isinstance(one, int | float) for one in values):
        return Measure(value)
    if abs(sum(values) / len(values) - value) > 1e-9:
        return Measure(value)
    if set(values) <= {0, 1}:
        return Measure.of(wilson(round(sum(values)), len(values)))
    return Measure.of(bootstrap_mean(values, seed=seed))


def markdown(config: BenchmarkConfig, report: Mapping[str, Any], measures: Mapping[str, Measure]) -> str:
    lines = [
        f"# Benchmarks of {config.name}",
        "",
        "lm-evaluation-harness"
        + (", prompts through the chat template" if config.chat else "")
        + ". 95 % intervals over "
        f"documents. {report['cut']} prompts lost their beginning because they exceed the context.",
        "",
        "| benchmark | figure | documents | examples |",
        "|-|-|-|-|",
    ]
    for name, measure in measures.items():
        task = name.partition(".")[0]
        lines.append(
            f"| {name} | {measure} | {report['documents'].get(task, '')} | {report['examples'].get(task, '')} |"
        )
    return "\n".join(lines) + "\n"
