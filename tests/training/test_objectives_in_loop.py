"""Every objective through the whole loop on the embedded model; and that the default one is what it says, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from memupdate.facts.render import Example
from memupdate.models.base import BaseModel
from memupdate.models.scoring import pad_batch
from memupdate.training import loop, passes
from memupdate.training.loop import TrainingOutcome, TrainingSettings
from memupdate.training.memory import Memory, attach, detach, read_memory

Batches = tuple[list[Example], list[Example]]
Write = Callable[..., TrainingOutcome]
OBJECTIVES = ["sft", "memft-ot", "memft-ot-full", "memft-sw-curriculum", "memft-sw-window"]


def plainly_written(
    base: BaseModel, memory: Memory, examples: list[Example], settings: TrainingSettings, epochs: int
) -> Memory:
    """MemFT-OT as its equation says, with nothing of the loop: AdamW on the mean loss of the tokens under the goal, all examples a step."""
    model = attach(base.model, memory)
    try:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
        generator = torch.Generator().manual_seed(settings.seed)
        for _ in range(epochs):
            order = torch.randperm(len(examples), generator=generator).tolist()
            torch.randperm(0, generator=generator)  # the examples at rest, of which there are none
            batch = pad_batch([examples[i] for i in order], base.device)
            hidden = model.get_base_model().model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
            logits = model.get_base_model().lm_head(hidden.last_hidden_state[batch.rows, batch.positions])
            nll = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
            under = (nll.detach() > -math.log(settings.goal)).float()
            ((under * nll).sum() / under.sum().clamp(min=1)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        return read_memory(model)
    finally:
        base.model = detach(model)


def test_the_default_objective_is_its_equation_bit_for_bit(
    atlas_base: BaseModel, write: Write, room: Memory, batches: Batches, settings: TrainingSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What surrounds objectives (tokens, curricula, schedules) adds nothing to a number of `memft-ot`."""
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    monkeypatch.setattr(
        passes, "take_apart", lambda _: None
    )  # the whole model each time, as below: its last bits count here
    expected = plainly_written(atlas_base, room, batches[0], settings, epochs=12)
    found = write(room, batches[0], max_epochs=12, guard_weight=0.0, stop_when_stored=False, batch_size=6).memory
    assert all(torch.equal(found.b[name], expected.b[name]) for name in expected.b)
    assert all(b.any() for b in found.b.values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_stores_facts(write: Write, room: Memory, batches: Batches, objective: str) -> None:
    outcome = write(room, batches[0], objective=objective, guard_weight=0.0, batch_size=2)
    assert outcome.stopped_early
    assert [s.greedy_ids for s in outcome.scores] == [e.target_ids for e in batches[0]]


def test_a_curriculum_trains_a_part_first(
    write: Write, room: Memory, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six examples by two over ten epochs: one step an epoch at first, three from the fifth on."""
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    changed = {"max_epochs": 10, "guard_weight": 0.0, "stop_when_stored": False, "batch_size": 2}
    outcome = write(room, batches[0], objective="memft-sw-curriculum", **changed)
    assert (outcome.epochs, outcome.steps) == (10, 1 + 1 + 1 + 2 + 6 * 3)


def test_the_rate_falls_evenly_where_asked(
    write: Write, room: Memory, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    rates: list[float] = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    write(room, batches[0], max_epochs=4, guard_weight=0.0, linear_decay=True, learning_rate=4e-3)
    assert rates == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
