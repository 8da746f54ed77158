import math
from itertools import pairwise

import pytest

from infra.errors import ConfigError
from stages.training.schedules import BatchRamp, LearningRate, batch_sizes


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        # DeepSeek LLM: ×0.316 at 80 % of the tokens, ×0.1 at 90 %
        ("multi_step_v1", 0.0, 4.2e-4),
        ("multi_step_v1", 0.7999, 4.2e-4),
        ("multi_step_v1", 0.8, 4.2e-4 * 0.316),
        ("multi_step_v1", 0.8999, 4.2e-4 * 0.316),
        ("multi_step_v1", 0.9, 4.2e-5),
        # V2: the same steps at 60 % and 90 %
        ("multi_step_v2", 0.5999, 4.2e-4),
        ("multi_step_v2", 0.6, 4.2e-4 * 0.316),
        ("multi_step_v2", 0.9, 4.2e-5),
        ("constant", 0.99, 4.2e-4),
        # cosine to a tenth: half-way it is the mean of both ends
        ("cosine", 0.5, 4.2e-4 * 0.55),
        ("cosine", 1.0, 4.2e-5),
        # warm-up, stable, linear decay over the last fifth to a tenth
        ("wsd", 0.7999, 4.2e-4),
        ("wsd", 0.9, 4.2e-4 * 0.55),
        ("wsd", 1.0, 4.2e-5),
    ],
)
def test_a_schedule_has_the_papers_value_at_its_breakpoints(schedule, progress, expected):
    rate = LearningRate(schedule=schedule, peak=4.2e-4)
    assert rate.at(step=10**6, progress=progress) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("trillions", "expected"),
    [
        (0.0, 2.2e-4),
        (9.999, 2.2e-4),
        (10.0, 2.2e-4),
        (12.15, (2.2e-4 + 2.2e-5) / 2),  # the middle of 4.3T of cosine
        (14.3, 2.2e-5),
        (14.632, 2.2e-5),  # 333B at 2.2e-5
        (14.634, 7.3e-6),  # the last 167B
        (14.799, 7.3e-6),
    ],
)
def test_v3_keeps_the_reported_rate_at_every_reported_token_count(trillions, expected):
    rate = LearningRate(schedule="v3", peak=2.2e-4, warmup_steps=2000)
    assert rate.at(step=5000, progress=trillions / 14.8) == pytest.approx(expected, rel=1e-9)


def test_warmup_is_linear_in_steps_and_reaches_the_peak_on_its_last_step():
    rate = LearningRate(schedule="v3", peak=2.2e-4, warmup_steps=2000)
    assert rate.at(0, 0.0) == pytest.approx(2.2e-4 / 2000)
    assert rate.at(999, 0.0) == pytest.approx(1.1e-4)
    assert rate.at(1999, 0.0) == 2.2e-4


def test_every_schedule_is_positive_and_never_rises_after_warmup():
    for schedule in ("constant", "cosine", "multi_step_v1", "multi_step_v2", "v3", "wsd"):
        rates = [LearningRate(schedule=schedule, peak=1.0).at(0, i / 1000) for i in range(1000)]
        assert all(later <= earlier for earlier, later in pairwise(rates)), schedule
        assert rates[-1] > 0


def test_a_field_that_the_schedule_ignores_is_refused():
    with pytest.raises(ConfigError, match="final has no meaning for schedule 'v3'"):
        LearningRate.parse({"schedule": "v3", "peak": 1e-3, "final": 0.2})


def test_a_batch_ramp_grows_linearly_to_the_full_batch():
    sizes = batch_sizes(100, 15360, BatchRamp(start=3072, until=0.5))
    assert sizes[0] == 3072
    assert sizes[25] == 9216  # half-way up
    assert sizes[50:] == [15360] * 50
    assert sizes == sorted(sizes)
    assert set(sizes) == {3072 * n for n in range(1, 6)}


def test_a_batch_that_the_ramp_cannot_reach_is_refused():
    with pytest.raises(ConfigError, match=r"batch_size=100 is no multiple of batch_ramp\.start=30"):
        batch_sizes(10, 100, BatchRamp(start=30, until=0.5))


def test_without_a_ramp_every_step_has_the_full_batch():
    assert batch_sizes(3, 12, None) == [12, 12, 12]


def test_the_cosine_is_a_cosine():
    rate = LearningRate(schedule="cosine", peak=1.0, final=0.0)
    assert rate.at(0, 0.25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
