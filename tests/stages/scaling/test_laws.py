"""The fits against truths that are known, and the published formulas against the published settings."""

from __future__ import annotations

import numpy as np
import pytest

from stages.scaling import published
from stages.scaling.hyper import Grid, batch_law, fit_hyper, rate_law
from stages.scaling.isoflop import IsoFlop, fit_laws
from stages.scaling.laws import fit_parabola, fit_power_law, fit_saturating, near_optimal
from stages.scaling.parametric import fit_parametric

COMPUTES = np.array([1e17, 1e18, 1e19, 1e20])


def test_a_power_law_without_noise_is_found_to_the_last_digits():
    for law in (published.RATE, published.BATCH, published.SCALE, published.TOKENS):
        found = fit_power_law(COMPUTES, law.at(COMPUTES))
        assert (found.a, found.b) == pytest.approx((law.a, law.b), rel=1e-9)


def test_a_parabola_has_its_minimum_where_numpy_finds_the_root_of_its_derivative():
    scales = np.geomspace(1e6, 1e8, 7)
    losses = 2 + 0.1 * (np.log(scales) - np.log(2e7)) ** 2 + 0.01 * np.cos(np.arange(7))
    curve = fit_parabola(scales, losses[None])
    oracle = np.polynomial.Polynomial.fit(np.log(scales), losses, 2)
    (vertex,) = oracle.deriv().roots()
    scale, loss, bracketed = curve.optimum()
    assert (scale[0], loss[0], bracketed[0]) == (pytest.approx(np.exp(vertex)), pytest.approx(oracle(vertex)), True)
    np.testing.assert_allclose(curve.at(scales)[0], oracle(np.log(scales)))


@pytest.mark.parametrize("sign", [1, -1])
def test_without_a_minimum_inside_the_better_end_stands_in_and_says_so(sign):
    scales = np.geomspace(1e6, 1e8, 5)
    falling = 3 - 0.1 * np.log(scales) + sign * 1e-3 * (np.log(scales) - np.log(1e7)) ** 2
    scale, loss, bracketed = fit_parabola(scales, falling[None]).optimum()
    assert not bracketed[0]
    assert (scale[0], loss[0]) == pytest.approx((1e8, falling[-1]))


@pytest.mark.parametrize(("E", "A", "gamma"), [(0.5, 20.0, 0.1), (1.7, 400.0, 0.3), (0.0, 9.0, 0.05), (2.0, 1e6, 0.5)])
def test_a_saturating_law_without_noise_is_found(E, A, gamma):
    truth = E + A * COMPUTES**-gamma
    found = [value[0] for value in fit_saturating(COMPUTES, truth[None])]
    assert found[0] == pytest.approx(E, abs=0.02)
    assert found[2] == pytest.approx(gamma, rel=0.02)
    ahead = 1e22
    assert found[0] + found[1] * ahead ** -found[2] == pytest.approx(E + A * ahead**-gamma, rel=2e-3)


def test_a_saturating_law_never_falls_below_zero_nor_rises():
    losses = np.array([[1.0, 1.1, 1.2, 1.3], [4.0, 2.0, 1.0, 0.1], [1.0, 1.0, 1.0, 1.0]])
    E, A, _ = fit_saturating(COMPUTES, losses)
    assert (E >= 0).all()
    assert (A >= 0).all()


def test_near_optimal_is_a_quarter_of_a_per_cent_and_never_a_run_that_diverged():
    assert near_optimal(np.array([2.0, 2.0049, 2.0051, np.inf])).tolist() == [True, True, False, False]


