"""pass@k and consensus from n samples of a problem (Chen et al. 2021; DeepSeek-R1, section 3)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, from `correct` of n ≥ k samples:
    1 − C(n−c, k)/C(n, k). pass@1 is the mean correctness c/n."""
    assert 0 <= correct <= n, (n, correct)
    assert 1 <= k <= n, (n, k)
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def consensus(answers: Sequence[str | None], is_right: Callable[[str], bool]) -> float:
    """Correctness of the most frequent answer (cons@n). None is a reply without an answer and has no vote.

    Answers that share the first place are averaged, which is what a fair draw among them would give.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return sum(is_right(answer) for answer in winners) / len(winners)
