"""The loop on the embedded model: facts are stored under the guard, older ones stay, the same seed gives the same memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from memupdate.errors import ExitCode, TrainingError
from memupdate.facts.render import Example, Renderer
from memupdate.models.base import BaseModel, load_base
from memupdate.models.folder import resolve_model
from memupdate.models.scoring import score_examples
from memupdate.progress import ProgressEvent, no_progress
from memupdate.training import loop
from memupdate.training.anchors import Anchors, sample_anchors
from memupdate.training.loop import TrainingOutcome, TrainingSettings, write_facts
from memupdate.training.memory import Memory, attach, detach, grow
from memupdate.training.safety import SafetyNet

Batches = tuple[list[Example], list[Example]]
Write = Callable[..., TrainingOutcome]


def bits(memory: Memory) -> list[torch.Tensor]:
    return [memory.a[n] for n in sorted(memory.a)] + [memory.b[n] for n in sorted(memory.b)]


def test_a_small_batch_is_stored_within_the_harm_budget(
    trained: TrainingOutcome, settings: TrainingSettings, batches: Batches, room: Memory
) -> None:
    assert trained.stopped_early
    assert len(trained.scores) == len(batches[0]) == 6
    for example, score in zip(batches[0], trained.scores, strict=True):
        assert score.greedy_ids == example.target_ids
        assert score.min_probability >= settings.goal
    assert trained.kl_nats is not None
    assert 0 < trained.kl_nats <= settings.max_kl_nats
    assert trained.loss_before_nats > 1 > trained.loss_after_nats
    tokens = sum(len(s.logprobs) for s in trained.scores)
    assert trained.loss_after_nats == pytest.approx(sum(s.loss_nats for s in trained.scores) / tokens)
    assert trained.memory.rank == room.rank
    assert all(torch.equal(trained.memory.a[n], room.a[n]) for n in room.a)  # frozen
    assert all(b.any() for b in trained.memory.b.values())


def test_what_the_loop_says_is_what_the_memory_does(
    atlas_base: BaseModel, trained: TrainingOutcome, batches: Batches
) -> None:
    plain = score_examples(atlas_base.model, batches[0], atlas_base.device)
    model = attach(atlas_base.model, trained.memory)
    try:
        scores = score_examples(model, batches[0], atlas_base.device)
    finally:
        atlas_base.model = detach(model)
    assert [s.greedy_ids for s in scores] == [s.greedy_ids for s in trained.scores]
    for one, other in zip(scores, trained.scores, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert any(s.greedy_ids != e.target_ids for s, e in zip(plain, batches[0], strict=True))


def test_the_same_seed_gives_the_same_memory(
    write: Write, room: Memory, batches: Batches, trained: TrainingOutcome
) -> None:
    again = write(room, batches[0])
    assert (again.epochs, again.steps, again.kl_nats) == (trained.epochs, trained.steps, trained.kl_nats)
    assert all(torch.equal(a, b) for a, b in zip(bits(again.memory), bits(trained.memory), strict=True))


def test_another_seed_gives_another_memory(
    write: Write, room: Memory, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    short = {"batch_size": 2, "max_epochs": 1, "guard_weight": 0.0}
    one, other = (write(room, batches[0], seed=seed, **short).memory for seed in (0, 1))
    assert not all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


def test_the_guard_lowers_harm(write: Write, room: Memory, batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number of steps with and without: what differs is the guard."""
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    same = {"max_epochs": 20, "stop_when_stored": False, "learning_rate": 1e-2}
    guarded, bare = (write(room, batches[0], guard_weight=w, **same) for w in (20.0, 0.0))
    assert guarded.steps == bare.steps == 20
    assert guarded.kl_nats is not None
    assert bare.kl_nats is not None
    assert guarded.kl_nats < 0.7 * bare.kl_nats


def test_a_second_batch_leaves_the_first_stored(
    write: Write, trained: TrainingOutcome, settings: TrainingSettings, batches: Batches
) -> None:
    """Written on a grown memory, with the first batch as replay, which comes in only where it fell under the goal."""
    grown = grow(trained.memory, 6, seed="0:test", scale=2.0)
    examples = batches[1] + batches[0]
    both = write(grown, examples)
    assert both.stopped_early
    assert all(s.min_probability >= settings.goal for s in both.scores)
    assert [s.greedy_ids for s in both.scores] == [e.target_ids for e in examples]
    assert both.backward_examples < both.epochs * len(examples)
    assert both.kl_nats is not None
    assert both.kl_nats <= settings.max_kl_nats


