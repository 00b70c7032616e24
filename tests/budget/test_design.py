"""The adaptive design, played against a simulated trainer: it stays within its time, narrows the plan, and beats a fixed sweep."""

import math

import numpy as np
import pytest

from memupdate.budget.design import ENOUGH_SD, Cell, Kind, Setting, next_cell
from memupdate.law.needed_rank import Size, fit_needed_rank
from memupdate.law.points import LawPoint

PER_RANK = 11_520
KINDS = {"facts": Kind(4.5, 2.8, 3.0), "numbers": Kind(8.0, 8.2, 1.0)}
SETTING = Setting(KINDS, (8, 400), PER_RANK, 1, 64, 0.03, 8, 60, 480)
PACE_S = 0.02
"""Seconds a step."""


def needed_rank(cell):
    kind = KINDS[cell.kind]
    return 2.0 * (cell.facts * kind.tokens / 500) ** 0.85 * (kind.base_loss_nats / 3) ** 0.2


def write(cell, rng):
    """What the trainer of the simulated model would measure."""
    kind, held = KINDS[cell.kind], cell.rank >= needed_rank(cell) * math.exp(rng.logistic(0, 0.1))
    steps = round(SETTING.full_steps(cell) * (0.5 if held else 1.2))
    return LawPoint(
        "sha256:a", "mlp-all", "sha256:r", cell.rank, cell.rank * PER_RANK, cell.facts, round(cell.facts * kind.tokens),
        kind.base_loss_nats, 0.1 if held else 0.4, cell.facts if held else cell.facts // 2, 0.01, 30, held, steps * PACE_S,
        examples=cell.facts, steps=steps, kind=cell.kind,
    )  # fmt: skip


def play(seconds, seed=0, setting=SETTING):
    rng, points, taken, left = np.random.default_rng(seed), [], [], seconds
    choices = []
    while (choice := next_cell(setting, points, taken, time_left_s=left, crowded_left_s=seconds / 4)).cell is not None:
        choices.append(choice)
        taken.append(choice.cell)
        points.append(write(choice.cell, rng))
        left -= points[-1].duration_s
    return points, choices, left


def law_of(points):
    return fit_needed_rank(
        [p.effective_parameters for p in points], [p.target_tokens for p in points], [p.loss_before_nats for p in points],
        [p.all_proved for p in points], confidence=0.9,
    )  # fmt: skip


def test_cells_are_chosen_once_within_the_time_and_span_ranks_and_sizes():
    points, choices, left = play(1200)
    cells = [choice.cell for choice in choices]
    assert len(set(cells)) == len(cells)
    assert left > -60
    assert len({cell.rank for cell in cells}) >= 3
    assert len({cell.facts for cell in cells}) >= 3
    assert {cell.kind for cell in cells} == set(KINDS)
    assert {point.all_proved for point in points} == {True, False}
    assert (choices[0].expected_s, math.isnan(choices[0].sd_log)) == (0, True)


def test_memories_too_small_for_hundreds_of_facts_are_written_for_the_papers_law():
    points, _, _ = play(1200)
    assert any(point.facts >= 200 and point.rank <= 4 and not point.all_proved for point in points)


def test_the_plan_gets_more_certain_and_the_needed_rank_is_found():
    points, choices, _ = play(1200)
    known = [choice.sd_log for choice in choices if not math.isnan(choice.sd_log)]
    assert known[-1] < 0.5 * known[0]
    law = law_of(points)
    for facts in (30, 100, 380):
        for kind, about in KINDS.items():
            needed = law.needed(Size(facts * about.tokens, about.base_loss_nats), 0.9)
            assert needed.low < needed_rank(Cell(kind, facts, 1)) * PER_RANK < needed.high


def test_the_same_time_spent_on_a_fixed_sweep_leaves_the_plan_less_certain():
    spent = np.random.default_rng(0)
    sweep, left = [], 1200.0
    for facts in (16, 32, 64, 128, 256, 400):
        for rank in (1, 2, 4, 8, 16):
            point = write(Cell("facts", facts, rank), spent)
            if point.duration_s <= left:
                sweep.append(point)
                left -= point.duration_s
    chosen, _, _ = play(1200)

    def spread(points):
        law = law_of(points)
        sizes = [Size(n * k.tokens, k.base_loss_nats) for n in (30, 100, 380) for k in KINDS.values()]
        return float(np.mean([law.log_needed(size).std() for size in sizes]))

    assert spread(chosen) < spread(sweep)


def test_what_was_taken_is_not_proposed_again_and_no_time_means_no_cell():
    first = next_cell(SETTING, [], [], time_left_s=100, crowded_left_s=0).cell
    second = next_cell(SETTING, [], [first], time_left_s=100, crowded_left_s=0).cell
    assert first in SETTING.seeds()
    assert second in SETTING.seeds()
    assert first != second
    points = [write(cell, np.random.default_rng(0)) for cell in (first, second)]
    assert next_cell(SETTING, points, [first, second], time_left_s=0.5, crowded_left_s=0).cell is None


def test_a_certain_plan_ends_the_calibration():
    rng = np.random.default_rng(2)
    cells = [
        Cell(kind, facts, rank)
        for kind in KINDS
        for facts in (10, 14, 20, 28, 40, 56, 80, 113, 160, 226, 320, 400)
        for rank in (1, 2, 3, 4, 5, 6, 8, 12)
    ]
    points = [write(cell, rng) for cell in cells * 3]
    choice = next_cell(SETTING, points, [*cells, *SETTING.seeds()], time_left_s=1e6, crowded_left_s=0)
    assert choice.sd_log < ENOUGH_SD
    assert choice.cell is None


@pytest.mark.parametrize("kinds", [{"facts": KINDS["facts"]}, KINDS])
def test_ranks_stay_within_the_policys_and_sizes_within_what_is_expected(kinds):
    setting = Setting(kinds, (20, 90), PER_RANK, 1, 4, None, 8, 60, 480)
    assert {cell.rank for cell in setting.candidates()} == {1, 2, 4}
    assert (min(setting.sizes()), max(setting.sizes())) == (20, 90)
    assert {cell.kind for cell in setting.candidates()} == set(kinds)
