"""Cells of a benchmark: one method, one rank and one length, trained from an empty memory and measured; kept as they are done.

Invariant: all methods of a cell get the same examples, the same rank, and as near as whole epochs allow the same number of steps; a
cell depends on nothing but itself, its recipe and the model. Exact match is what greedy decoding emits: if every target token is the
argmax given the true prefix, decoding emits the target to its last token, and otherwise it goes wrong at the first that is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from memupdate.budget.placement import resolve_placement
from memupdate.facts.render import Example
from memupdate.law.points import LawPoint
from memupdate.models.base import BaseModel
from memupdate.models.folder import ModelFolder
from memupdate.models.scoring import TargetScore
from memupdate.progress import no_progress
from memupdate.storage import canonical_json, text_sha256, write_text_atomic
from memupdate.training.curriculum import prefix_curriculum
from memupdate.training.loop import TrainingOutcome, TrainingSettings, write_facts
from memupdate.training.memory import empty_memory, grow

CURRICULUM = "memft-sw-curriculum"


@dataclass(frozen=True)
class Recipe:
    """How every method is trained, but for its objective."""

    name: str
    placement: str
    learning_rate: float
    goal: float
    """p*."""
    train_basis: bool
    linear_decay: bool
    scale: float
    """LoRA alpha / rank."""
    clip_norm: float = 1.0
    seed: int = 0


PAPER = Recipe("paper", "mlp-one", 1e-2, 0.5, train_basis=True, linear_decay=True, scale=2.0)
"""The MLP of one layer at 60 % of the depth, A and B trained, a high rate that falls evenly to 0, p* = 0.5. What differs from the
paper's repository: LoRA on gate, up and down projection (there one LoRA beside the whole MLP), no dropout, and clipped gradients."""
OURS = Recipe("ours", "mlp-all", 3e-3, 0.7, train_basis=True, linear_decay=False, scale=2.0)
"""As `policies/atlas.toml` trains, without its guard, and for a fixed number of steps."""
RECIPES = {recipe.name: recipe for recipe in (PAPER, OURS)}


@dataclass(frozen=True)
class Cell:
    """What is trained."""

    method: str
    rank: int
    length: int
    """Target tokens asked for; what is written may end with a whole fact."""
    steps: int
    batch_size: int
    kind: str = ""
    """Of the data, where a benchmark has several."""
    repeat: int = 0


@dataclass(frozen=True)
class Measured:
    """What came of a cell."""

    cell: Cell
    examples: int
    target_tokens: int
    effective_parameters: int
    loss_before_nats: float
    loss_after_nats: float
    """Mean over target tokens."""
    exact: int
    """Examples that greedy decoding emits to the last token."""
    prefix_share: float
    """Share of the target tokens that greedy decoding emits before its first mistake, mean over examples."""
    token_share: float
    """Share of target tokens that are the argmax given the true prefix."""
    over_goal: bool
    """Every token reached the goal: a lower loss was not asked for."""
    steps: int
    epochs: int
    duration_s: float

    @property
    def exact_share(self) -> float:
        return self.exact / self.examples


@dataclass
class Store:
    """Cells that are done, in a JSON file; a cell is found again only under the same recipe, model and data."""

    path: Path
    identity: str
    """Of recipe, model and data."""
    rows: dict[str, Measured] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, *parts: object) -> Store:
        """`parts`: JSON values that cells depend on. Other identities' cells in the file are dropped at the next save."""
        store = cls(path, text_sha256(canonical_json(parts)))
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["identity"] == store.identity:
                found = [Measured(**{**row, "cell": Cell(**row["cell"])}) for row in content["cells"]]
                store.rows = {_key(row.cell): row for row in found}
        return store

    def get(self, cell: Cell) -> Measured | None:
        return self.rows.get(_key(cell))

    def add(self, measured: Measured) -> None:
        self.rows[_key(measured.cell)] = measured
        content = {"identity": self.identity, "cells": [asdict(row) for row in self.rows.values()]}
        write_text_atomic(self.path, json.dumps(content, indent=1) + "\n")


def run_cells(
    base: BaseModel,
    folder: ModelFolder,
    recipe: Recipe,
    cells: Sequence[Cell],
    examples_of: Callable[[Cell], list[Example]],
    store: Store,
) -> list[Measured]:
    """Train what is not in the store, telling each cell on a line; returns all in order."""
    done = []
    for number, cell in enumerate(cells, start=1):
        measured = store.get(cell)
        if measured is None:
            measured = run_cell(base, folder, recipe, cell, examples_of(cell))
            store.add(measured)
        print(f"{number}/{len(cells)} {_line(measured)}", flush=True)
        done.append(measured)
    return done


