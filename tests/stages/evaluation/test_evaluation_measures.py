"""pass@k, consensus, bootstrap intervals and the byte trigram against enumeration, simulation and hand counts."""

import itertools
import math
import time
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from stages.evaluation.claims import Claim, Evaluation, Rise, judge, judge_rise
from stages.evaluation.intervals import bootstrap_mean, bootstrap_share, paired_difference
from stages.evaluation.ngram import fit
from stages.evaluation.pass_at_k import curve_ks, maj_at_k, pass_at_k
from stages.evaluation.scores import curve, problem_record, table
from stages.problems.problem import Problem


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 6, 2), (7, 3, 5), (4, 3, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, correct, k):
    subsets = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_naive_estimate_is_not():
    rng = np.random.default_rng(0)
    rate, n, k = 0.2, 6, 4
    counts = rng.binomial(n, rate, 40_000)
    estimates = np.array([pass_at_k(n, c, k) for c in range(n + 1)])[counts]
    truth = 1 - (1 - rate) ** k
    assert estimates.mean() == pytest.approx(truth, abs=0.005)
    assert abs((1 - (1 - counts / n) ** k).mean() - truth) > 0.02


def majority(answers):
    """The share of the most frequent answers that are "4"."""
    votes = Counter(answer for answer in answers if answer is not None)
    best = [answer for answer, count in votes.items() if count == max(votes.values())]
    return best.count("4") / len(best) if best else 0.0


def test_maj_at_k_is_the_mean_majority_of_all_subsets():
    draw = Random(0)
    for _ in range(40):
        answers = [draw.choice(["4", "5", "6", None]) for _ in range(draw.randint(1, 7))]
        ks = range(1, len(answers) + 1)
        for k, share in zip(ks, maj_at_k(answers, "4".__eq__, ks), strict=True):
            subsets = list(itertools.combinations(answers, k))
            assert share == pytest.approx(sum(map(majority, subsets)) / len(subsets), abs=1e-12), (answers, k)


def test_maj_at_k_of_64_samples_is_exact_where_every_answer_is_another():
    started = time.perf_counter()
    shares = maj_at_k([str(number) for number in range(64)], "4".__eq__, curve_ks(64))
    assert shares == pytest.approx([1 / 64] * 7, abs=1e-12)  # a tie of all that were drawn
    assert time.perf_counter() - started < 5


def test_a_curve_has_the_powers_of_two_and_all_samples():
    assert [curve_ks(n) for n in (1, 2, 6, 16)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8, 16)]


def evaluation(name, answers):
    """An evaluation of ten problems whose right answer is 4, with these answers to each."""
    records = {}
    for number in range(10):
        ks = curve_ks(len(answers))
        correct = answers.count("4")
        records[str(number)] = {
            **{"samples": len(answers), "content": str(number)},
            "pass_at_k": [pass_at_k(len(answers), correct, k) for k in ks],
            "maj_at_k": maj_at_k(answers, "4".__eq__, ks),
        }
    return Evaluation(name, records, [], [], [])


def test_a_comparisons_note_says_what_a_teacher_spent_of_the_cost():
    records = {str(number): {"content": str(number), "pass_1": 0.5} for number in range(3)}
    left, right = (
        Evaluation(name, records, [], [], [], flops=2e12, teacher_flops=spent)
        for name, spent in (("left", 5e11), ("right", 0.0))
    )
    verdict = judge(Claim(left="left", right="right"), {"left": left, "right": right})
    assert verdict.note == "2e+12 (5e+11 of them a teacher's) against 2e+12 FLOPs"


def test_a_rise_holds_where_the_majority_gained_what_any_sample_had_before():
    before, sharper = evaluation("before", ["4", "5", "5", "5"]), evaluation("after", ["4", "4", "4", "5"])
    verdict = judge_rise(Rise(after="after", before="before", k=4), {"before": before, "after": sharper})
    assert verdict.holds
    assert (verdict.difference, verdict.note) == (1.0, "Maj@4 +1.000, Pass@4 +0.000")
    wider = {"before": evaluation("before", ["5"] * 4), "after": evaluation("after", ["4", "5", "5", "5"])}
    verdict = judge_rise(Rise(after="after", before="before", k=4), wider)
    assert not verdict.holds
    assert verdict.difference == -1.0
    verdict = judge_rise(Rise(after="after", before="before", k=16), wider)
    assert (verdict.holds, verdict.note) == (False, "after was measured at k = 1, 2, 4")


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        # 100 problems of different difficulty, 16 samples each
        rates = rng.beta(0.5, 1.0, 100)
        interval = bootstrap_mean(rng.binomial(16, rates) / 16, resamples=400, seed=trial)
        covered += interval.low <= 1 / 3 <= interval.high
    assert 0.90 <= covered / 300 <= 0.985


