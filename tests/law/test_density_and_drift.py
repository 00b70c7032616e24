"""Base loss from token texts, and what batches say about the law that planned them."""

import math

import pytest

from memupdate.law.density import DIGIT, END, MARK, NAME, NUMBER, PIECE, SET_SCATTER, WORD, fit_density, token_classes
from memupdate.law.drift import ENOUGH, MOST, PlannedPoint, drift_of
from memupdate.law.points import Interval


def test_tokens_are_told_apart_by_their_text():
    assert token_classes(["Wan", "da", " Kett", "le", ",", " born", " 19", "54", ""]) == [
        NAME, PIECE, NAME, PIECE, MARK, WORD, DIGIT, DIGIT, END,
    ]  # fmt: skip
    assert token_classes(["04", "71", "8", "82", ""]) == [NUMBER] * 4 + [END]


def test_the_table_holds_the_mean_of_each_class_and_estimates_mixtures():
    table = fit_density([(["12", "34", ""], [8.0, 6.0, 0.1]), (["red", ""], [4.0, 0.3])])
    rows = {row.name: (row.mean_nats, row.tokens) for row in table.classes}
    assert rows == {DIGIT: (7.0, 2), WORD: (4.0, 1), END: (pytest.approx(0.2), 2)}
    assert table.estimate({DIGIT: 2, END: 1}).nats == pytest.approx((14 + 0.2) / 3)
    assert table.estimate({NAME: 5}).nats == pytest.approx((8 + 6 + 0.1 + 4 + 0.3) / 5)  # never seen: the mean of all
    assert table.estimate({DIGIT: 2}).sd_log == table.estimate({DIGIT: 20_000}).sd_log == SET_SCATTER
    assert table.estimate({}).nats > 0


def planned(measured, batch=1):
    return PlannedPoint(batch, Interval(0.08, 0.10, 0.125), measured, 0.9)


def test_z_is_in_the_plans_own_deviations_on_the_side_that_was_missed():
    assert planned(0.125).z == pytest.approx(1.645, rel=1e-3)
    assert planned(0.08).z == pytest.approx(-1.645, rel=1e-3)
    assert planned(0.10).z == 0


def test_drift_widens_by_the_root_mean_square_and_never_narrows():
    assert drift_of([]).widening == 1
    assert drift_of([planned(0.4)] * (ENOUGH - 1)).widening == 1  # two batches may be unlucky
    inside = drift_of([planned(0.10), planned(0.101), planned(0.099)])
    assert (inside.widening, inside.batches) == (1, 3)
    beyond = drift_of([planned(0.156)] * 5)
    assert (
        beyond.widening
        == pytest.approx(beyond.rms_z)
        == pytest.approx(math.log(1.56) / math.log(1.25) * 1.645, rel=1e-3)
    )
    assert beyond.mean_z > 0
    assert drift_of([planned(5.0)] * 5).widening == MOST
    assert drift_of([planned(5.0)] * 5 + [planned(0.1)] * 20).widening == 1  # only the last ones count
