"""All laws together: real data, refusals, monotone predictions, exact JSON."""

import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memupdate.law.errors import LawError
from memupdate.law.fit import LawFit, fit_laws
from memupdate.law.points import LawPoint

PER_RANK = 2880
TRIAL = (
    # facts, target tokens, rank, loss before, loss after, verbatim recall: a 3.6 M-parameter Llama, MLP of one layer,
    # plain SFT, 60 epochs, measured on two CPU cores in November 2026.
    (32, 171, 1, 5.45, 0.35, 0.88),
    (64, 315, 1, 5.92, 0.85, 0.64),
    (64, 315, 2, 5.92, 0.21, 0.97),
    (64, 315, 4, 5.92, 0.08, 1.00),
    (128, 624, 1, 5.84, 1.23, 0.41),
    (128, 624, 4, 5.84, 0.22, 0.91),
    (128, 624, 8, 5.84, 0.04, 1.00),
    (256, 1252, 1, 6.22, 1.89, 0.21),
    (256, 1252, 8, 6.22, 0.16, 0.95),
)


def trial_points():
    return [
        LawPoint(
            "sha256:a", "mlp-one", "sha256:r", rank, rank * PER_RANK, facts, tokens, before, after,
            round(recall * facts), None, 60, False, 7 + 0.04 * tokens,
        )
        for facts, tokens, rank, before, after, recall in TRIAL
    ]  # fmt: skip


def memft_points(seed=0, ranks=(1, 2, 4, 8, 16, 32), sizes=(32, 64, 128, 256)):
    """Guarded MemFT as it looks: full cells stop early at the margin, small ranks run out of epochs; noisy."""
    rng = np.random.default_rng(seed)
    points = []
    for rank in ranks:
        for facts in sizes:
            tokens = round(4.9 * facts)
            power = 220 * (rank * PER_RANK) ** -1.4 * tokens * np.exp(rng.normal(0, 0.15))
            early = bool(power < 0.03)
            share = 1.0 if early else 1 / (1 + np.exp(-(1.9 - 1.9 * np.log(power / 0.25))))
            points.append(
                LawPoint(
                    "sha256:a", "mlp-all", "sha256:r", rank, 4 * rank * PER_RANK, facts, tokens, 5.9,
                    float(min(0.05 + power, 5.5)), int(rng.binomial(facts, share)),
                    float(0.002 + 0.015 * rank**-0.7 * (tokens / 1000) ** 0.6 * np.exp(rng.normal(0, 0.2))),
                    20 if early else 60, early, float((5 + 0.04 * tokens) * np.exp(rng.normal(0, 0.1))),
                )
            )  # fmt: skip
    return points


@pytest.fixture(scope="module")
def fit():
    return fit_laws(memft_points())


def test_the_trial_gives_the_residual_law_that_was_reported():
    fit = fit_laws(trial_points())
    assert fit.loss.r2 is not None
    assert fit.loss.r2 > 0.95
    # Reported: ln L = c − 1.38 ln r + 1.08 ln ℓ, by plain least squares without a floor.
    assert fit.loss.gamma.low < 1.38 < fit.loss.gamma.high
    assert fit.loss.delta.low < 1.08 < fit.loss.delta.high
    assert fit.recall.mean_error < 0.05
    assert fit.memory is not None
    assert fit.memory.points_censored == 3
    assert fit.memory.r2 is not None
    assert fit.memory.r2 > 0.9
    assert fit.harm is None
    assert fit.predict_kl(PER_RANK, 300) is None


def test_thirty_points_are_fitted_well_under_five_seconds():
    points = memft_points(ranks=(1, 2, 4, 8, 16, 32), sizes=(16, 32, 64, 128, 256))
    started = time.perf_counter()
    fit_laws(points)
    assert time.perf_counter() - started < 5


def test_json_round_trip_is_exact(fit):
    again = LawFit.from_json(fit.to_json())
    assert again == fit
    assert again.fit_id == fit.fit_id
    assert fit.fit_id.startswith("sha256:")
    assert again.to_json() == fit.to_json()
    assert again.predict_proved_share(40_000, 777) == fit.predict_proved_share(40_000, 777)
    assert again.predict_loss(40_000, 777) == fit.predict_loss(40_000, 777)


def test_the_fit_depends_on_the_points_not_on_their_order(fit):
    points = memft_points()
    assert fit_laws(points[::-1]).fit_id == fit.fit_id
    assert fit_laws(points[:-1]).fit_id != fit.fit_id
    assert fit_laws(points, seed=1).fit_id != fit.fit_id


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"schema_version": 9}', '{"schema_version": 1, "points": 3}'])
def test_damaged_documents_are_refused(damage):
    with pytest.raises(LawError):
        LawFit.from_json(damage)


