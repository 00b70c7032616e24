"""The three ways to write facts: our trainer, TRL's `SFTTrainer` with PEFT, and the procedure of the memory law's paper.

Invariant: each starts from the untouched base model and ends with a `Memory` of the rank and placement asked for. A baseline is looked at
after every epoch by the proof that a release must pass, off the clock, and stops at the first epoch that passes. Ours carries all its own
checks on the clock, and goes on to its policy's margin.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from benchmarks.training.lab import Lab, Stopwatch
from peft import LoraConfig, get_peft_model
from torch import nn

from memupdate.facts.render import Example
from memupdate.models.base import BaseModel, load_base
from memupdate.models.scoring import pad_batch, score_examples
from memupdate.progress import no_progress
from memupdate.training.loop import write_facts
from memupdate.training.memory import ADAPTER, Memory, lora_layers

Stopped = Literal["proved", "cap", "epochs"]
TRL_DOCS_RATE = 2e-4
"""What TRL's page on PEFT gives for LoRA: ten times the 2e-5 that `SFTConfig` has for full fine-tuning."""
TRL_ALPHA_OVER_RANK = 2.0
"""TRL's `ModelConfig` has alpha 32 at rank 16."""
TRL_BATCH = 8
"""`SFTConfig`'s own."""
TRL_EPOCHS = 200
PAPER_RATE, PAPER_EPOCHS, PAPER_ALPHA, PAPER_DROPOUT, PAPER_CLIP = 1e-2, 200, 32, 0.1, 1.0
"""`script/pb/common.sh` and `hparams/context2vec_pb/pb_sft_lora.yaml` of zjunlp/ParametricMemoryLaw."""
_Objective = Callable[[torch.Tensor], torch.Tensor]


def _only_under_threshold(nll: torch.Tensor) -> torch.Tensor:
    """MemFT-OT at p = 0.5 as the repository runs it: the mean over tokens under the threshold, of all tokens where there is none."""
    under = nll.detach() > math.log(2)
    return nll[under].mean() if under.any() else nll.mean()


PAPER_OBJECTIVES: dict[str, _Objective] = {"paper-sft": torch.mean, "paper-memft-ot": _only_under_threshold}
"""Written out here, so that the baseline does not change with our own trainer."""


CHANGES: dict[str, dict[str, Any]] = {
    "no margin": {"goal": 0.5},
    "SFT": {"objective": "sft"},
    "A frozen": {"train_basis": False},
    "twice the rate": {"learning_rate": 6e-3},
    "32 a step": {"batch_size": 32},
}
"""What → the trainer's settings that differ from the policy's."""


@dataclass(frozen=True)
class Cell:
    """What is written, and how."""

    method: str
    """`ours`, `trl`, or `paper-` and an objective."""
    facts: int
    rank: int
    placement: str = "mlp-all"
    guard: float | None = None
    """The guard's weight; None for none, and for the baselines, which have none."""
    leash: bool = True
    """Whether the policy's harm budget holds; without, the weight alone says how much harm is done."""
    rate: float | None = None
    """Of TRL: None for what its documentation gives, on its own linear schedule; else a constant rate."""
    change: str = ""
    """Of ours: one of `CHANGES`, to see what a part of the policy brings."""


@dataclass(frozen=True)
class Written:
    """What came of a cell's training."""

    memory: Memory
    wall_s: float
    cpu_s: float
    epochs: int
    steps: int
    stopped: Stopped


def write(lab: Lab, cell: Cell, *, cap_s: float) -> Written:
    """Train one cell; a baseline for `cap_s` processor seconds at most."""
    if cell.method == "ours":
        return write_ours(lab, cell)
    if cell.method == "trl":
        return write_trl(lab, cell, cap_s)
    return write_paper(lab, cell, cap_s)


