"""What reinforcement learning and distillation gain in a recipe, over seeds; each claim is a part that runs by itself.

    .venv/bin/python benchmarks/rl/seeds.py --parts gain language process distil --seeds 0 1 2 3 4

Every seed is the recipe's own graph with that seed in all that follows the base: one base, one problem set, one student
base. Stages run in this process through the store of the working folder, so whatever is there is reused, and a killed
benchmark goes on where it was. `--base` takes tags or ids for the base's nodes instead of making them. Writes
results/NAME_PART.json beside this file, or into --out (rows a seed, means over seeds with 95 % t intervals), and a plot
of each part after every seed.

gain      GRPO over its cold start: pass@1, and the rise of Maj@16 less that of Pass@16.
language  GRPO with and without the language reward (summed with accuracy as it is, as R1 does), from a start that was
          taught chains of mixed language.
process   GRPO with process supervision, by a model of the start's own steps, over GRPO with outcome supervision: by the
          progress of each step, and by DeepSeekMath's sum of the steps to come.
distil    the distilled student over the same student by GRPO alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq

import stages
from benchmarks import record
from flows.pipelines import LINE, Node, Pipeline
from flows.recipes import Recipe, load_recipe
from infra.artifact import Artifact
from infra.settings import Settings
from infra.stage import run
from infra.store import ArtifactStore
from stages.evaluation.claims import Claim, Rise, Verdict, judge, judge_rise
from stages.problems.problem import Language, Problem
from stages.problems.registry import FAMILIES, LANGUAGES
from stages.report import read_evaluation
from stages.rl.prompts import worked_turns

SEEDED = ("sft", "grpo", "sample", "distill", "label_steps", "train_process_reward_model")
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # by degrees
Row = dict[str, Any]

# GRPO twice from a cold start whose chains change their language, as R1-Zero's do and a base of this size does not.
MIXED = LINE.branch(
    "mixed",
    "The language reward on and off",
    Node("mixed", "ingest_conversations"),
    Node("mixed_start", "sft", {"checkpoint": "extend_context", "conversations": "mixed"}),
    *(
        Node(name, "grpo", {"checkpoint": "mixed_start", "problems": "generate_problems"})
        for name in ("plain_rl", "language_rl")
    ),
    *(
        Node(f"evaluate_{name}", "evaluate", {"checkpoint": name, "problems": "generate_problems"})
        for name in ("mixed_start", "plain_rl", "language_rl")
    ),
)

CREDITED = {"progress_rl": "progress", "sum_rl": "sum"}  # by `step_credit`

# The steps of the cold start's replies, labelled by its own completions, make the model that then rewards steps.
PROCESS = LINE.branch(
    "process",
    "Process supervision beside outcome supervision",
    Node("step_replies", "sample", {"checkpoint": "cold_start", "problems": "generate_problems"}),
    Node("step_labels", "label_steps", {"checkpoint": "cold_start", "rollouts": "step_replies"}),
    Node("step_model", "train_process_reward_model", {"checkpoint": "cold_start", "rollouts": "step_labels"}),
    *(
        node
        for name in CREDITED
        for node in (
            Node(
                name,
                "grpo",
                {"checkpoint": "cold_start", "problems": "generate_problems", "process_reward_model": "step_model"},
            ),
            Node(f"evaluate_{name}", "evaluate", {"checkpoint": name, "problems": "generate_problems"}),
        )
    ),
    LINE.node("evaluate_reasoning_rl"),
)


@dataclasses.dataclass
class Graph:
    """A pipeline in a store: `make` runs a node and all that it needs."""

    pipeline: Pipeline
    recipe: Recipe
    store: ArtifactStore
    settings: Settings
    seed: int
    base: Mapping[str, str]  # node → artifact id or tag, taken as it is

    @functools.cached_property
    def configs(self) -> Mapping[str, Any]:
        seeds = [f"{node.name}.seed={self.seed}" for node in self.pipeline.nodes if node.stage in SEEDED]
        return self.recipe.resolve(self.pipeline, seeds)

    def make(self, name: str) -> Artifact:
        if name in self.base:
            return self.store.check(self.base[name])
        node = self.pipeline.node(name)
        refs = {role: self.make(source).id for role, source in node.roles.items()}
        done = run(stages.load(node.stage), self.configs[name], refs, self.store, self.settings, labels={"node": name})
        if not done.reused:
            print(f"seed {self.seed}: {name} {done.artifact.id}", flush=True)
        return done.artifact

    def judge(self, claim: Claim | Rise, *nodes: str) -> Verdict:
        """The claim between evaluations, which it knows by the names that the recipe gives them."""
        evaluations = {(found := read_evaluation(self.make(node))).name: found for node in nodes}
        return judge(claim, evaluations) if isinstance(claim, Claim) else judge_rise(claim, evaluations)


def gain(graph: Graph) -> Iterable[Row]:
    nodes = ("evaluate_cold_start", "evaluate_reasoning_rl")
    yield row("GRPO over its cold start, pass@1", graph.judge(Claim(left="reasoning_rl", right="cold_start"), *nodes))
    rise = graph.judge(Rise(after="reasoning_rl", before="cold_start", k=16), *nodes)
    yield row("rise of Maj@16 less that of Pass@16", rise)


def language(graph: Graph) -> Iterable[Row]:
    shares = {}
    for name in ("mixed_start", "plain_rl", "language_rl"):
        shares[name] = astray(graph.make(f"evaluate_{name}"))
        for kind, share in shares[name].items():
            yield {"case": f"{kind}, {name}", "ours": share, "anchors": {}}
    for kind, left in shares["plain_rl"].items():
        if left:  # of none there is nothing to cut
            cut = 1 - shares["language_rl"][kind] / left
            yield {"case": f"{kind}: share cut by the language reward", "ours": cut, "anchors": {"bar": 0.8}}
    cost = graph.judge(Claim(left="language_rl", right="plain_rl"), "evaluate_language_rl", "evaluate_plain_rl")
    yield row("pass@1 with the language reward less without", cost)


def process(graph: Graph) -> Iterable[Row]:
    for name, case in (
        ("progress_rl", "process over outcome supervision, pass@1"),
        ("sum_rl", "process over outcome supervision, pass@1, by the sum of the steps to come"),
    ):
        verdict = graph.judge(Claim(left=name, right="reasoning_rl"), f"evaluate_{name}", "evaluate_reasoning_rl")
        yield row(case, verdict) | {"note": verdict.note}


def distil(graph: Graph) -> Iterable[Row]:
    nodes = ("evaluate_distill_llama", "evaluate_rl_student_llama")
    verdict = graph.judge(Claim(left="distilled_llama", right="rl_only_llama"), *nodes)
    yield row("distilled student over GRPO alone, pass@1", verdict) | {"note": verdict.note}


PARTS: dict[str, tuple[Callable[[Graph], Iterable[Row]], Pipeline]] = {
    "gain": (gain, LINE),
    "language": (language, MIXED),
    "process": (process, PROCESS),
    "distil": (distil, LINE),
}


def row(case: str, verdict: Verdict) -> Row:
    interval = {"low_95_over_problems": verdict.low, "high_95_over_problems": verdict.high}
    return {"case": case, "ours": verdict.difference, "anchors": interval}


def astray(evaluation: Artifact) -> dict[str, float]:
    """Shares of the replies that an evaluation keeps: chains that mix the question's language with another, and all
    that are not wholly in it, also for want of any word."""
    kept = pq.read_table(evaluation.path / "rollouts-00000.parquet", columns=["language_consistency"])
    consistency = kept["language_consistency"].to_pylist()
    mixed, strayed = sum(0 < value < 1 for value in consistency), sum(value < 1 for value in consistency)
    return {
        "chains of mixed language": mixed / len(consistency),
        "chains not wholly in the question's": strayed / len(consistency),
    }


def mixed_conversations(recipe: Recipe, n: int) -> list[Row]:
    """Worked training problems of the recipe's families. Of the chains a half is in the question's language, a quarter
    in the other, and a quarter changes in the middle."""
    values = recipe.configs["generate_problems"]
    rng = Random("mixed")
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < n:
        family = FAMILIES[rng.choice(values["families"])]
        numbers = family.draw(rng, rng.choice(values.get("levels") or range(1, family.levels + 1)))
        own: Language = rng.choice(LANGUAGES)
        (other,) = set(LANGUAGES) - {own}
        written = {name: family.write(numbers, name, Random(0)) for name in LANGUAGES}
        question, chains = written[own].question, {name: text.chain for name, text in written.items()}
        kind = rng.choice(("own", "own", "other", "both"))
        chain = {"own": chains[own], "other": chains[other], "both": halves(chains[own], chains[other])}[kind]
        about = (question, chain, written[own].answer, "", {}, family.content(numbers))
        problem = Problem("", family.name, own, 1, *about)
        if problem.split == "train" and question not in seen:
            seen.add(question)
            rows.append({"messages": worked_turns(problem)})
    return rows


def halves(first: str, second: str) -> str:
    """The first half of one chain and the second of the other, cut at a comma or a semicolon if there is one."""
    for marks in (",", "，", ";", "；"):
        first, second = first.replace(marks, f"{marks}\0"), second.replace(marks, f"{marks}\0")
    ours, theirs = first.split("\0"), second.split("\0")
    return "".join([*ours[: (len(ours) + 1) // 2], *theirs[(len(theirs) + 1) // 2 :]])


def widened(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with values for the nodes of MIXED and PROCESS; mixed conversations are written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mixed_language.jsonl"
    lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in mixed_conversations(recipe, 1000))
    path.write_text("".join(lines), encoding="utf-8")
    own = recipe.configs
    source = {"kind": "files", "name": "mixed_language", "path": str(path), "format": "jsonl", "license": "Apache-2.0"}
    rl = own["reasoning_rl"]
    rewards = {**rl["rewards"], "language": 0.0}
    evaluations = {
        f"evaluate_{name}": {**own["evaluate_reasoning_rl"], "name": name}
        for name in ("mixed_start", "plain_rl", "language_rl", *CREDITED)
    }
    reply = {"max_new_tokens": rl["max_new_tokens"]}
    more = {
        # Of 800 replies a model learnt which problems are hard, and nothing of the replies (benchmarks/LOG.md).
        "step_replies": {"problems": {"limit": 2000}, "samples": 4, **reply},
        "step_labels": {"max_replies": 5000, **reply},
        "step_model": {name: value for name, value in own["reward_model_1"].items() if name != "target"}
        | {"epochs": 3.0},
        **{
            name: {**rl, "name": name, "supervision": "process", "step_credit": credit}
            for name, credit in CREDITED.items()
        },
        "mixed": {"source": source},
        "mixed_start": own["cold_start"],
        "plain_rl": {**rl, "name": "plain_rl", "rewards": rewards},
        "language_rl": {**rl, "name": "language_rl", "rewards": {**rewards, "language": 1.0}},
    }
    return dataclasses.replace(recipe, configs={**own, **evaluations, **more})


def over_seeds(rows: Iterable[Row]) -> list[Row]:
    """Rows of (case, metric), a row a case with the mean over seeds behind them."""
    rows = list(rows)
    cases = list(dict.fromkeys(one["case"] for one in rows))
    means = []
    for case in cases:
        seen = [one["ours"] for one in rows if one["case"] == case]
        mean = {"metric": f"mean of {len(seen)} seeds", "ours": statistics.mean(seen)}
        found: Row = {"case": case, **mean, "anchors": {}}
        if len(seen) > 1:
            half = T_975[len(seen) - 1] * statistics.stdev(seen) / math.sqrt(len(seen))
            found["anchors"] = {"low_95_over_seeds": found["ours"] - half, "high_95_over_seeds": found["ours"] + half}
        means.append(found)
    return [*rows, *means]


def plot(path: Path, rows: list[Row]) -> None:
    """For each case a point a seed and the mean, with its 95 % t interval where there are several."""
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(one["case"] for one in rows))
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.6 * len(cases)), layout="constrained")
    for height, case in enumerate(reversed(cases)):
        for one in (one for one in rows if one["case"] == case):
            if one["metric"].startswith("mean"):
                low, high = (one["anchors"].get(f"{side}_95_over_seeds", one["ours"]) for side in ("low", "high"))
                error = [[one["ours"] - low], [high - one["ours"]]]
                axes.errorbar(one["ours"], height, xerr=error, fmt="D", color="black", capsize=4)
            else:
                axes.plot(one["ours"], height + 0.2, "o", color="tab:blue", alpha=0.6)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(cases)), [textwrap.fill(case, 40) for case in reversed(cases)])
    axes.set_xlabel("difference or share")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--base", nargs="*", default=[], metavar="NODE=ID_OR_TAG", help="taken instead of made")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="of a tree that is no checkout")
    arguments = parser.parse_args()
    settings = Settings.load()
    store = ArtifactStore(settings.store, settings.workspace)
    recipe = widened(load_recipe(arguments.recipe), store.work / "benchmarks")
    base = dict(pair.split("=", 1) for pair in arguments.base)
    for part in arguments.parts:
        measure, pipeline = PARTS[part]
        rows: list[Row] = []
        for seed in arguments.seeds:
            graph = Graph(pipeline, recipe, store, settings, seed, base)
            rows += [{"metric": f"seed {seed}", **one} for one in measure(graph)]
            path = arguments.out / f"{arguments.recipe}_{part}.json"
            record.write(path, record.command("benchmarks/rl/seeds.py"), over_seeds(rows), arguments.commit)
            plot(path.with_suffix(".png"), over_seeds(rows))


if __name__ == "__main__":
    main()
