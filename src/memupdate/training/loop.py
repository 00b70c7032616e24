"""The training loop: MemFT under a guard, with threshold-gated replay, until every target token clears the margin.

It receives values and tensors, never the policy or the ledger. Two runs with one seed on one machine give the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from memupdate.errors import TrainingError
from memupdate.facts.render import Example
from memupdate.models.base import BaseModel
from memupdate.models.scoring import TargetScore, logits_at, mean_loss_nats, pad_batch, score_examples
from memupdate.progress import Progress, ProgressEvent
from memupdate.training.anchors import Anchors, anchor_kl, measure_kl, model_logits
from memupdate.training.losses import make_objective
from memupdate.training.memory import Memory, attach, detach, read_memory

_RATE_FLOOR = 0.15
"""The learning rate falls with the square root of the share of examples still under the goal, down to this part of it: few tokens
left under full rate would shake all the others (in a trial with 120 examples: 80 epochs and no end, against 16 to 38)."""
_MIN_STEPS = 160
"""What a small set may take, where `max_epochs` of a step or two each would be too few."""
_GUARD_RAISE = 1.5
"""How much heavier the guard gets each time that harm is over its budget when the facts are all stored."""


@dataclass(frozen=True)
class TrainingSettings:
    """What the loop needs to know."""

    objective: str
    goal: float
    """Probability that every target token must reach: threshold + margin."""
    threshold: float
    """MemFT's p: tokens above `goal` get no gradient; `threshold` is what a proof needs."""
    learning_rate: float
    batch_size: int
    """Examples a step."""
    max_epochs: int
    recheck_every: int
    """Epochs between forward passes over all examples."""
    clip_norm: float
    seed: int
    train_basis: bool
    guard_weight: float
    """λ; 0 trains without a guard."""
    anchors_per_step: int
    max_kl_nats: float
    stop_when_stored: bool = True
    """False trains all epochs, as a calibration of plain SFT does."""


@dataclass(frozen=True)
class TrainingOutcome:
    """A trained memory and what it took."""

    memory: Memory
    epochs: int
    steps: int
    backward_examples: int
    duration_s: float
    loss_before_nats: float
    """Mean over target tokens of all examples, before the first step."""
    loss_after_nats: float
    scores: tuple[TargetScore, ...]
    """After training, in the order of the examples."""
    kl_nats: float | None
    stopped_early: bool
    """Every token cleared the goal and harm was within its budget."""


def write_facts(
    base: BaseModel,
    memory: Memory,
    examples: Sequence[Example],
    settings: TrainingSettings,
    anchors: Anchors | None,
    holdout: Anchors | None,
    progress: Progress,
) -> TrainingOutcome:
    """Train `memory` until `examples` (new facts and older live ones alike) are stored.

    Examples over the goal cost a forward pass every `recheck_every` epochs and no backward pass (replay gated by the threshold).

    Raises:
        TrainingError: the loss is not finite.
    """
    peft_model = attach(base.model, memory, train_basis=settings.train_basis)
    try:
        return _Run(base, peft_model, list(examples), settings, anchors, holdout, progress).run()
    finally:
        base.model = detach(peft_model)


