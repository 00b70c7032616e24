"""What training will hold in memory, from `config.json`, placement, rank and batch: arithmetic, before any weight is loaded.

Invariant: it counts what the trainer keeps, part by part, and errs to the large side; tests hold it against measured peaks. It knows no
machine: what is free is for the caller to find out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from memupdate.budget.placement import resolve_placement
from memupdate.budget.plan import PlacementShape

_WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_QUANTIZED_BYTES = {"8bit": 1.05, "4bit": 0.55}
"""Of a number of a quantised layer, its scales included."""
LOGIT_BYTES = 256 * 2**20
"""Logits that the trainer holds at a time where a loss can be taken in parts (the guard, and looks at all facts)."""
_PROCESSES = (2, 4, 8)
"""Among which one might share out a base model on a machine."""
_RUNTIME_BYTES = 400 * 2**20
"""Of torch itself: code, thread pools, allocator; on a GPU its context."""
_ADAM_COPIES = 6
"""Of what is trained, beside itself: gradient, two moments, and the last good state of all but the gradient."""


@dataclass(frozen=True)
class TrainingLoad:
    """One step of training, and what it is done with."""

    batch_size: int
    """Facts a step."""
    longest_tokens: int
    """Tokens of the longest fact, prompt and target."""
    longest_target_tokens: int
    anchors_per_step: int
    """0 without a guard."""
    anchor_tokens: int
    train_basis: bool
    dtype: str
    """Of the base model: `float32`, `bfloat16` or `float16`."""
    quantization: str = "none"
    shards: int = 1
    """Processes with a device each among which the decoder layers' weights are shared out."""
    recompute: bool = False
    """Gradient checkpointing."""
    cached_tokens: int = 0
    """Of all facts and anchors."""
    cache_limit_bytes: int = 0
    on_gpu: bool = False
    """The cache is in the host's memory then, and does not count."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training needs at its peak."""

    weights: int
    adapter: int
    """With gradients, the optimizer and the state that a divergence goes back to."""
    activations: int
    logits: int
    cache: int
    runtime: int = _RUNTIME_BYTES

    @property
    def total(self) -> int:
        """All parts."""
        return self.weights + self.adapter + self.activations + self.logits + self.cache + self.runtime

    @property
    def beside_weights(self) -> int:
        """What is still to come when the base model is loaded."""
        return self.total - self.weights - self.runtime


def estimate_memory(config: Mapping[str, Any], shape: PlacementShape, rank: int, load: TrainingLoad) -> MemoryEstimate:
    """Bytes of training a memory of `rank` over `shape` on the model that `config` describes.

    Raises:
        ModelError: the model type is not supported, or the config lacks a size.
    """
    number = _WEIGHT_BYTES[load.dtype]
    hidden, inner, layers = (int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    vocabulary = int(config["vocab_size"])
    linear = sum(d_in * d_out for _, d_in, d_out in resolve_placement("all-linear", config).matrices)
    heads = _head_numbers(config)
    tokens = load.batch_size * load.longest_tokens + load.anchors_per_step * load.anchor_tokens
    upper = layers - min((_layer(name) for name, _, _ in shape.matrices), default=0)
    # A layer keeps for its backward pass: two norms in float32, queries, keys, values and what attention gives, gate, its activation, up
    # and their product, and the residual stream; where A is trained on a half-precision model, its inputs in float32 too.
    whole = number * (2 * heads + 4 * inner + 2 * hidden) + 4 * 2 * hidden
    if load.train_basis and number < 4:
        whole += 4 * (inner + 2 * hidden)
    kept = number * hidden * upper + whole if load.recompute else whole * upper
    step = (load.batch_size * load.longest_target_tokens) * vocabulary * 4 * 3
    anchors = min(load.anchors_per_step * load.anchor_tokens * vocabulary * 4, LOGIT_BYTES) * 3
    trained = sum(rank * (d_out + d_in * load.train_basis) for _, d_in, d_out in shape.matrices)
    cache = min(int(load.cached_tokens * hidden * number), load.cache_limit_bytes)
    # One layer's attention or MLP is whole while it runs, beside this device's share of all.
    share = linear if load.shards == 1 else linear / load.shards + linear / layers
    return MemoryEstimate(
        weights=round(
            share * _QUANTIZED_BYTES.get(load.quantization, number)
            + number * hidden * (vocabulary * (1 if config.get("tie_word_embeddings") else 2) + 2 * layers + 1)
        ),
        adapter=4 * (rank * shape.parameters_per_rank + _ADAM_COPIES * trained),
        activations=round(tokens * kept),
        logits=step + anchors,
        cache=0 if load.on_gpu else cache,
    )


def mending(config: Mapping[str, Any], shape: PlacementShape, rank: int, load: TrainingLoad, free: int) -> list[str]:
    """What to change, one line each, for training to fit into `free` bytes; changes that would not be enough are left out."""

    def fits(changed: TrainingLoad) -> bool:
        return estimate_memory(config, shape, rank, changed).total <= free

    lines = []
    sizes = (load.batch_size >> n for n in range(1, int(math.log2(load.batch_size)) + 1))
    if size := next((n for n in sizes if fits(replace(load, batch_size=n))), None):
        lines.append(f"training.batch_size = {size} in the policy")
    anchors = (load.anchors_per_step >> n for n in range(1, max(1, load.anchors_per_step).bit_length()))
    if fewer := next((n for n in anchors if n and fits(replace(load, anchors_per_step=n))), None):
        lines.append(f"guard.anchors_per_step = {fewer}")
    if not load.recompute and fits(replace(load, recompute=True)):
        lines.append('resources.checkpointing = "always", which runs each layer twice')
    if load.dtype == "float32" and fits(replace(load, dtype="bfloat16")):
        lines.append('training.dtype = "bfloat16"')
    if load.quantization == "none":
        small = [name for name in _QUANTIZED_BYTES if fits(replace(load, quantization=name))]
        lines += [f'resources.quantization = "{name}"' for name in small[:1]]
    if load.shards == 1 and load.quantization == "none":
        several = next((n for n in _PROCESSES if fits(replace(load, shards=n))), None)
        if several and load.on_gpu:
            lines.append(
                f'resources.sharding = "fsdp", and `accelerate launch --multi_gpu --num_processes {several}` on as many GPUs'
            )
    one = resolve_placement("mlp-one", config)
    if shape.name != "mlp-one" and estimate_memory(config, one, rank, load).total <= free:
        lines.append('memory.placement = "mlp-one": fewer layers, more harm')
    return lines


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def _head_numbers(config: Mapping[str, Any]) -> int:
    """Numbers of a token's queries, and of its keys and values: d_q + d_kv, of one layer."""
    sizes = {name.rpartition(".")[2]: d_out for name, _, d_out in resolve_placement("all-linear", config).matrices}
    return sizes["q_proj"] + sizes["k_proj"]
