"""pass@k and maj@k from n samples of a problem, both as expectations over its k-subsets.

pass@k is Chen et al. 2021's estimate. maj@k, the correctness of the majority answer of k samples (DeepSeek-R1's cons@k,
DeepSeekMath's Maj@K), is counted over all k-subsets too, so that no luck of the draw is in the curve.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, from `correct` of n ≥ k samples:
    1 − C(n−c, k)/C(n, k). pass@1 is the mean correctness c/n."""
    assert 0 <= correct <= n, (n, correct)
    assert 1 <= k <= n, (n, k)
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def curve_ks(n: int) -> tuple[int, ...]:
    """The k of a curve from n samples: powers of two, and n."""
    return tuple(sorted({2**power for power in range(n.bit_length())} | {n}))


def maj_at_k(answers: Sequence[str | None], worth: Callable[[str], bool | Fraction], ks: Sequence[int]) -> list[float]:
    """Mean worth of the most frequent answer over all k-subsets of the n samples, for each k ≤ n of `ks`: 1 for a right
    one, 0 for a wrong one.

    None is a reply without an answer and has no vote. Answers that share the first place are averaged, which is what a
    fair draw among them would give; a subset without any answer is wrong.
    """
    n, votes = len(answers), Counter(answer for answer in answers if answer is not None)
    assert all(1 <= k <= n for k in ks), (n, ks)
    shares_K = [Fraction()] * len(ks)
    for winner in filter(worth, votes):
        others = [count for answer, count in votes.items() if answer != winner]
        for most in range(1, votes[winner] + 1):
            ways = _subsets(others, n - votes[winner] - sum(others), most)
            drawn = worth(winner) * math.comb(votes[winner], most)
            for position, k in enumerate(ks):
                won = sum(Fraction(ways[k - most, tied], tied + 1) for tied in range(len(others) + 1))
                shares_K[position] += drawn * won / math.comb(n, k)
    return [float(share) for share in shares_K]


def _subsets(others: Sequence[int], abstained: int, most: int) -> Counter[tuple[int, int]]:
    """How many sets of the other samples have (this size, so many answers exactly `most` times), and none more often.

    Answers that occur fewer than `most` times can do neither harm nor good: any subset of them will do.
    """
    free = abstained + sum(count for count in others if count < most)
    ways = Counter({(size, 0): math.comb(free, size) for size in range(free + 1)})
    for count in others:
        if count < most:
            continue
        grown: Counter[tuple[int, int]] = Counter()
        for (size, tied), number in ways.items():
            for taken in range(most + 1):
                grown[size + taken, tied + (taken == most)] += number * math.comb(count, taken)
        ways = grown
    return ways
