"""What the training tests share: a guard, a small batch and the memory it was written into, made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memupdate.budget.placement import resolve_placement
from memupdate.budget.plan import PlacementShape
from memupdate.facts.model import Fact
from memupdate.facts.render import Example, Renderer
from memupdate.models.base import BaseModel
from memupdate.models.folder import resolve_model
from memupdate.progress import no_progress
from memupdate.training.anchors import Anchors, sample_anchors
from memupdate.training.loop import TrainingOutcome, TrainingSettings, write_facts
from memupdate.training.memory import Memory, empty_memory, grow

SETTINGS = TrainingSettings(
    objective="memft-ot",
    goal=0.7,
    threshold=0.5,
    learning_rate=5e-3,
    batch_size=8,
    max_epochs=60,
    recheck_every=4,
    clip_norm=1.0,
    seed=0,
    train_basis=False,
    guard_weight=20.0,
    anchors_per_step=8,
    max_kl_nats=0.03,
)


@pytest.fixture(scope="session")
def settings() -> TrainingSettings:
    return SETTINGS


@pytest.fixture(scope="session")
def shape() -> PlacementShape:
    return resolve_placement("mlp-all", resolve_model("atlas").config)


@pytest.fixture(scope="session")
def room(shape: PlacementShape) -> Memory:
    """An empty memory of rank 4."""
    return grow(empty_memory(shape), 4, seed="0:test", scale=2.0)


@pytest.fixture(scope="session")
def filled(room: Memory) -> Memory:
    """A memory of rank 4 with random numbers in `B`, large enough to change the logits a good deal."""
    generator = torch.Generator().manual_seed(3)
    return replace(room, b={n: 0.05 * torch.randn(b.shape, generator=generator) for n, b in room.b.items()})


@pytest.fixture(scope="session")
def anchors(atlas_base: BaseModel, atlas_renderer: Renderer) -> Anchors:
    """96 sequences of 32 tokens: 64 to train against, 32 to measure on."""
    prefixes = [[0], list(atlas_renderer.user_prefix_ids() or ())]
    return sample_anchors(atlas_base, prefixes, count=96, tokens=32, seed=1, progress=no_progress)


@pytest.fixture(scope="session")
def batches(atlas_renderer: Renderer, news: list[Fact]) -> tuple[list[Example], list[Example]]:
    """Two batches of six and four facts that the base model does not know."""
    return atlas_renderer.render_all(news[:6]), atlas_renderer.render_all(news[6:10])


Write = Callable[..., TrainingOutcome]


@pytest.fixture(scope="session")
def write(atlas_base: BaseModel, anchors: Anchors) -> Write:
    """`write(memory, examples, **changed settings)`: the loop under the guard; harm is measured without a guard too."""

    def run(memory: Memory, examples: list[Example], **changed: Any) -> TrainingOutcome:
        train, holdout = anchors.select(slice(0, 64)), anchors.select(slice(64, 96))
        return write_facts(atlas_base, memory, examples, replace(SETTINGS, **changed), train, holdout, no_progress)

    return run


@pytest.fixture(scope="session")
def trained(write: Write, room: Memory, batches: tuple[list[Example], list[Example]]) -> TrainingOutcome:
    """The first batch, written into the empty memory."""
    return write(room, batches[0])


@pytest.fixture(scope="session")
def atlas_dir(repo_root: Path) -> Path:
    return repo_root / "examples" / "atlas"
