"""Cells of the paper's benchmarks: real ones on the embedded model, their steps, and how they are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.paper import cells
from benchmarks.paper.cells import CURRICULUM, OURS, PAPER, Cell, Measured, Store, curriculum_steps, epochs_for
from benchmarks.paper.data import phonebook
from hypothesis import given
from hypothesis import strategies as st

from memupdate.facts.render import Renderer
from memupdate.models.base import BaseModel
from memupdate.models.folder import resolve_model
from memupdate.training import loop
from memupdate.training.memory import attach, detach

CELL = Cell("sft", 2, 40, steps=40, batch_size=2)
MEASURED = Measured(CELL, 4, 44, 1000, 3.0, 0.5, 3, 0.8, 0.9, False, 40, 20, 1.0)


@given(st.integers(1, 500), st.integers(1, 32), st.integers(100, 900))
def test_every_method_gets_the_same_steps(count: int, batch: int, steps: int) -> None:
    plain = Cell("sft", 1, 100, steps, batch)
    per_epoch = -(-count // batch)
    expected = epochs_for(plain, count) * per_epoch
    assert abs(expected - steps) <= per_epoch
    curriculum = replace(plain, method=CURRICULUM)
    found = curriculum_steps(curriculum, count, epochs_for(curriculum, count))
    assert abs(found - expected) <= 2 * per_epoch


@pytest.mark.parametrize("method", ["memft-ot", CURRICULUM])
def test_exact_match_is_what_greedy_decoding_emits(
    atlas_base: BaseModel, atlas_renderer: Renderer, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Free generation with transformers, entry by entry, in a cell that holds some of its entries and not others."""
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    examples, cell = atlas_renderer.render_all(phonebook(8, seed=0)), replace(CELL, method=method, steps=100)
    outcome = cells.train(atlas_base, resolve_model("atlas"), PAPER, cell, examples)
    measured = cells.measure(cell, examples, PAPER.goal, outcome)
    assert abs(measured.steps - 100) <= 4
    exact, prefixes = 0, []
    model = attach(atlas_base.model, outcome.memory)
    try:
        for example in examples:
            ids = torch.tensor([example.prompt_ids])
            said = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(example.target_ids),
                pad_token_id=5,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
            right = [a == b for a, b in zip(said, example.target_ids, strict=False)]
            length = right.index(False) if False in right else len(right)
            prefixes.append(length / len(example.target_ids))
            exact += length == len(example.target_ids)
    finally:
        atlas_base.model = detach(model)
    assert measured.exact == exact
    assert measured.prefix_share == pytest.approx(sum(prefixes) / len(prefixes))
    assert 0 < measured.prefix_share < 1, "a cell in which nothing or all is held would show nothing"


def test_a_memft_cell_at_its_goal_says_at_least_only() -> None:
    done = replace(MEASURED, over_goal=True)
    assert not cells.law_point(done, PAPER).stopped_early
    assert cells.law_point(replace(done, cell=replace(CELL, method="memft-ot")), PAPER).stopped_early
    assert cells.law_point(MEASURED, PAPER).loss_drop_nats == pytest.approx(2.5)


def test_cells_are_found_again_only_under_what_made_them(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    Store.open(path, "paper", "model").add(MEASURED)
    again = Store.open(path, "paper", "model")
    assert again.get(CELL) == MEASURED
    assert again.get(replace(CELL, rank=3)) is None
    assert Store.open(path, "ours", "model").get(CELL) is None


def test_recipes_are_told_apart_by_name() -> None:
    assert {name: recipe.placement for name, recipe in cells.RECIPES.items()} == {
        PAPER.name: "mlp-one",
        OURS.name: "mlp-all",
    }