class _Run:
    """State of one run of the loop."""

    def __init__(
        self,
        base: BaseModel,
        model: PeftModel,
        examples: list[Example],
        settings: TrainingSettings,
        anchors: Anchors | None,
        holdout: Anchors | None,
        progress: Progress,
    ) -> None:
        self.device, self.model, self.examples, self.settings = base.device, model, examples, settings
        self.anchors, self.holdout, self.progress = anchors, holdout, progress
        self.objective = make_objective(settings.objective, settings.goal)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.guard_weight = settings.guard_weight if anchors is not None else 0.0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)
        )
        self.steps = self.backward_examples = 0
        self.anchor_order = torch.empty(0, dtype=torch.long)

    def run(self) -> TrainingOutcome:
        started = time.monotonic()
        scores = self.check()
        before = mean_loss_nats(scores)
        active, epoch, stored = self.under_goal(scores), 0, False
        steps_an_epoch = math.ceil(len(self.examples) / self.settings.batch_size)
        max_epochs = max(self.settings.max_epochs, math.ceil(_MIN_STEPS / steps_an_epoch))
        while epoch < max_epochs:
            if not active and self.settings.stop_when_stored:
                stored = self.harm_is_within_budget()
                if stored:
                    break
            epoch += 1
            if active:
                active = self.epoch(active)
            else:
                self.repair()
            if epoch % self.settings.recheck_every == 0 or not active:
                scores = self.check()
                active = self.under_goal(scores)
            total = len(self.examples)
            self.progress(
                ProgressEvent(
                    "train", total - len(active), total, f"epoch {epoch}, {total - len(active)} of {total} stored"
                )
            )
        scores = self.check()
        stored = stored or (not self.under_goal(scores) and self.harm_is_within_budget())
        total, under = len(self.examples), len(self.under_goal(scores))
        self.progress(ProgressEvent("train", total, total, f"{total - under} of {total} stored after {epoch} epochs"))
        kl = measure_kl(self.model, self.holdout, self.device) if self.holdout is not None else None
        return TrainingOutcome(
            read_memory(self.model), epoch, self.steps, self.backward_examples, time.monotonic() - started, before,
            mean_loss_nats(scores), tuple(scores), kl, stored,
        )  # fmt: skip

    def check(self) -> list[TargetScore]:
        scores = score_examples(self.model, self.examples, self.device)
        if not math.isfinite(mean_loss_nats(scores)):  # NaN is under no goal, so it would pass for stored
            raise _diverged()
        return scores

    def under_goal(self, scores: Sequence[TargetScore]) -> list[int]:
        if not self.settings.stop_when_stored:
            return list(range(len(self.examples)))
        return [i for i, s in enumerate(scores) if s.min_probability < self.settings.goal]

    def harm_is_within_budget(self) -> bool:
        if self.holdout is None or not self.guard_weight:
            return True
        return measure_kl(self.model, self.holdout, self.device) <= self.settings.max_kl_nats

    def epoch(self, active: list[int]) -> list[int]:
        """One pass over the active examples; returns those that were still under the goal when their batch was run."""
        order = self.shuffled(active)
        rate = self.settings.learning_rate * max(_RATE_FLOOR, math.sqrt(len(active) / len(self.examples)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # The last batch is filled with stored examples: below the goal they get gradient at once, not at the next check.
        resting = self.shuffled(sorted(set(range(len(self.examples))) - set(active)))
        size = self.settings.batch_size
        order += resting[: -len(order) % size]
        still: list[int] = []
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            loss, nll_max = self.fact_loss(chunk)
            self.step(loss)
            still += [i for i, worst in zip(chunk, nll_max, strict=True) if worst > -math.log(self.settings.goal)]
            self.backward_examples += len(chunk)
        return still if self.settings.stop_when_stored else active

    def shuffled(self, indices: list[int]) -> list[int]:
        """The same indices in random order."""
        return [indices[i] for i in torch.randperm(len(indices), generator=self.generator).tolist()]

    def fact_loss(self, chunk: list[int]) -> tuple[Tensor, list[float]]:
        """Objective over one batch, and each example's worst token loss (nats) before the step."""
        batch = pad_batch([self.examples[i] for i in chunk], self.device)
        logits = logits_at(self.model, batch.ids, batch.mask, batch.rows, batch.positions)
        nll = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        worst = torch.zeros(len(chunk), device=self.device).scatter_reduce(0, batch.rows, nll.detach(), "amax")
        return self.objective(nll), worst.tolist()

    def repair(self) -> None:
        """Facts are stored but harm is over budget: weigh the guard more and let it pull back."""
        self.guard_weight *= _GUARD_RAISE
        for _ in range(max(1, len(self.examples) // self.settings.batch_size)):
            self.step(torch.zeros((), device=self.device))

    def step(self, loss: Tensor) -> None:
        if self.guard_weight:
            loss = loss + self.guard_weight * self.guard_loss()
        if not torch.isfinite(loss):
            raise _diverged()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def guard_loss(self) -> Tensor:
        assert self.anchors is not None  # guard_weight is 0 without anchors
        if len(self.anchor_order) < self.settings.anchors_per_step:
            self.anchor_order = torch.randperm(len(self.anchors), generator=self.generator)
        index, self.anchor_order = self.anchor_order.split(
            [self.settings.anchors_per_step, len(self.anchor_order) - self.settings.anchors_per_step]
        )
        part = self.anchors.select(index)
        logits = model_logits(self.model, part.ids.to(self.device))
        return anchor_kl(logits, part.top_ids.to(self.device).long(), part.top_logprobs.to(self.device))


def _diverged() -> TrainingError:
    return TrainingError("training diverged: the loss is not finite", "lower training.learning_rate in the policy")