def write_ours(lab: Lab, cell: Cell) -> Written:
    """As `memupdate add` writes a first batch: the policy's settings, and its second and third attempt where facts stay unproved."""
    session, policy = lab.session, lab.session.policy
    settings = replace(
        session.training_settings(),
        guard_weight=cell.guard or 0.0,
        max_kl_nats=policy.guard.max_kl_nats if cell.leash else math.inf,
        **CHANGES.get(cell.change, {}),
    )
    guard = session.guard(no_progress) if cell.guard else None
    anchors, holdout = (guard.train, guard.holdout) if guard else (None, None)
    examples, memory = lab.examples(cell.facts), lab.fresh_memory(cell.placement, cell.rank)
    watch, epochs, steps = Stopwatch(), 0, 0
    for _ in range(policy.escalation.attempts):
        outcome = write_facts(session.base, memory, examples, settings, anchors, holdout, no_progress)
        memory, epochs, steps = outcome.memory, epochs + outcome.epochs, steps + outcome.steps
        if all(score.min_probability >= settings.threshold for score in outcome.scores):
            return Written(memory, watch.wall_s, watch.cpu_s, epochs, steps, "proved")
        settings = replace(settings, max_epochs=round(settings.max_epochs * policy.escalation.epochs_factor))
    return Written(memory, watch.wall_s, watch.cpu_s, epochs, steps, "epochs")


def write_trl(lab: Lab, cell: Cell, cap_s: float) -> Written:
    """`SFTTrainer` with a PEFT configuration: completion-only loss on the same token ids.

    Its defaults, but for: no gradient checkpointing and no bfloat16, which would only slow a CPU; more epochs than 3; no logging, no
    evaluation and no saving of its own.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    examples, base = lab.examples(cell.facts), load_base(lab.session.folder, dtype="float32")
    rows = [
        {
            "input_ids": [*e.prompt_ids, *e.target_ids],
            "completion_mask": [0] * len(e.prompt_ids) + [1] * len(e.target_ids),
        }
        for e in examples
    ]
    targets = sorted(lab.fresh_memory(cell.placement, 1).a)
    adapter = LoraConfig(
        r=cell.rank,
        lora_alpha=round(TRL_ALPHA_OVER_RANK * cell.rank),
        lora_dropout=0.0,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    look = _proof_after_each_epoch(base, examples, cap_s)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, num_train_epochs=TRL_EPOCHS, per_device_train_batch_size=TRL_BATCH,
            learning_rate=cell.rate or TRL_DOCS_RATE, lr_scheduler_type="constant" if cell.rate else "linear",
            completion_only_loss=True, gradient_checkpointing=False, bf16=False, use_cpu=base.device.type == "cpu",
            dataloader_pin_memory=False, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=base.model, args=config, train_dataset=Dataset.from_list(rows), processing_class=base.tokenizer,
            peft_config=adapter, callbacks=[look],
        )  # fmt: skip
        trainer.train()
    memory = _folded(trainer.model, TRL_ALPHA_OVER_RANK)
    return Written(memory, look.wall_s, look.cpu_s, look.epochs, trainer.state.global_step, look.stopped)


def _proof_after_each_epoch(base: BaseModel, examples: Sequence[Example], cap_s: float) -> Any:
    """A callback of transformers' trainer that keeps the time of training alone and ends it at the proof or the cap."""
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        watch: Stopwatch
        epochs, wall_s, cpu_s, stopped = 0, 0.0, 0.0, "epochs"

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002  # names that transformers passes
            self.watch = Stopwatch()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002  # names that transformers passes
            if self.watch.cpu_s > cap_s:
                self.stopped, control.should_training_stop = "cap", True

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002  # names that transformers passes
            self.epochs += 1
            with self.watch.paused():
                proved = _all_proved(kwargs["model"], examples, base)
            if proved:
                self.stopped, control.should_training_stop = "proved", True

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002  # names that transformers passes
            self.wall_s, self.cpu_s = self.watch.wall_s, self.watch.cpu_s

    return Look()