def test_problems_that_agree_leave_room_for_those_that_were_not_asked():
    one = bootstrap_share([1.0, 1.0], ["sum", "sum"])  # twins
    assert one.mean == 1 and one.low < 0.25
    assert bootstrap_share([1.0] * 200, [str(n) for n in range(200)]).low > 0.97
    assert bootstrap_share([0.0, 1.0, 1.0], list("abc")) == bootstrap_mean([0.0, 1.0, 1.0], list("abc"))


def test_pairing_makes_the_interval_of_a_difference_narrow():
    rng = np.random.default_rng(1)
    hard = rng.uniform(0, 1, 200)
    left, right = np.clip(hard + 0.05, 0, 1), hard
    difference = paired_difference(left, right)
    assert 0.03 < difference.low <= difference.mean <= difference.high < 0.06
    assert difference == paired_difference(left, right)  # deterministic


def test_the_trigram_gives_a_distribution_over_bytes_in_every_context():
    model = fit([b"abracadabra " * 3, b"abracadabra", b"cad"])
    for context in (b"ab", b"zz", b"a", b""):
        total = sum(
            2 ** -(model.bits([context + bytes([b])]) - (model.bits([context]) if context else 0)) for b in range(256)
        )
        assert total == pytest.approx(1.0, abs=1e-9)


def test_the_trigram_reaches_the_entropy_of_a_second_order_source():
    rng = np.random.default_rng(0)

    # Next byte depends on the last two: a coin with p = 0.9 for (x XOR y), over the alphabet {a, b}.
    def draw(n):
        bits = [0, 1]
        for flip in rng.random(n) < 0.1:
            bits.append((bits[-1] ^ bits[-2]) ^ int(flip))
        return bytes(97 + bit for bit in bits[2:])

    model = fit([draw(2000) for _ in range(50)])
    test = [draw(2000) for _ in range(10)]
    entropy = -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1))
    assert model.bits(test) / sum(map(len, test)) == pytest.approx(entropy, abs=0.02)


def test_ten_megabytes_take_seconds():
    rng = np.random.default_rng(0)
    documents = [bytes(rng.integers(97, 123, 10_000, dtype=np.uint8)) for _ in range(300)]
    started = time.perf_counter()
    model = fit(documents)
    bits = model.bits(documents[:20])
    assert time.perf_counter() - started < 8  # 3 MB; ten times the usual time on a busy machine
    assert bits / 200_000 == pytest.approx(math.log2(26), abs=0.1)


def test_a_problems_record_is_what_its_rows_say():
    problem = Problem("x", "countdown", "en", 1, "?", "", "", "countdown", {"numbers": [2, 3, 7], "target": 13}, "")

    def row(answer, accuracy, tokens, form=1.0):
        text = f"<think>so</think><answer>{answer}</answer>" if form else answer
        return {"completion": text, "accuracy": accuracy, "format": form, "tokens": tokens, "language_consistency": 1.0}

    right, wrong = [row("2*3+7", 1.0, 10), row("7+3*2", 1.0, 10)], [row("2+3+7", 0.0, 20), row("7-3-2", 0.0, 20)]
    rows = [*right, *wrong, row("x", 0.0, 5, 0.0)]
    record = problem_record(problem, rows)
    assert (record["pass_1"], record["pass_k"], record["consensus"]) == (0.4, 1.0, 1.0)  # two ways to say 13 win
    assert (record["format"], record["length"]) == (0.8, 13.0)
    assert record["pass_at_k"] == pytest.approx([0.4, 0.7, 1.0, 1.0])  # at 1, 2, 4 and 5
    mixed = [row("1+2", 1.0, 10), row("3 from [1, 2]", 0.0, 10)]  # one vote, by the spelling that ballots have
    game = replace(problem, arguments={"numbers": [1, 2], "target": 3})
    assert [problem_record(game, order)["consensus"] for order in (mixed, mixed[::-1])] == [0.5, 0.5]
    boxes = [{**row, "completion": r"so</think>\boxed{3 \times 2 + 7}", "format": 0.0} for row in right]
    assert problem_record(problem, [*boxes, *rows[2:]])["maj_at_k"] == record["maj_at_k"]
    assert record["maj_at_k"][0] == pytest.approx(0.4)
    assert [point["k"] for point in curve([record])] == [1, 2, 4, 5]
    table_rows = table([record, {**record, "language": "zh", "family": "gcd", "pass_1": 0.0}])
    assert [(r["family"], r["language"]) for r in table_rows][:3] == [("all", "all"), ("all", "en"), ("all", "zh")]
    assert table_rows[0]["pass_1"] == 0.2