def test_the_published_exponents_come_back_from_points_of_the_published_formula():
    laws = fit_laws(published.synthetic_ladder(noise=0.003, seed=0))
    assert laws.scale.b == pytest.approx(published.SCALE.b, abs=0.01)
    assert published.SCALE.b in laws.scale_exponent
    assert published.TOKENS.b in laws.tokens_exponent
    assert laws.scale.b + laws.tokens.b == pytest.approx(1, abs=1e-12)
    assert laws.scale.a * laws.tokens.a == pytest.approx(1)
    exact = fit_laws(published.synthetic_ladder(noise=0.0, seed=0))
    assert (exact.scale.a, exact.scale.b) == pytest.approx((published.SCALE.a, published.SCALE.b))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Of 200 ladders of the size that V1 ran less half, each with a held-out run three times beyond."""
    rng = np.random.default_rng(0)
    budgets, beyond, noise, trials = (1e17, 1e18, 1e19, 1e20), 3e20, 0.004, 200
    held = {"exponent": 0, "scale": 0, "run": 0}
    for seed in range(trials):
        laws = fit_laws(published.synthetic_ladder(noise, seed, budgets, scales=6), seed)
        held["exponent"] += published.SCALE.b in laws.scale_exponent
        held["scale"] += published.SCALE.at(beyond) in laws.scale_at(beyond)
        held["run"] += published.synthetic_loss(beyond) * (1 + noise * rng.standard_normal()) in laws.loss_at(beyond)
    for name, count in held.items():
        assert 0.90 <= count / trials <= 0.99, (name, count)


def test_more_noise_makes_wider_intervals():
    quiet, loud = (fit_laws(published.synthetic_ladder(noise, seed=1)) for noise in (0.001, 0.01))
    for name in ("scale_exponent", "loss_exponent"):
        narrow, wide = getattr(quiet, name), getattr(loud, name)
        assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert loud.noise == pytest.approx(0.01, rel=0.3)


def grids(computes: np.ndarray, noise: float = 0.0, seed: int = 0) -> list[Grid]:
    """Grids by √2 about V1's formulas, where a factor e off costs 2 % in rate and 1 % in batch."""
    rng = np.random.default_rng(seed)
    found = []
    for compute in computes:
        away_rate, away_batch = np.meshgrid(*2 * [np.arange(-3, 4) * np.log(2) / 2 + rng.uniform(-0.15, 0.15)])
        losses = 2 * (1 + 0.02 * away_rate**2 + 0.01 * away_batch**2)
        losses *= 1 + noise * rng.standard_normal(losses.shape)
        rate, batch = published.RATE.at(compute), published.BATCH.at(compute)
        found.append(
            Grid(compute, *(x.ravel() for x in (rate * np.exp(away_rate), batch * np.exp(away_batch), losses)))
        )
    return found


def test_rate_and_batch_laws_go_through_all_near_optimal_settings():
    computes = np.geomspace(1e17, 2e19, 6)
    assert rate_law(grids(computes)).b == pytest.approx(published.RATE.b, abs=0.03)
    assert batch_law(grids(computes)).b == pytest.approx(published.BATCH.b, abs=0.03)


def test_their_intervals_cover_noise_and_the_coarseness_of_the_grid():
    computes = np.geomspace(1e17, 2e19, 5)
    covered = np.zeros(2)
    for seed in range(30):
        found = fit_hyper(grids(computes, 0.002, seed), noise=0.002, seed=seed)
        covered += published.RATE.b in found.rate_exponent, published.BATCH.b in found.batch_exponent
    assert (covered >= 26).all(), covered
    single = [Grid(c, np.array([1e-3, 2e-3]), np.array([8, 8]), np.array([2.0, 3.0])) for c in (1e17, 1e19)]
    found = fit_hyper(single, noise=0.002)
    assert (found.rate.b, found.batch.b) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))
    # One of two rates wins everywhere, yet each choice may be half a step off: ln 2 over ln 100 between the two.
    assert found.rate_exponent.high == pytest.approx(np.log(2) / np.log(100), rel=0.25)
    assert (found.batch_exponent.low, found.batch_exponent.high) == (None, None), "only one batch was tried"


def test_the_parametric_fit_finds_the_constants_and_the_optimum_that_they_imply():
    E, A, alpha, B, beta = 0.6, 60.0, 0.30, 90.0, 0.27
    ladder = []
    for compute in (1e16, 1e17, 1e18, 1e19):
        scales = np.geomspace(0.02, 50, 8) * 0.2 * compute**0.5
        ladder.append(IsoFlop(compute, scales, E + A * scales**-alpha + B * (compute / scales) ** -beta))
    found = fit_parametric(ladder)
    assert (found.E, found.alpha, found.beta) == pytest.approx((E, alpha, beta), abs=0.02)
    assert found.scale_exponent == pytest.approx(beta / (alpha + beta), abs=0.01)
    assert found.at(1e10, 1e10) == pytest.approx(E + A * 1e10**-alpha + B * 1e10**-beta, rel=2e-3)


def test_the_published_formulas_agree_with_each_other_and_with_the_published_settings():
    assert published.SCALE.b + published.TOKENS.b == pytest.approx(1)
    assert published.SCALE.a * published.TOKENS.a == pytest.approx(1, abs=1e-3)
    for scale, tokens in published.BY_DATA.values():
        assert scale + tokens == pytest.approx(1)
    assert published.BY_DATA["current data"] == pytest.approx((published.SCALE.b, published.TOKENS.b), abs=5e-4)
    for setting in published.settings():
        assert setting.rate_by_formula == pytest.approx(setting.rate, rel=0.02), setting.name
        assert setting.batch_by_formula == pytest.approx(setting.batch, rel=0.06), setting.name


def test_a_grid_says_where_its_best_lies_at_the_edge():
    rates, batches = (x.ravel() for x in np.meshgrid([1e-3, 2e-3, 4e-3], [8, 16]))
    inside = Grid(1e17, rates, batches, 2 + (rates - 2e-3) ** 2 * 1e5 + (batches == 16))
    assert inside.edges == ["B"], "of two values each is an end"
    assert Grid(1e17, rates, np.full(6, 8), 3 - rates * 100).edges == ["η"], "what was not varied has no edge"