def write_paper(lab: Lab, cell: Cell, cap_s: float) -> Written:
    """The plain loop of the paper's repository, with its figures for sets of 1,000 to 4,000 target tokens on Qwen (8 a step from 8,000 on).

    AdamW at 1e-2 that falls evenly to 0 over 200 epochs, alpha 32, dropout 0.1, gradients clipped at 1, four entries a step, logits of
    every position. Left out, in its favour: the second forward pass of every step that it makes through the untouched model for its log.
    Different: LoRA on each matrix of the placement, where it has one LoRA beside the whole MLP.
    """
    examples, base = lab.examples(cell.facts), load_base(lab.session.folder, dtype="float32")
    targets = sorted(lab.fresh_memory(cell.placement, 1).a)
    config = LoraConfig(
        r=cell.rank, lora_alpha=PAPER_ALPHA, lora_dropout=PAPER_DROPOUT, target_modules=targets, task_type="CAUSAL_LM"
    )
    torch.manual_seed(42)
    model = get_peft_model(base.model, config)
    objective = PAPER_OBJECTIVES[cell.method]
    loop = _PlainLoop(base, model, examples, objective, batch=8 if _tokens(examples) >= 8000 else 4)
    stopped: Stopped = "epochs"
    while loop.epochs < PAPER_EPOCHS:
        loop.epoch(cap_s)
        with loop.watch.paused():
            proved = _all_proved(model, examples, base)
        if proved or loop.watch.cpu_s > cap_s:
            stopped = "proved" if proved else "cap"
            break
    wall_s, cpu_s = loop.watch.wall_s, loop.watch.cpu_s
    return Written(_folded(model, PAPER_ALPHA / cell.rank), wall_s, cpu_s, loop.epochs, loop.steps, stopped)


class _PlainLoop:
    """Training as the paper's repository does it; the clock runs from the first step."""

    def __init__(
        self, base: BaseModel, model: nn.Module, examples: Sequence[Example], objective: _Objective, *, batch: int
    ) -> None:
        self.base, self.model, self.examples, self.objective, self.batch = base, model, examples, objective, batch
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=PAPER_RATE, weight_decay=0.0)
        total = PAPER_EPOCHS * math.ceil(len(examples) / batch)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: max(0.0, 1 - step / total))
        self.generator = torch.Generator().manual_seed(42)
        self.epochs = self.steps = 0
        self.watch = Stopwatch()

    def epoch(self, cap_s: float) -> None:
        self.epochs += 1
        self.model.train()
        order = torch.randperm(len(self.examples), generator=self.generator).tolist()
        for start in range(0, len(order), self.batch):
            self.step(order[start : start + self.batch])
            if self.watch.cpu_s > cap_s:
                return

    def step(self, chunk: list[int]) -> None:
        batch = pad_batch([self.examples[i] for i in chunk], self.base.device)
        logits = self.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        logits = logits.float()[batch.rows, batch.positions]
        nll = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        self.objective(nll).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, PAPER_CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.steps += 1


def _all_proved(model: nn.Module, examples: Sequence[Example], base: BaseModel) -> bool:
    """Whether every target token is the argmax at p ≥ 0.5, which is what a release must show."""
    training = model.training
    model.eval()
    scores = score_examples(model, examples, base.device)
    model.train(training)
    return all(s.min_probability >= 0.5 and s.greedy_ids == e.target_ids for s, e in zip(scores, examples, strict=True))


def _folded(model: Any, scaling: float) -> Memory:
    """The adapter with its scaling folded into `A`, as our memories are."""
    layers = lora_layers(model)
    a = {n: scaling * layer.lora_A[ADAPTER].weight.detach().float().cpu() for n, layer in layers.items()}
    b = {n: layer.lora_B[ADAPTER].weight.detach().float().cpu().clone() for n, layer in layers.items()}
    return Memory(next(iter(a.values())).shape[0], a, b)


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(e.target_ids) for e in examples)
