"""The curriculum: nested stages at the paper's ratios and boundaries, and none for the other objectives."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memupdate.training.curriculum import make_curriculum, prefix_curriculum

COUNTS = st.integers(1, 400)


@given(COUNTS, st.integers(1, 500), st.integers(1, 64), st.integers(0, 9))
def test_stages_hold_one_another_and_end_with_all(count: int, epochs: int, batch: int, seed: int) -> None:
    curriculum = prefix_curriculum(count, epochs=epochs, batch_size=batch, seed=seed)
    sizes = [set(stage.examples) for stage in curriculum.stages]
    assert all(smaller <= larger for smaller, larger in pairwise(sizes))
    assert sizes[-1] == set(range(count))
    everything = range(count)
    admitted = [set(curriculum.admitted(epoch, everything)) for epoch in range(1, epochs + 1)]
    assert all(before <= after for before, after in pairwise(admitted))
    assert admitted[-1] == set(everything) or epochs < 3
    for size in sizes[:-1]:
        assert len(size) % batch == 0 or len(size) == count


def test_the_papers_schedule() -> None:
    """100 examples in batches of 4 over 200 epochs: a fifth until epoch 20, all from epoch 81."""
    curriculum = prefix_curriculum(100, epochs=200, batch_size=4, seed=42)
    sizes = [len(curriculum.admitted(epoch, range(100))) for epoch in range(1, 201)]
    assert sizes == [20] * 20 + [40] * 20 + [60] * 20 + [80] * 20 + [100] * 120


def test_other_schedules_are_taken() -> None:
    curriculum = prefix_curriculum(8, epochs=10, batch_size=2, seed=0, ratios=(0.5, 1.0), boundaries=(0.3, 1.0))
    assert [len(curriculum.admitted(epoch, range(8))) for epoch in range(1, 11)] == [4] * 3 + [8] * 7


@given(COUNTS, st.integers(1, 64), st.data())
def test_a_stage_that_is_stored_is_over(count: int, batch: int, data: st.DataObject) -> None:
    curriculum = prefix_curriculum(count, epochs=100, batch_size=batch, seed=1)
    active = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    assert set(curriculum.admitted(1, active)) & active


@pytest.mark.parametrize("objective", ["sft", "memft-ot", "memft-ot-full", "memft-sw-window"])
def test_other_objectives_have_no_curriculum(objective: str) -> None:
    curriculum = make_curriculum(objective, 30, epochs=100, batch_size=4, seed=0)
    assert curriculum.admitted(1, [3]) == tuple(range(30))


def test_the_curriculums_order_is_drawn_from_the_seed() -> None:
    first = [make_curriculum("memft-sw-curriculum", 100, epochs=100, batch_size=4, seed=s).stages[0] for s in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
