"""Base models in bfloat16 and in 8 and 4 bits: the memory over them is float32, is trained exactly as it is run, and is proved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from memupdate.budget.plan import PlacementShape
from memupdate.facts.render import Example
from memupdate.models import base as models_base
from memupdate.models.base import BaseModel, bits_config
from memupdate.models.folder import resolve_model
from memupdate.models.scoring import score_examples
from memupdate.progress import no_progress
from memupdate.training import loop
from memupdate.training.loop import TrainingSettings, write_facts
from memupdate.training.lower_layers import CacheBounds
from memupdate.training.memory import Memory, attach, detach, empty_memory, grow, lora_layers
from memupdate.training.passes import UpperLayers, WholeModel, ask_targets, make_passes

CPU = torch.device("cpu")
Load = Callable[[str], BaseModel]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """The embedded model in a number format, on the CPU."""
    monkeypatch.setattr(models_base, "pick_device", lambda: CPU)
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)

    def run(form: str) -> BaseModel:
        folder = resolve_model("atlas")
        if form == "bfloat16":
            return models_base.load_base(folder, dtype="bfloat16")
        pytest.importorskip("bitsandbytes")
        return models_base.load_base(folder, dtype="float32", quantization=form)

    return run


@pytest.fixture
def room(shape: PlacementShape) -> Memory:
    return grow(empty_memory(shape), 8, seed="0:forms", scale=2.0)


@pytest.mark.parametrize("form", ["bfloat16", "8bit", "4bit"])
def test_a_memory_over_it_is_trained_and_proved(
    load: Load, form: str, room: Memory, settings: TrainingSettings, batches: tuple[list[Example], list[Example]]
) -> None:
    base, examples = load(form), batches[1]
    before = score_examples(
        base.model, examples, CPU
    )  # not the tensors: bitsandbytes packs them anew when it first uses them
    changed = replace(settings, guard_weight=0.0, learning_rate=1e-2, train_basis=True, max_epochs=80)
    outcome = write_facts(base, room, examples, changed, None, None, no_progress)
    assert outcome.stopped_early
    assert all(t.dtype == torch.float32 for t in (*outcome.memory.a.values(), *outcome.memory.b.values()))
    peft_model = attach(base.model, outcome.memory)
    try:
        proof = score_examples(peft_model, examples, CPU)
    finally:
        base.model = detach(peft_model)
    assert [s.greedy_ids for s in proof] == [e.target_ids for e in examples]
    assert min(s.min_probability for s in proof) > 0.5
    assert score_examples(base.model, examples, CPU) == before


@pytest.mark.parametrize("form", ["bfloat16", "8bit", "4bit"])
def test_passes_agree_with_the_whole_model_and_with_peft(
    load: Load, form: str, room: Memory, batches: tuple[list[Example], list[Example]]
) -> None:
    base, asked = load(form), ask_targets(batches[0])
    generator = torch.Generator().manual_seed(3)
    memory = replace(room, b={n: 0.05 * torch.randn(b.shape, generator=generator) for n, b in room.b.items()})
    peft_model = attach(base.model, memory, train_basis=True)
    try:
        passes = make_passes(base, peft_model, memory.a, CacheBounds())
        assert isinstance(passes, UpperLayers)
        passes.prepare([asked])
        upper, whole = passes.logits(asked), WholeModel(peft_model, CPU).logits(asked)
        parameters = [p for p in peft_model.parameters() if p.requires_grad]
        assert {p.dtype for p in parameters} == {torch.float32}
        assert all(g.any() for g in torch.autograd.grad(upper.logsumexp(-1).sum(), parameters))
        for layer in lora_layers(peft_model).values():
            del layer.forward  # PEFT's own again
        theirs = WholeModel(peft_model, CPU).logits(asked)
    finally:
        base.model = detach(peft_model)
    spread = float(whole.std())
    for other in (upper, theirs):  # in bfloat16, another order of sums is another rounding
        assert float((other - whole).std()) < (0.01 if form == "bfloat16" else 0.02) * spread


def test_formats_are_asked_of_bitsandbytes() -> None:
    assert bits_config("8bit", torch.float32).load_in_8bit
    four = bits_config("4bit", torch.bfloat16)
    assert four.load_in_4bit
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
