"""The training loop: MemFT under a guard, with threshold-gated replay, until every target token clears the margin.

It receives values and tensors, never the policy or the ledger. Two runs with one seed on one machine give the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor

from memupdate.distributed.team import Team
from memupdate.facts.render import Example
from memupdate.models.base import BaseModel
from memupdate.models.scoring import (
    PassBounds,
    TargetScore,
    length_batches,
    mean_loss_nats,
    target_scores,
    vocabulary_of,
)
from memupdate.progress import Progress, ProgressEvent
from memupdate.training.anchors import Anchors, guard_kl, passes_of, summed_kl
from memupdate.training.curriculum import make_curriculum, whole
from memupdate.training.losses import make_objective
from memupdate.training.lower_layers import CacheBounds
from memupdate.training.members import together
from memupdate.training.memory import Memory, attach, detach, read_memory
from memupdate.training.passes import Passes, ask_targets, make_passes
from memupdate.training.safety import Diverged, SafetyNet, loss_limit
from memupdate.training.tokens import target_tokens

_RATE_FLOOR = 0.15
"""The learning rate falls with the square root of the share of examples still under the goal, down to this part of it: few tokens
left under full rate would shake all the others (in a trial with 120 examples: 80 epochs and no end, against 16 to 38)."""
_FULL_RATE_DIRECTIONS = 64
"""Up to so many directions (the rank times the adapted layers) the policy's rate is used as it is, above it falls as one over them. A step
moves all of them the same way, so what it changes grows with them; LoRA's own scaling alpha / r would undo that, and is folded into `A`
here. In a trial with 400 facts at rank 64 of four layers the full rate lost older facts faster than it stored new ones, and a quarter of it
was done in 54 epochs; at rank 64 of one layer the full rate was the better one."""
_COUNTED_LAYERS = 4
"""More adapted layers than were tried count as these."""
_MIN_STEPS = 480
"""What a small set may take, where `max_epochs` of a step or two each would be too few."""
_GUARD_RAISE = 1.5
"""How much heavier the guard gets each time that harm is over its budget when the facts are all stored."""
_AT_FAULT = 5
"""Facts with the largest loss that a divergence names."""


@dataclass(frozen=True)
class TrainingSettings:
    """What the loop needs to know."""

    objective: str
    """A policy's `training.objective`: see `losses.make_objective` and `curriculum.make_curriculum`."""
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
    linear_decay: bool = False
    """The learning rate falls evenly to 0 over all epochs, as in the paper; else with the share of examples that are not stored."""


@dataclass(frozen=True)
class Means:
    """How a run may use the machine. Nothing here changes what is trained."""

    cache: CacheBounds = field(default_factory=CacheBounds)
    """Of what the layers below the lowest adapted matrix give."""
    recompute: bool = False
    """Gradient checkpointing: activations of one layer at a time, each layer run twice."""


@dataclass(frozen=True)
class Job:
    """What a run gets besides the base model, as every member of a team gets it."""

    memory: Memory
    examples: list[Example]
    settings: TrainingSettings
    anchors: Anchors | None
    holdout: Anchors | None
    means: Means


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
    stepped_back: bool = False
    """It diverged once, went back to its last good state and on at a lower rate."""


def write_facts(
    base: BaseModel,
    memory: Memory,
    examples: Sequence[Example],
    settings: TrainingSettings,
    anchors: Anchors | None,
    holdout: Anchors | None,
    progress: Progress,
    means: Means | None = None,
) -> TrainingOutcome:
    """Train `memory` until `examples` (new facts and older live ones alike) are stored.

    Examples over the goal cost a forward pass every `recheck_every` epochs and no backward pass (replay gated by the threshold).

    A run that diverges (NaN, or a loss far above a guess's) goes back to its last good check and on at a lower rate, once.

    Raises:
        TrainingError: it diverged again, or began with numbers that are not finite; `details` names the facts at fault.
    """
    job = Job(memory, list(examples), settings, anchors, holdout, means or Means())
    with together(base.source, job) as team:
        return run_job(base, job, progress, team)


def rank_factor(rank: int, layers: int) -> float:
    """By which a policy's learning rate is multiplied at this rank over so many adapted layers."""
    return min(1.0, _FULL_RATE_DIRECTIONS / (rank * min(layers, _COUNTED_LAYERS)))


