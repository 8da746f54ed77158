"""Whether a process reward model can tell two replies to one problem apart.

Accuracy over all steps does not say it: a model that only knows which problems are hard is right for most of them, and
in a group of replies, where rewards are compared, it knows nothing (benchmarks/LOG.md, 2026-11-26).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean

from infra.metrics import Report
from infra.ray import spmd
from infra.stage import Context
from stages.evaluation.intervals import Interval, bootstrap_share
from stages.rl.preference_tasks import Chain
from stages.rl.reward_model import load_reward_model
from stages.training.distributed import process_group


@dataclasses.dataclass(frozen=True)
class OrderJob:
    """`replies` are those to each question, by (content of its problem, question)."""

    folder: str  # of the process reward model
    replies: Mapping[tuple[str, str], Sequence[Chain]]


def order(folder: str, replies: Mapping[tuple[str, str], Sequence[Chain]], ctx: Context) -> Interval | None:
    """The share of pairs of replies to one question that the model in `folder` puts in the order of their mean labels,
    with its interval over problems; ½ is chance. None where no two labels differ."""
    telling = {key: chains for key, chains in replies.items() if len({fmean(chain.labels) for chain in chains}) > 1}
    if not telling:
        return None
    pairs = sorted(pair for share in spmd(order_replies, OrderJob(folder, telling), ctx) for pair in share)
    return bootstrap_share([right for _, right in pairs], [content for content, _ in pairs])


def order_replies(job: OrderJob, report: Report) -> list[tuple[str, float]]:
    """This rank's share of the questions: (content, `in_order`) of each pair. Nothing is reported: a run that goes on
    here has reported its training, and counts begin at none."""
    found: list[tuple[str, float]] = []
    with process_group() as ranks:
        judge = load_reward_model(job.folder, str(ranks.device))
        for content, question in sorted(job.replies)[ranks.rank :: ranks.world]:
            chains = job.replies[content, question]
            scored = judge.step_probabilities([(chain.ids, chain.places) for chain in chains])
            labels, scores = [fmean(chain.labels) for chain in chains], [fmean(steps) for steps in scored]
            found += [(content, right) for right in in_order(labels, scores)]
    return found


def in_order(labels: Sequence[float], scores: Sequence[float]) -> list[float]:
    """For each pair of different labels: 1 if the greater has the greater score, ½ if both have the same, else 0."""
    found = []
    for (label, score), (other_label, other_score) in itertools.combinations(zip(labels, scores, strict=True), 2):
        if label != other_label:
            agreement = (label - other_label) * (score - other_score)
            found.append(0.5 if agreement == 0 else float(agreement > 0))
    return found
