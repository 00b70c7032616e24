"""Points survive JSON unchanged, and nothing implausible is read."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memupdate.errors import MemupdateError
from memupdate.law.errors import LawError
from memupdate.law.points import LawPoint, points_from_json, points_to_json

finite = st.floats(min_value=0, max_value=50, allow_nan=False)
points = st.builds(
    LawPoint,
    base_fingerprint=st.text(max_size=8),
    placement=st.sampled_from(["mlp-all", "mlp-one"]),
    recipe=st.text(max_size=8),
    rank=st.integers(1, 512),
    effective_parameters=st.integers(1, 10**9),
    facts=st.integers(50, 10**6),
    target_tokens=st.integers(1, 10**7),
    loss_before_nats=finite,
    loss_after_nats=finite,
    facts_proved=st.integers(0, 50),
    kl_nats=st.none() | finite,
    epochs=st.integers(0, 500),
    stopped_early=st.booleans(),
    duration_s=finite,
    origin=st.sampled_from(["calibration", "shipped", "batch"]),
)
SOUND = LawPoint("sha256:a", "mlp-all", "sha256:r", 8, 92160, 64, 315, 5.9, 0.1, 64, 0.01, 30, True, 12.5)


@given(st.lists(points, max_size=4))
def test_json_round_trip_is_exact(some):
    assert points_from_json(points_to_json(some, machine={"cores": 2})) == tuple(some)


def test_drop_is_the_difference_of_losses():
    assert SOUND.loss_drop_nats == pytest.approx(5.8)


def test_every_problem_is_reported_at_once():
    row = dataclasses.asdict(SOUND)
    broken = [
        {**row, "rank": 0, "facts_proved": 65},
        {**row, "loss_after_nats": "low"},
        {key: value for key, value in row.items() if key != "recipe"},
        {**row, "surprise": 1},
        {**row, "stopped_early": 1},
        7,
        row,
    ]
    with pytest.raises(LawError) as caught:
        points_from_json(json.dumps({"points": broken}))
    assert list(caught.value.details) == [
        "points[0]: rank is 0, not positive",
        "points[0]: facts_proved is 65 of 64",
        "points[1]: loss_after_nats has the wrong type: 'low'",
        "points[2]: recipe is missing",
        "points[3]: surprise is unknown",
        "points[4]: stopped_early has the wrong type: 1",
        "points[5]: not an object",
    ]


def test_whole_numbers_stand_for_floats_but_nan_for_nothing():
    row = dataclasses.asdict(SOUND)
    assert points_from_json(json.dumps({"points": [{**row, "duration_s": 12}]}))[0].duration_s == 12
    with pytest.raises(LawError, match="some cannot be read"):
        points_from_json(json.dumps({"points": [{**row, "duration_s": float("nan")}]}))


@pytest.mark.parametrize("text", ["{", "[]", '{"points": 3}', '{"schema_version": 9, "points": []}'])
def test_other_documents_are_refused_in_one_line(text):
    with pytest.raises(MemupdateError) as caught:
        points_from_json(text)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