def run_job(base: BaseModel, job: Job, progress: Progress, team: Team) -> TrainingOutcome:
    """One member's part of `write_facts`; every member comes to the same outcome, or raises the same error."""
    peft_model = attach(base.model, job.memory, train_basis=job.settings.train_basis)
    try:
        passes = make_passes(base, peft_model, job.memory.a, job.means.cache, recompute=job.means.recompute)
        return _Run(base, peft_model, passes, job, progress, team).run()
    except Diverged as fault:  # before the first step: there is nothing to go back to
        raise fault.error() from fault
    finally:
        base.model = detach(peft_model)


class _Run:
    """State of one run of the loop."""

    def __init__(
        self, base: BaseModel, model: PeftModel, passes: Passes, job: Job, progress: Progress, team: Team
    ) -> None:
        settings, anchors = job.settings, job.anchors
        self.device, self.model, self.examples, self.settings = base.device, model, job.examples, settings
        layers = len({name.rsplit(".", 2)[0] for name in job.memory.a})
        self.rank_factor = rank_factor(job.memory.rank, layers)
        self.anchors, self.holdout, self.progress = anchors, job.holdout, progress
        self.passes, self.team = passes, team
        self.in_step = base.is_sharded
        """Each pass takes all members: they make as many, in the same order, also where a member has no share."""
        self.objective = make_objective(settings.objective, settings.goal)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.guard_weight = settings.guard_weight if anchors is not None else 0.0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # On a CPU the fused form gains nothing at the size of a memory.
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            weight_decay=0.0,
            betas=(0.9, 0.98),
            fused=base.device.type == "cuda",
        )
        self.vocabulary = vocabulary_of(model)
        self.steps = self.backward_examples = self.epochs = 0
        self.max_epochs = settings.max_epochs
        self.curriculum = whole(len(job.examples))
        self.anchor_order = torch.empty(0, dtype=torch.long)
        self.net = SafetyNet(self.parameters, self.optimizer)

    def run(self) -> TrainingOutcome:
        started = time.monotonic()
        self.passes.prepare([ask_targets(self.examples)])  # anchors are many, and a short run sees few of them
        scores = self.check()
        before = mean_loss_nats(scores)
        active, stored = self.under_goal(scores), False
        self.net.limit_nats = loss_limit(self.vocabulary, before)
        self.net.keep(active)
        steps_an_epoch = max(1, math.ceil(len(self.examples) / self.settings.batch_size))
        self.max_epochs = max(self.settings.max_epochs, math.ceil(_MIN_STEPS / steps_an_epoch))
        self.curriculum = make_curriculum(
            self.settings.objective,
            len(self.examples),
            epochs=self.max_epochs,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
        )
        while self.epochs < self.max_epochs:
            if not active and self.settings.stop_when_stored:
                stored = self.harm_is_within_budget()
                if stored:
                    break
            self.epochs += 1
            try:
                active = self.epoch(active) if active else self.repair()
                if self.epochs % self.settings.recheck_every == 0 or not active:
                    active = self.under_goal(self.check())
                    self.net.keep(active)
            except Diverged as fault:
                active = self.net.step_back(fault, self.settings.learning_rate)
            total = len(self.examples)
            self.progress(
                ProgressEvent(
                    "train", total - len(active), total, f"epoch {self.epochs}, {total - len(active)} of {total} stored"
                )
            )
        scores = self.last_check()
        stored = stored or (not self.under_goal(scores) and self.harm_is_within_budget())
        total, under = len(self.examples), len(self.under_goal(scores))
        self.progress(
            ProgressEvent("train", total, total, f"{total - under} of {total} stored after {self.epochs} epochs")
        )
        kl = self.harm() if self.holdout is not None else None
        return TrainingOutcome(
            read_memory(self.model), self.epochs, self.steps, self.backward_examples, time.monotonic() - started, before,
            mean_loss_nats(scores), tuple(scores), kl, stored, self.net.has_stepped_back,
        )  # fmt: skip

    def check(self) -> list[TargetScore]:
        """Scores of all examples. Raises Diverged: NaN, which is under no goal, would pass for stored."""
        scores = self.scores()
        mean = mean_loss_nats(scores)
        if not math.isfinite(mean):
            raise Diverged(
                "the loss is not finite",
                self.prompts(i for i, s in enumerate(scores) if not math.isfinite(s.loss_nats)),
            )
        if mean > self.net.limit_nats:
            worst = sorted(range(len(scores)), key=lambda i: -scores[i].loss_nats / len(scores[i].logprobs))
            raise Diverged(f"the loss rose to {mean:.1f} nats per token", self.prompts(worst[:_AT_FAULT]))
        return scores

    @torch.inference_mode()
    def scores(self) -> list[TargetScore]:
        """Of all examples, each run once by one member of the team."""
        self.team.agree(self.parameters)
        own = self.team.mine(self.examples)
        found: dict[int, TargetScore] = {}
        batches = list(length_batches(own, PassBounds.on(self.device, self.vocabulary)))
        self.keep_up(len(batches))
        for indices in batches:
            chosen = [own[i] for i in indices]
            found |= dict(zip(indices, target_scores(self.passes.logits(ask_targets(chosen)), chosen), strict=True))
        return self.team.gather([found[i] for i in range(len(own))])

    def harm(self) -> float:
        """KL to the base model on the hold-out, nats per token."""
        assert self.holdout is not None  # asked for only with one
        own = self.holdout.select(slice(self.team.rank, None, self.team.size))
        self.keep_up(passes_of(own))
        nats = torch.tensor(summed_kl(self.passes, own), dtype=torch.float64)
        return float(self.team.sum(nats.to(self.device))) / self.holdout.tokens

    @torch.inference_mode()
    def keep_up(self, passes: int) -> None:
        """Before a member's own passes: those that others have to make more of than it."""
        if self.in_step:
            for _ in range(self.team.most(passes) - passes):
                self.passes.logits(ask_targets(self.examples[:1]))

    def last_check(self) -> list[TargetScore]:
        """The scores that are reported; where the last epochs have spoilt the memory, those of the last good state."""
        try:
            return self.check()
        except Diverged as fault:
            self.net.step_back(fault, self.settings.learning_rate)
            return self.check()

    def prompts(self, indices: Iterable[int]) -> list[str]:
        """The facts' own words, for an error."""
        return [self.examples[i].prompt for i in indices]

    def under_goal(self, scores: Sequence[TargetScore]) -> list[int]:
        if not self.settings.stop_when_stored:
            return list(range(len(self.examples)))
        return [i for i, s in enumerate(scores) if s.min_probability < self.settings.goal]

    def harm_is_within_budget(self) -> bool:
        if self.holdout is None or not self.guard_weight:
            return True
        return self.harm() <= self.settings.max_kl_nats

    def epoch(self, active: list[int]) -> list[int]:
        """One pass over the active examples that the curriculum admits.

        Returns:
            Those that were still under the goal when their batch was run, and those that wait for a later stage.
        """
        admitted = set(self.curriculum.admitted(self.epochs, active))
        chosen = [i for i in active if i in admitted]
        waiting = [i for i in active if i not in admitted]
        order = self.shuffled(chosen)
        self.set_rate(len(chosen) / len(admitted))
        # The last batch is filled with stored examples: below the goal they get gradient at once, not at the next check.
        resting = self.shuffled(sorted(admitted - set(chosen)))
        size = self.settings.batch_size
        order += resting[: -len(order) % size]
        still: list[int] = []
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            worst = self.train_on(chunk)
            still += [i for i, nats in zip(chunk, worst, strict=True) if nats > -math.log(self.settings.goal)]
            self.backward_examples += len(chunk)
        return still + waiting if self.settings.stop_when_stored else active

    def set_rate(self, share_left: float) -> None:
        """The learning rate of this epoch; `share_left` of the examples in it are not stored."""
        if self.settings.linear_decay:
            rate = 1 - (self.epochs - 1) / self.max_epochs
        else:
            rate = max(_RATE_FLOOR, math.sqrt(share_left)) * self.rank_factor
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rate * self.net.rate_factor

    def shuffled(self, indices: list[int]) -> list[int]:
        """The same indices in random order."""
        return [indices[i] for i in torch.randperm(len(indices), generator=self.generator).tolist()]

    def train_on(self, chunk: list[int]) -> list[float]:
        """One step down the objective over some examples and the guard.

        Returns:
            Each example's worst token loss before the step, nats.

        Raises:
            Diverged: it names the examples at fault; nothing was changed.
        """
        harm = self.guard_weight * self.guard_loss() if self.guard_weight else torch.zeros((), device=self.device)
        nll, greedy, harm_of_all = self.shared(*self.losses(chunk), harm, chunk)
        lengths = [len(self.examples[i].target_ids) for i in chunk]
        loss = nll.sum()
        if chunk:
            tokens = target_tokens(chunk, lengths, epoch=self.epochs, greedy=greedy, targets=self.targets(chunk))
            loss = self.objective(nll, tokens)
        worst = [float(part.max()) for part in nll.detach().cpu().split(lengths) if chunk]
        suspects = self.prompts([i for i, nats in zip(chunk, worst, strict=True) if not math.isfinite(nats)] or chunk)
        if not torch.isfinite(loss.detach() + harm_of_all):
            raise Diverged("the loss is not finite", suspects)
        loss = loss + harm
        if loss.requires_grad:  # else this member of a team has no part in this step
            loss.backward()
        self.team.sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        if not torch.isfinite(norm):
            raise Diverged("a gradient is not finite", suspects)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return worst

    def targets(self, chunk: Sequence[int]) -> Tensor:
        """Target tokens of some examples, (N,) int64."""
        ids = [token for i in chunk for token in self.examples[i].target_ids]
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def losses(self, chunk: list[int]) -> tuple[Tensor, Tensor]:
        """Of this member's share: −ln p of the target tokens, (N,) float32 nats with gradient, and the greedy tokens, (N,) int64.

        A pass that is made for the others' sake alone ends in nothing, but takes part in their backward pass.
        """
        own = self.team.mine(chunk)
        run = own or chunk[: int(self.in_step)]
        if not run:
            return torch.zeros(0, device=self.device), torch.zeros(0, dtype=torch.long, device=self.device)
        logits = self.passes.logits(ask_targets([self.examples[i] for i in run]))
        nll = torch.nn.functional.cross_entropy(logits, self.targets(run), reduction="none")
        kept = len(nll) if own else 0
        return nll[:kept], logits.detach().argmax(-1)[:kept]

    def shared(self, nll: Tensor, greedy: Tensor, harm: Tensor, chunk: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """`losses` of the whole `chunk`, and the harm that all members found; gradient goes through this member's examples only.

        Every member weighs all losses, so that the gradients of all members sum to that of one process, whatever the objective.
        """
        if self.team.size == 1:
            return nll, greedy, harm.detach()
        lengths = torch.tensor([len(self.examples[i].target_ids) for i in chunk], dtype=torch.long)
        member = (torch.arange(len(chunk)) % self.team.size).repeat_interleave(lengths)
        own = (member == self.team.rank).nonzero()[:, 0].to(self.device)
        # One message: float64 holds losses and token ids exactly.
        message = torch.zeros(2 * len(member) + 1, dtype=torch.float64, device=self.device)
        message[own], message[own + len(member)], message[-1] = (
            nll.detach().double(),
            greedy.double(),
            harm.detach().double(),
        )
        losses, ids, total = self.team.sum(message).split([len(member), len(member), 1])
        return losses.float().index_copy(0, own, nll), ids.long(), total.float()[0]

    def repair(self) -> list[int]:
        """Facts are stored but harm is over budget: weigh the guard more and let it pull back; returns no active example."""
        self.guard_weight *= _GUARD_RAISE
        self.set_rate(0.0)
        for _ in range(max(1, len(self.examples) // self.settings.batch_size)):
            self.train_on([])
        return []

    def guard_loss(self) -> Tensor:
        """Harm on some anchors, nats per token; of a team, each member's part of the mean."""
        assert self.anchors is not None  # guard_weight is 0 without anchors
        if len(self.anchor_order) < self.settings.anchors_per_step:
            self.anchor_order = torch.randperm(len(self.anchors), generator=self.generator)
        index, self.anchor_order = self.anchor_order.split(
            [self.settings.anchors_per_step, len(self.anchor_order) - self.settings.anchors_per_step]
        )
        own = self.anchors.select(index[self.team.rank :: self.team.size])
        if len(own):
            return guard_kl(self.passes, own) / self.anchors.select(index).tokens
        if self.in_step:
            return 0.0 * guard_kl(self.passes, self.anchors.select(index[:1]))
        return torch.zeros((), device=self.device)
