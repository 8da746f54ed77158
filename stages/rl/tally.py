"""What a step measured, added up over micro-batches and ranks in one small all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from stages.rl import emergence
from stages.rl.rewards import RULES, chain_of
from stages.rl.rollout import Rollout
from stages.training.distributed import Ranks

EXPLORED = ("replies", "tokens", "surprise", "groups", "flat_groups", "flops")
LEARNED = ("loss", "kl", "clipped", "loss_tokens", "compared_tokens", "mismatch_kl")
PEAKS = ("max_ratio", "mismatch_max_ratio", "gradient_norm")


class Tally:
    """Sums and maxima by name; the names are fixed, so every rank reduces the same vector.

    `judged` are those of `rewards.JUDGED` that models give; with a `critic` its loss is counted too.
    """

    def __init__(self, languages: Sequence[str], judged: Sequence[str] = (), critic: bool = False) -> None:
        self._languages = tuple(languages)
        self._said = ("reward", *emergence.MEASURES, "finished")
        self._rules = (*RULES, *judged)
        self._learned = (*LEARNED, "value_loss") if critic else LEARNED
        counts = ("replies", "verified", "accuracy", "language")
        by_language = [f"{what}_{language}" for language in languages for what in counts]
        by_rule = [f"{what}{rule}" for rule in self._rules for what in ("", "with_")]  # sums, replies that they judge
        self._sums = dict.fromkeys((*self._said, *by_rule, *EXPLORED, *self._learned, *by_language), 0.0)
        self._peaks = dict.fromkeys(PEAKS, 0.0)

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self._sums[name] += amount

    def peak(self, **values: float) -> None:
        for name, value in values.items():
            self._peaks[name] = max(self._peaks[name], value)

    def explored(self, rollouts: Sequence[Rollout], groups: int, flat_groups: int) -> None:
        """Count replies of `groups` groups; `flat_groups` of them had no contrast in reward."""
        self.add(flat_groups=flat_groups, groups=groups)
        for rollout in rollouts:
            verdict, language = rollout.score, rollout.problem.language
            self.add(replies=1, tokens=len(rollout.tokens), finished=rollout.finished, reward=verdict.reward)
            self.add(surprise=-sum(rollout.logprobs))
            self.add(**verdict.rules, **emergence.measure(chain_of(rollout.text)))
            self.add(**{f"with_{name}": 1 for name in verdict.rules})
            self.add(**{f"replies_{language}": 1, f"language_{language}": verdict.language})
            if not rollout.problem.open:
                self.add(**{f"verified_{language}": 1, f"accuracy_{language}": verdict.accuracy})

    def reduce(self, ranks: Ranks) -> dict[str, float]:
        """The step's row: means over replies (a rule's over those that it judges) or tokens, maxima, and the plain sums
        `flops` and `reply_tokens`."""
        sums = torch.tensor(list(self._sums.values()), dtype=torch.float64, device=ranks.device)
        peaks = torch.tensor(list(self._peaks.values()), dtype=torch.float64, device=ranks.device)
        if ranks.world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        total = dict(zip(self._sums, sums.tolist(), strict=True))

        def share(name: str, of: str) -> float:
            return total[name] / max(total[of], 1.0)

        row = {name: share(name, "replies") for name in self._said}
        row |= {name: share(name, f"with_{name}") for name in self._rules}
        for language in self._languages:
            row[f"accuracy_{language}"] = share(f"accuracy_{language}", f"verified_{language}")
            row[f"language_{language}"] = share(f"language_{language}", f"replies_{language}")
        return row | {
            "length": share("tokens", "replies"),
            "flat_groups": share("flat_groups", "groups"),
            **{name: total[name] for name in ("loss", "value_loss") if name in total},
            "kl": share("kl", "loss_tokens"),
            "clip_fraction": share("clipped", "loss_tokens"),
            "entropy": share("surprise", "tokens"),  # −log π of what π sampled: unbiased, and costs nothing
            "mismatch_kl": share("mismatch_kl", "compared_tokens"),
            **dict(zip(self._peaks, peaks.tolist(), strict=True)),
            "reply_tokens": total["tokens"],
            "flops": total["flops"],
        }