def test_stored_facts_cost_no_step(write: Write, trained: TrainingOutcome, batches: Batches) -> None:
    again = write(trained.memory, batches[0])
    assert (again.epochs, again.steps, again.backward_examples) == (0, 0, 0)
    assert again.stopped_early
    assert all(torch.equal(a, b) for a, b in zip(bits(again.memory), bits(trained.memory), strict=True))


def test_harm_over_budget_is_pulled_back(
    write: Write, trained: TrainingOutcome, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All facts are stored but harm is over budget: the guard is weighed more until both hold or the epochs are over."""
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    assert trained.kl_nats is not None
    budget = 0.8 * trained.kl_nats
    repaired = write(trained.memory, batches[0], max_kl_nats=budget, learning_rate=1e-3, max_epochs=30)
    assert repaired.steps > 0
    assert repaired.kl_nats is not None
    assert repaired.kl_nats < trained.kl_nats
    assert repaired.stopped_early == (
        repaired.kl_nats <= budget and all(s.min_probability >= 0.7 for s in repaired.scores)
    )


@pytest.mark.parametrize(
    ("rank", "layers", "share"), [(4, 4, 1.0), (16, 4, 1.0), (64, 4, 0.25), (64, 1, 1.0), (128, 1, 0.5), (32, 36, 0.5)]
)
def test_the_rate_falls_with_rank_and_layers(rank: int, layers: int, share: float) -> None:
    assert loop.rank_factor(rank, layers) == share


@pytest.mark.parametrize(("rank", "share"), [(4, 1.0), (16, 1.0), (64, 0.25)])
def test_above_rank_16_of_four_layers_the_rate_falls_with_the_rank(
    write: Write, room: Memory, batches: Batches, monkeypatch: pytest.MonkeyPatch, rank: int, share: float
) -> None:
    """AdamW's first step moves each number by the rate itself."""
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    grown = grow(room, rank, seed="0:test", scale=2.0) if rank > room.rank else room
    once = write(grown, batches[0], max_epochs=1, learning_rate=2e-3, guard_weight=0.0, batch_size=len(batches[0]))
    assert once.steps == 1
    assert max(float(b.abs().max()) for b in once.memory.b.values()) == pytest.approx(share * 2e-3, rel=1e-2)


@pytest.mark.parametrize("stop", [False, True])
def test_all_epochs_are_trained_only_where_asked(
    write: Write, trained: TrainingOutcome, batches: Batches, monkeypatch: pytest.MonkeyPatch, stop: bool
) -> None:
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    changed = {"objective": "sft", "max_epochs": 3, "batch_size": 4, "guard_weight": 0.0, "stop_when_stored": stop}
    outcome = write(trained.memory, batches[0], **changed)
    assert (outcome.epochs, outcome.steps) == ((0, 0) if stop else (3, 6))


def test_small_sets_have_enough_steps(write: Write, room: Memory, batches: Batches) -> None:
    """`max_epochs` counts for sets of many steps an epoch; six facts in one step may take more."""
    outcome = write(room, batches[0], max_epochs=1, guard_weight=0.0)
    assert outcome.epochs > 1
    assert outcome.stopped_early


def test_out_of_epochs_says_so(write: Write, room: Memory, batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    outcome = write(room, batches[0], max_epochs=1, guard_weight=0.0)
    assert outcome.epochs == 1
    assert not outcome.stopped_early
    assert any(s.min_probability < 0.7 for s in outcome.scores)


def test_the_basis_is_trained_where_asked(
    write: Write, room: Memory, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    outcome = write(room, batches[0], max_epochs=3, guard_weight=0.0, train_basis=True)
    assert all(not torch.equal(outcome.memory.a[n], room.a[n]) for n in room.a)


@pytest.mark.parametrize("guard", [0.0, 20.0])
def test_divergence_is_an_error(write: Write, room: Memory, batches: Batches, guard: float) -> None:
    with pytest.raises(TrainingError, match="not finite") as caught:
        write(room, batches[0], learning_rate=1e30, guard_weight=guard)
    assert caught.value.exit_code == ExitCode.INTERNAL
    assert "learning_rate" in caught.value.hint
    assert "lower rate" in caught.value.message
    assert 1 <= len(caught.value.details) <= 6


def test_a_run_that_diverges_once_steps_back_and_ends_well(
    write: Write, room: Memory, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One real NaN, in the seventh step's gradient; what follows is trained from the last good check."""
    clip, calls, rates = torch.nn.utils.clip_grad_norm_, [0], []

    def poisoned(parameters: list[torch.Tensor], *arguments: float) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 7:
            parameters[0].grad[0, 0] = float("nan")  # type: ignore[index]
        return clip(parameters, *arguments)

    class Watched(torch.optim.AdamW):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    outcome = write(room, batches[0], max_epochs=240)
    assert outcome.stepped_back
    assert outcome.stopped_early
    assert all(score.min_probability >= 0.7 for score in outcome.scores)
    assert max(rates[6:]) <= 0.2 * max(rates[:6])
    assert len(rates) == calls[0] - 1, "the poisoned gradient was never stepped along"


def test_a_loss_far_above_a_guess_is_divergence_and_names_the_facts(
    write: Write, room: Memory, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memupdate.training.loop.loss_limit", lambda vocabulary, before: 1e-3 * min(vocabulary, before))
    with pytest.raises(
        TrainingError, match="nats per token, also from the last good state at the lower rate"
    ) as caught:
        write(room, batches[0])
    assert len(caught.value.details) == 5
    assert all(any(e.prompt in line for e in batches[0]) for line in caught.value.details)


def test_the_safety_net_changes_no_number(
    write: Write, room: Memory, batches: Batches, trained: TrainingOutcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SafetyNet, "keep", lambda *_: None)
    without = write(room, batches[0])
    assert (without.epochs, without.steps, without.kl_nats) == (trained.epochs, trained.steps, trained.kl_nats)
    assert not trained.stepped_back
    assert all(torch.equal(a, b) for a, b in zip(bits(without.memory), bits(trained.memory), strict=True))


@pytest.mark.parametrize("guard", [0.0, 20.0])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_memory_never_passes_for_stored(
    write: Write, filled: Memory, batches: Batches, guard: float, poison: float
) -> None:
    name = next(iter(filled.b))
    bad = filled.b[name].clone()
    bad[0, 0] = poison
    with pytest.raises(TrainingError, match="not finite"):
        write(replace(filled, b={**filled.b, name: bad}), batches[0], guard_weight=guard)


def test_the_base_model_is_left_as_it_was(
    atlas_base: BaseModel, write: Write, room: Memory, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    before = {name: tensor.clone() for name, tensor in atlas_base.model.state_dict().items()}
    write(room, batches[0], max_epochs=2)
    with pytest.raises(TrainingError):
        write(room, batches[0], learning_rate=1e30, max_epochs=4, guard_weight=0.0)
    after = atlas_base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in atlas_base.model.parameters())


def test_progress_ends_with_all_examples(
    atlas_base: BaseModel, room: Memory, settings: TrainingSettings, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    events: list[ProgressEvent] = []
    write_facts(
        atlas_base, room, batches[0], replace(settings, max_epochs=2, guard_weight=0.0), None, None, events.append
    )
    assert [e.stage for e in events] == ["train"] * 3
    assert events[-1].done == events[-1].total == 6


@pytest.mark.gpu
def test_a_batch_is_stored_on_the_gpu(
    room: Memory, settings: TrainingSettings, batches: Batches, atlas_renderer: Renderer
) -> None:
    base = load_base(resolve_model("atlas"), dtype="float32")
    assert base.device.type == "cuda"
    prefixes = [[0], list(atlas_renderer.user_prefix_ids() or ())]
    anchors: Anchors = sample_anchors(base, prefixes, count=96, tokens=32, seed=1, progress=no_progress)
    train, holdout = anchors.select(slice(0, 64)), anchors.select(slice(64, 96))
    outcome = write_facts(base, room, batches[0], settings, train, holdout, no_progress)
    assert outcome.stopped_early
    assert [s.greedy_ids for s in outcome.scores] == [e.target_ids for e in batches[0]]
    assert outcome.kl_nats is not None
    assert outcome.kl_nats <= settings.max_kl_nats
    assert all(t.device.type == "cpu" for t in (*outcome.memory.a.values(), *outcome.memory.b.values()))
