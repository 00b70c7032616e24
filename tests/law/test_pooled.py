"""One law for several placements: what others' runs say, and that the better way is called the better one."""

import numpy as np
import pytest

from memupdate.law.fit import fit_laws
from memupdate.law.needed_rank import Size
from memupdate.law.points import LawPoint
from memupdate.law.pooled import COMMON, OFFSET, SEPARATE, compare_pooling, pooled_law, runs_of

PER_RANK = {"mlp-all": 9000, "mlp-one": 2000, "all-linear": 15000}


def sweep(name: str, level: float, *, count: int = 40, eta: float = 0.9, seed: int = 0) -> list[LawPoint]:
    """Runs near the border: `level · ℓ^η` parameters hold ℓ tokens."""
    rng, found = np.random.default_rng(seed + len(name)), []
    for number in range(count):
        tokens = int(np.exp(rng.uniform(np.log(40), np.log(1500))))
        parameters = level * tokens**eta * np.exp(rng.uniform(-1.2, 1.2))
        held = np.log(parameters / (level * tokens**eta)) + rng.logistic(0, 0.15) > 0
        rank, facts = max(1, round(parameters / PER_RANK[name])), max(1, tokens // 5)
        found.append(
            LawPoint(
                "sha256:a", name, "sha256:r", rank, round(parameters), facts, tokens + number % 3, 3.0, 0.1,
                facts if held else facts - 1, 0.01, 20, bool(held), 10.0,
            )
        )  # fmt: skip
    return found


def width(law) -> float:
    needed = law.needed(Size(400), 0.9)
    return float(np.log(needed.high / needed.low))


def test_others_runs_narrow_a_law_of_few_points_an_offset_less_than_a_common_level():
    points = {"mlp-all": sweep("mlp-all", 60), "mlp-one": sweep("mlp-one", 60, count=5)}
    runs = {name: runs_of(rows, None) for name, rows in points.items()}
    laws = {way: pooled_law(runs, "mlp-one", way, confidence=0.9, scored=False) for way in (SEPARATE, OFFSET, COMMON)}
    assert width(laws[COMMON]) < width(laws[OFFSET]) < width(laws[SEPARATE])
    true = 60 * 400**0.9
    for law in laws.values():
        needed = law.needed(Size(400), 0.9)
        assert needed.low < true < needed.high


def test_an_offset_lets_a_placement_need_more_than_the_others():
    runs = {
        name: runs_of(rows, None)
        for name, rows in {"mlp-all": sweep("mlp-all", 60), "mlp-one": sweep("mlp-one", 180)}.items()
    }
    offset, common = (pooled_law(runs, "mlp-one", way, confidence=0.9, scored=False) for way in (OFFSET, COMMON))
    true = 180 * 400**0.9
    assert abs(np.log(offset.needed(Size(400), 0.9).mid / true)) < 0.3
    assert common.needed(Size(400), 0.9).mid < offset.needed(Size(400), 0.9).mid


@pytest.mark.parametrize(("level", "low", "high"), [(60, -0.03, 0.03), (200, 0.05, 1.0)])
def test_one_level_costs_nothing_where_placements_are_alike_and_much_where_they_are_not(level, low, high):
    points = {name: sweep(name, level if name == "mlp-one" else 60, count=15) for name in PER_RANK}
    scores = compare_pooling(points, max_kl_nats=0.03, confidence=0.9)
    assert [score.log_score for score in scores] == sorted((score.log_score for score in scores), reverse=True)
    assert all(dict(score.by_placement).keys() == PER_RANK.keys() for score in scores)
    by_name = {score.name: score.log_score for score in scores}
    assert low < by_name[SEPARATE] - by_name[COMMON] < high
    assert abs(by_name[SEPARATE] - by_name[OFFSET]) < 0.03, "an offset is right in both cases"
    assert compare_pooling(points, max_kl_nats=0.03, confidence=0.9) == scores


def test_the_separate_score_is_the_fits_own():
    points = {name: sweep(name, 60, count=20) for name in ("mlp-all", "mlp-one")}
    (separate,) = (s for s in compare_pooling(points, max_kl_nats=0.03, confidence=0.9) if s.name == SEPARATE)
    for name, score in separate.by_placement:
        assert score == pytest.approx(fit_laws(points[name], bootstrap=20, max_kl_nats=0.03).needed.log_score, rel=1e-5)


def test_nothing_is_compared_where_one_placement_was_hardly_measured():
    points = {"mlp-all": sweep("mlp-all", 60), "mlp-one": sweep("mlp-one", 60, count=2)}
    assert compare_pooling(points, max_kl_nats=None, confidence=0.9) == ()
    assert compare_pooling({"mlp-all": points["mlp-all"]}, max_kl_nats=None, confidence=0.9) == ()