def run_cell(base: BaseModel, folder: ModelFolder, recipe: Recipe, cell: Cell, examples: Sequence[Example]) -> Measured:
    """Train one cell and measure it."""
    return measure(cell, examples, recipe.goal, train(base, folder, recipe, cell, examples))


def train(
    base: BaseModel, folder: ModelFolder, recipe: Recipe, cell: Cell, examples: Sequence[Example]
) -> TrainingOutcome:
    """Write `examples` into an empty memory, for all of the cell's steps."""
    shape = resolve_placement(recipe.placement, folder.config)
    memory = grow(empty_memory(shape), cell.rank, seed=f"{recipe.seed}:{cell.repeat}", scale=recipe.scale)
    epochs = epochs_for(cell, len(examples))
    settings = TrainingSettings(
        objective=cell.method, goal=recipe.goal, threshold=recipe.goal, learning_rate=recipe.learning_rate,
        batch_size=cell.batch_size, max_epochs=epochs, recheck_every=max(1, epochs // 4), clip_norm=recipe.clip_norm,
        seed=recipe.seed + cell.repeat, train_basis=recipe.train_basis, guard_weight=0.0, anchors_per_step=0, max_kl_nats=math.inf,
        stop_when_stored=False, linear_decay=recipe.linear_decay,
    )  # fmt: skip
    return write_facts(base, memory, examples, settings, None, None, no_progress)


def measure(cell: Cell, examples: Sequence[Example], goal: float, outcome: TrainingOutcome) -> Measured:
    """What a trained memory gives back."""
    right = [
        [found == wanted for found, wanted in zip(score.greedy_ids, example.target_ids, strict=True)]
        for score, example in zip(outcome.scores, examples, strict=True)
    ]
    tokens = sum(len(row) for row in right)
    return Measured(
        cell=cell, examples=len(examples), target_tokens=tokens, effective_parameters=outcome.memory.parameters,
        loss_before_nats=outcome.loss_before_nats, loss_after_nats=outcome.loss_after_nats, exact=sum(map(all, right)),
        prefix_share=sum(_prefix(row) / len(row) for row in right) / len(right), token_share=sum(map(sum, right)) / tokens,
        over_goal=_weakest(outcome.scores) >= goal, steps=outcome.steps, epochs=outcome.epochs, duration_s=round(outcome.duration_s, 2),
    )  # fmt: skip


def epochs_for(cell: Cell, count: int) -> int:
    """Whole epochs that come nearest to the cell's steps; a curriculum, whose first epochs are short, has more of them."""
    per_epoch = math.ceil(count / cell.batch_size)
    epochs = max(1, round(cell.steps / per_epoch))
    if cell.method != CURRICULUM:
        return epochs
    return min(range(epochs, 2 * epochs + 1), key=lambda e: abs(curriculum_steps(cell, count, e) - epochs * per_epoch))


def curriculum_steps(cell: Cell, count: int, epochs: int) -> int:
    """Steps of a curriculum over so many epochs."""
    curriculum = prefix_curriculum(count, epochs=epochs, batch_size=cell.batch_size, seed=0)
    begins = 0
    total = 0
    for stage in curriculum.stages:
        total += (stage.last_epoch - begins) * math.ceil(len(stage.examples) / cell.batch_size)
        begins = stage.last_epoch
    return total


def law_point(measured: Measured, recipe: Recipe) -> LawPoint:
    """A cell as the law sees it. MemFT asks for no loss below its goal, so a cell that reached it says "at least"."""
    cell = measured.cell
    return LawPoint(
        base_fingerprint="", placement=recipe.placement, recipe=f"{recipe.name} {cell.method}", rank=cell.rank,
        effective_parameters=measured.effective_parameters, facts=measured.examples, target_tokens=measured.target_tokens,
        loss_before_nats=measured.loss_before_nats, loss_after_nats=measured.loss_after_nats, facts_proved=measured.exact,
        kl_nats=None, epochs=measured.epochs, stopped_early=measured.over_goal and cell.method != "sft",
        duration_s=measured.duration_s, examples=measured.examples, steps=measured.steps, kind=cell.kind,
    )  # fmt: skip


def _line(measured: Measured) -> str:
    cell = measured.cell
    return (
        f"{cell.kind} {cell.method} rank {cell.rank}, {cell.length} tokens: exact {measured.exact}/{measured.examples}, loss "
        f"{measured.loss_before_nats:.3f} → {measured.loss_after_nats:.4f}, {measured.steps} steps, {measured.duration_s:.0f} s"
    ).strip()


def _prefix(right: Sequence[bool]) -> int:
    return right.index(False) if False in right else len(right)


def _weakest(scores: Sequence[TargetScore]) -> float:
    return min(score.min_probability for score in scores)


def _key(cell: Cell) -> str:
    return canonical_json(asdict(cell))
