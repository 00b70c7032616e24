"""An 8B-shaped base on a GPU: tokens a second and peak memory of our trainer and of TRL's, at rank 16.

Weights are random, in the shapes of Qwen3-8B and Llama-3.1-8B: what a step costs does not depend on what the model knows, and nothing is
downloaded. Without CUDA the part is skipped with a line that says so.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.recording import markdown_table, record
from benchmarks.training.store import Row, Store, code_of_baselines, code_of_ours
from peft import LoraConfig

from memupdate.budget.placement import resolve_placement
from memupdate.facts.render import Example
from memupdate.models.base import BaseModel
from memupdate.progress import ProgressEvent
from memupdate.resources import resource_dir
from memupdate.training.loop import TrainingSettings, write_facts
from memupdate.training.memory import empty_memory, grow

STUDY = "gpu"
RANK, BATCH, PROMPT, TARGET, RATE = 16, 32, 48, 16, 1e-4
"""Prompt and target in tokens: a question in a chat template, and a sentence."""
GOAL_GIB = 24.0
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""The configurations that the two models are published with, as far as they say how large something is."""


@dataclass(frozen=True)
class Load:
    """How much is trained."""

    facts: int
    epochs: int


FULL, QUICK = Load(256, 4), Load(64, 2)
NO_GPU = (
    "gpu: skipped, there is no CUDA device here; run `python -m benchmarks.training --parts gpu` where there is one"
)


def run(store: Store, load: Load) -> dict[str, Row]:
    """Measure what is missing, or say why not; returns `SHAPE METHOD` → row."""
    if not torch.cuda.is_available():
        print(NO_GPU)
        return {}
    device, rows = torch.device("cuda"), {}
    for shape, config in SHAPES.items():
        for method in TRAINERS:
            cell = {"shape": shape, "method": method, "device": torch.cuda.get_device_name(), **asdict(load)}
            code = code_of_ours() if method == "ours" else code_of_baselines()
            measured = partial(measure, config, method, load, device)
            rows[f"{shape} {method}"] = store.get_or(STUDY, cell, code, measured)
    return rows


def report(rows: dict[str, Row], folder: Path) -> None:
    """A result of its own, under the GPU's name."""
    figures: dict[str, float | None] = {}
    for name, row in rows.items():
        short = re.sub(r"[^a-z0-9]+", "_", name)
        figures |= {f"tokens_per_s_{short}": row["tokens_per_s"], f"peak_gib_{short}": row["peak_gib"]}
    gpu = re.sub(r"^(nvidia|geforce|tesla)-", "", re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))
    lines = [(name, row["tokens_per_s"], round(row["epoch_s"], 3), row["peak_gib"]) for name, row in rows.items()]
    table = markdown_table(("", "tokens a second", "seconds an epoch", "peak memory, GiB"), lines)
    note = f"Rank {RANK}, {PROMPT} + {TARGET} tokens a fact, {BATCH} facts a step; the goal is {GOAL_GIB:g} GiB at most.\n\n"
    record(f"training-{gpu}", figures, table_markdown=note + table, folder=folder)


def measure(config: dict[str, Any], method: str, load: Load, device: torch.device) -> Row:
    """One trainer on one shape. An epoch's time is the median; the first epoch warms up and is not counted."""
    base, examples = random_base(config, device), random_examples(config, load.facts)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ends = TRAINERS[method](base, config, examples, load.epochs + 1)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    epoch_s = statistics.median(after - before for before, after in itertools.pairwise(ends))
    tokens = load.facts * (PROMPT + TARGET)
    return {
        "tokens_per_s": round(tokens / epoch_s, 1),
        "epoch_s": round(epoch_s, 6),
        "peak_gib": peak and round(peak, 2),
    }


def _now(device: torch.device) -> float:
    """The clock once everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def random_base(config: dict[str, Any], device: torch.device) -> BaseModel:
    """A frozen model of the shape with random weights, in bfloat16 on a GPU."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    values = {k: v for k, v in config.items() if k != "model_type"}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values), dtype=dtype)
    model.eval().requires_grad_(False)
    # Token ids are drawn, so nothing is tokenized; TRL wants a tokenizer all the same.
    return BaseModel(model, AutoTokenizer.from_pretrained(resource_dir("atlas")), device)


def random_examples(config: dict[str, Any], count: int) -> list[Example]:
    """Prompts and targets of random ids; no two alike."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, config["vocab_size"], (count, PROMPT + TARGET), generator=generator).tolist()
    return [
        Example(str(i), "completion", f"prompt {i}", "", tuple(row[:PROMPT]), tuple(row[PROMPT:]))
        for i, row in enumerate(ids)
    ]


class _Enough(Exception):
    """As many epochs as are measured."""


def _ours(base: BaseModel, config: dict[str, Any], examples: list[Example], epochs: int) -> list[float]:
    """When each epoch ended."""
    memory = grow(empty_memory(resolve_placement("mlp-all", config)), RANK, seed="gpu", scale=2.0)
    settings = TrainingSettings(
        objective="memft-ot", goal=0.7, threshold=0.5, learning_rate=RATE, batch_size=BATCH, max_epochs=epochs, recheck_every=epochs + 1,
        clip_norm=1.0, seed=0, train_basis=True, guard_weight=0.0, anchors_per_step=0, max_kl_nats=math.inf, stop_when_stored=False,
    )  # fmt: skip
    ends: list[float] = []

    def note(event: ProgressEvent) -> None:
        if event.stage != "train":
            return
        ends.append(_now(base.device))
        if len(ends) == epochs:  # the trainer itself would go on: it has a least number of steps
            raise _Enough

    with suppress(_Enough):
        write_facts(base, memory, examples, settings, None, None, note)
    return ends


def _trl(base: BaseModel, config: dict[str, Any], examples: list[Example], epochs: int) -> list[float]:
    """When each epoch ended."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Note(TrainerCallback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            ends.append(_now(base.device))

    on_gpu = base.device.type == "cuda"
    rows = [
        {"input_ids": [*e.prompt_ids, *e.target_ids], "completion_mask": [0] * PROMPT + [1] * TARGET} for e in examples
    ]
    targets = [name for name, *_ in resolve_placement("mlp-all", config).matrices]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=BATCH, learning_rate=RATE, bf16=on_gpu,
            use_cpu=not on_gpu, completion_only_loss=True, dataloader_pin_memory=on_gpu, logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=base.model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=base.tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM"), callbacks=[Note()],
        )  # fmt: skip
        trainer.train()
    return ends


TRAINERS: dict[str, Callable[[BaseModel, dict[str, Any], list[Example], int], list[float]]] = {
    "ours": _ours,
    "trl": _trl,
}