def test_a_document_with_a_hole_or_a_nan_is_refused(fit):
    document = json.loads(fit.to_json())
    del document["loss"]["draws"]
    with pytest.raises(LawError, match="damaged"):
        LawFit.from_json(json.dumps(document))
    document = json.loads(fit.to_json())
    document["loss"]["scatter"] = float("nan")
    with pytest.raises(LawError, match="damaged"):
        LawFit.from_json(json.dumps(document))


@pytest.mark.parametrize("field", ["base_fingerprint", "placement", "recipe"])
def test_mixed_points_are_refused(field):
    points = memft_points()
    points[3] = dataclasses.replace(points[3], **{field: "other"})
    with pytest.raises(LawError, match="cannot be fitted together") as caught:
        fit_laws(points)
    assert "other" in caught.value.details


@pytest.mark.parametrize(
    "points",
    [
        [],
        memft_points()[:3],
        memft_points(ranks=(4,), sizes=(16, 32, 64, 128)),
        memft_points(ranks=(1, 2, 4, 8), sizes=(64,)),
    ],
    ids=["none", "three", "one rank", "one size"],
)
def test_too_few_points_are_refused_with_a_hint(points):
    with pytest.raises(LawError) as caught:
        fit_laws(points)
    assert "memupdate calibrate" in caught.value.hint


def test_four_points_and_a_full_memory_are_enough_for_a_wide_answer():
    fit = fit_laws(memft_points(ranks=(16, 32), sizes=(32, 64)))
    assert fit.memory is None
    assert "unsaturated" in fit.memory_note
    share = fit.predict_proved_share(16 * 4 * PER_RANK, 300)
    assert 0 < share.low <= share.mid <= share.high <= 1


coordinates = st.tuples(st.floats(100, 1e8), st.floats(1, 1e8), st.floats(1, 20))


@settings(max_examples=150)
@given(coordinates)
def test_more_tokens_never_help_and_more_rank_never_harms(where):
    parameters, tokens, factor = where
    here = _FIT.predict_proved_share(parameters, tokens)
    fuller, larger = (
        _FIT.predict_proved_share(parameters, factor * tokens),
        _FIT.predict_proved_share(factor * parameters, tokens),
    )
    for end in ("low", "mid", "high"):
        assert getattr(fuller, end) <= getattr(here, end) + 1e-12
        assert getattr(larger, end) >= getattr(here, end) - 1e-12
    for predict in (_FIT.predict_loss, _FIT.predict_kl):
        at, full, large = (
            predict(parameters, tokens),
            predict(parameters, factor * tokens),
            predict(factor * parameters, tokens),
        )
        assert at.low <= at.mid <= at.high
        for end in ("low", "mid", "high"):
            assert getattr(full, end) >= getattr(at, end) * (1 - 1e-12)
            assert getattr(large, end) <= getattr(at, end) * (1 + 1e-12)
    assert _FIT.predict_duration_s(parameters, factor * tokens).high >= _FIT.predict_duration_s(parameters, tokens).high


_FIT = fit_laws(memft_points(seed=5), bootstrap=60)


def test_predictions_widen_outside_the_range_and_say_so(fit):
    low, high = fit.tokens_range
    assert fit.outside_range(fit.parameters_range[0], high) == ()
    (line,) = fit.outside_range(fit.parameters_range[0], 10 * high)
    assert "target tokens are above the calibrated" in line
    assert "10.0 times" in line

    def log_width(tokens):
        interval = fit.loss.predict(fit.parameters_range[0], tokens, 0.9)
        return np.log(interval.high / interval.low)

    assert log_width(100 * high) > 1.5 * log_width(high)
    assert low < high


def test_held_out_shares_are_mostly_above_the_pessimistic_end():
    above, total = 0, 0
    for seed in range(6):
        fit = fit_laws(memft_points(seed=seed), bootstrap=60)
        for point in memft_points(seed=seed + 1000, sizes=(100, 200, 400)):
            low = fit.predict_proved_share(point.effective_parameters, point.target_tokens).low
            # Two binomial standard deviations: the interval is of the expected share.
            slack = 2 * np.sqrt(low * (1 - low) / point.facts)
            above += point.facts_proved / point.facts >= low - slack
            total += 1
    assert above / total >= 0.9


def test_the_law_is_torch_free_and_leaves_scipy_alone():
    code = (
        "import sys, memupdate.law.fit, memupdate.budget.planner, memupdate.reports.figures.law; "
        "print([m for m in ('torch', 'transformers', 'vllm', 'peft', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
