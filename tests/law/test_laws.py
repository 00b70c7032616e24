"""The laws find what made the data, agree with SciPy, and their intervals cover."""

import numpy as np
import pytest
from scipy.optimize import curve_fit

from memupdate.law.memory_law import fit_memory_law, is_saturated, why_not_fitted
from memupdate.law.points import LawPoint
from memupdate.law.recall_link import fit_recall_link
from memupdate.law.residual_law import RESIDUAL_LOSS, fit_residual_law

RANKS, SIZES = (1, 2, 4, 8, 16), (100, 200, 400, 800, 1600)
PER_RANK = 2880


def point(rank, tokens, drop, *, before=6.0, early=False, proved=0.5, kl=None):
    facts = max(1, tokens // 5)
    return LawPoint(
        "sha256:a", "mlp-one", "sha256:r", rank, rank * PER_RANK, facts, tokens, before, before - drop,
        round(proved * facts), kl, 60, early, 5 + 0.04 * tokens,
    )  # fmt: skip


def paper(rank, tokens, c=6.0, alpha=0.4, beta=0.3, b=0.2):
    return c * rank**alpha * tokens**-beta + b


def residual(parameters, tokens, k=220.0, gamma=1.4, delta=1.0, floor=0.05):
    return k * parameters**-gamma * tokens**delta + floor


def grid():
    cells = [(rank, tokens) for rank in RANKS for tokens in SIZES]
    return [rank * PER_RANK for rank, _ in cells], [tokens for _, tokens in cells]


def fit_residual(parameters, tokens, values, seed=0, bootstrap=60):
    return fit_residual_law(
        parameters, tokens, values, shape=RESIDUAL_LOSS, confidence=0.9, bootstrap=bootstrap, seed=seed
    )


def test_memory_law_agrees_with_scipy_on_clean_data():
    points = [point(rank, tokens, paper(rank, tokens)) for rank in RANKS[:4] for tokens in SIZES]
    law = fit_memory_law(points, confidence=0.9, bootstrap=40, seed=0)
    reference, _ = curve_fit(
        lambda x, c, alpha, beta, b: c * x[0] ** alpha * x[1] ** -beta + b,
        ([p.rank for p in points], [p.target_tokens for p in points]),
        [p.loss_drop_nats for p in points],
        p0=(3, 0.5, 0.5, 0),
        maxfev=20_000,
    )
    assert law.best == pytest.approx(tuple(reference), rel=1e-3)
    assert law.best == pytest.approx((6.0, 0.4, 0.3, 0.2), rel=1e-3)
    assert law.r2 == pytest.approx(1.0)
    assert law.mape_unseen_cell < 1e-3


def test_memory_law_finds_noisy_parameters_within_its_intervals():
    rng = np.random.default_rng(3)
    points = [point(r, t, paper(r, t) + rng.normal(0, 0.02)) for r in RANKS[:4] for t in SIZES for _ in range(2)]
    law = fit_memory_law(points, confidence=0.98, bootstrap=150, seed=0)
    for truth, found in zip((6.0, 0.4, 0.3, 0.2), (law.c, law.alpha, law.beta, law.b), strict=True):
        assert found.low <= truth <= found.high
    assert law.r2 is not None
    assert law.r2 > 0.98


def test_saturated_points_say_at_least_and_do_not_bend_the_law():
    open_points = [point(rank, tokens, paper(rank, tokens)) for rank in RANKS[:3] for tokens in SIZES]
    # What the law would put at more than the base loss of 3.2 nats is cut there: censored, not a contradiction.
    full = [point(64, tokens, 3.15, before=3.2) for tokens in SIZES]
    early = [point(32, tokens, 1.0, early=True) for tokens in SIZES[:2]]
    assert all(map(is_saturated, full + early))
    law = fit_memory_law(open_points + full + early, confidence=0.9, bootstrap=40, seed=0)
    assert law.points_used == len(open_points)
    assert law.points_censored == len(full) + len(early)
    assert law.rank_range == (1, 4)
    assert law.best == pytest.approx((6.0, 0.4, 0.3, 0.2), rel=0.02)


def test_a_censored_point_above_the_law_pulls_it_up():
    open_points = [point(rank, tokens, paper(rank, tokens)) for rank in RANKS[:3] for tokens in SIZES]
    early = [point(32, 1600, 5.5, early=True)] * 3
    law = fit_memory_law(open_points + early, confidence=0.9, bootstrap=40, seed=0)
    assert law.predict_drop(32, 1600, 0.9).mid > paper(32, 1600) + 0.3


def test_too_few_unsaturated_points_are_named():
    points = [point(rank, tokens, 5.99) for rank in RANKS for tokens in SIZES]
    assert "of 25 points 0 are unsaturated" in why_not_fitted(points)
    assert why_not_fitted([point(rank, tokens, 2.0) for rank in (1, 2) for tokens in (100, 200)]) == ""


def test_residual_law_agrees_with_scipy_on_clean_data():
    parameters, tokens = grid()
    values = [residual(p, t) for p, t in zip(parameters, tokens, strict=True)]
    law = fit_residual(parameters, tokens, values)
    reference, _ = curve_fit(
        lambda x, ln_k, gamma, delta, floor: np.log(np.exp(ln_k - gamma * x[0] + delta * x[1]) + abs(floor)),
        (np.log(parameters), np.log(tokens)),
        np.log(values),
        p0=(5, 1, 1, 0.01),
    )
    assert law.best[1:] == pytest.approx((reference[1], reference[2], abs(reference[3])), rel=0.02)
    assert law.best[1:] == pytest.approx((1.4, 1.0, 0.05), rel=0.02)
    assert law.k.mid == pytest.approx(220.0, rel=0.2)
    assert law.r2 == pytest.approx(1.0, abs=1e-3)
    assert law.mape_unseen_rank is not None
    assert law.mape_unseen_rank < 0.05


def test_residual_intervals_cover_new_runs_at_about_the_stated_rate():
    parameters, tokens = grid()
    parameters, tokens = parameters[::2], tokens[::2]
    asked = [(2 * PER_RANK, 300), (4 * PER_RANK, 1200), (12 * PER_RANK, 600)]
    inside, total = 0, 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        noisy = [residual(p, t) * np.exp(rng.normal(0, 0.15)) for p, t in zip(parameters, tokens, strict=True)]
        law = fit_residual(parameters, tokens, noisy, seed=seed, bootstrap=80)
        for p, t in asked:
            predicted = law.predict(p, t, 0.9)
            fresh = residual(p, t) * np.exp(rng.normal(0, 0.15, 10))
            inside += int(np.sum((predicted.low <= fresh) & (fresh <= predicted.high)))
            total += len(fresh)
    assert 0.84 <= inside / total <= 0.97


def test_one_failed_run_does_not_move_the_law():
    parameters, tokens = grid()
    values = [residual(p, t) for p, t in zip(parameters, tokens, strict=True)]
    spoiled = list(values)
    spoiled[12] *= 20
    clean, robust = fit_residual(parameters, tokens, values), fit_residual(parameters, tokens, spoiled)
    assert robust.best[1:3] == pytest.approx(clean.best[1:3], rel=0.1)


def test_a_memory_that_never_fills_still_gives_finite_monotone_laws():
    parameters, tokens = grid()
    law = fit_residual(parameters, tokens, [0.09 + 0.001 * (index % 3) for index in range(len(tokens))])
    facts = [t // 5 for t in tokens]
    link = fit_recall_link(law, parameters, tokens, facts, facts, confidence=0.9, seed=0)
    share = link.predict(law, parameters[0], tokens[-1], 0.9)
    assert 0.95 < share.low <= share.mid <= share.high <= 1.0
    assert law.predict(parameters[0], 1e9, 0.9).high < float("inf")


def test_recall_link_finds_what_made_the_shares():
    rng = np.random.default_rng(0)
    parameters, tokens = grid()
    values = [residual(p, t) for p, t in zip(parameters, tokens, strict=True)]
    law = fit_residual(parameters, tokens, values)
    power = np.log(np.asarray(values) - 0.05)
    facts = [400] * len(tokens)
    proved = [int(rng.binomial(400, 1 / (1 + np.exp(-(1.0 - 2.0 * (x - power.mean())))))) for x in power]
    link = fit_recall_link(law, parameters, tokens, facts, proved, confidence=0.9, seed=0)
    assert link.best == pytest.approx((1.0, 2.0), abs=0.15)
    assert link.intercept.low < 1.0 < link.intercept.high
    assert link.mean_error < 0.02
    assert link.scatter < 0.2


def test_recall_link_sees_scatter_between_runs():
    rng = np.random.default_rng(0)
    parameters, tokens = grid()
    values = [residual(p, t) for p, t in zip(parameters, tokens, strict=True)]
    law = fit_residual(parameters, tokens, values)
    eta = 1.0 - 2.0 * (np.log(np.asarray(values) - 0.05) - np.log(np.asarray(values) - 0.05).mean())
    facts = [400] * len(tokens)
    proved = [int(rng.binomial(400, 1 / (1 + np.exp(-(value + rng.normal(0, 0.8)))))) for value in eta]
    link = fit_recall_link(law, parameters, tokens, facts, proved, confidence=0.9, seed=0)
    assert 0.4 < link.scatter < 1.3
