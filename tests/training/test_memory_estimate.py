"""The estimate of what training needs against what a process took: never less, and no more than twice as much."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from memupdate.budget.placement import resolve_placement
from memupdate.budget.training_memory import TrainingLoad, estimate_memory
from memupdate.models.folder import resolve_model

SCRIPT = """
import json, sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
from memupdate.budget.placement import resolve_placement
from memupdate.facts.render import Example
from memupdate.models.base import load_base
from memupdate.models.folder import resolve_model
from memupdate.progress import no_progress
from memupdate.training import loop
from memupdate.training.anchors import sample_anchors
from memupdate.training.memory import empty_memory, grow
loop._MIN_STEPS = 0
given = json.loads(sys.argv[1])
base = load_base(resolve_model("atlas"), dtype="float32")
shape = resolve_placement(given["placement"], base.model.config.to_dict())
generator = torch.Generator().manual_seed(0)
def ids(n):
    return tuple(torch.randint(6, 1536, (n,), generator=generator).tolist())
examples = [Example(str(i), "completion", "?", "!", ids(40), ids(24)) for i in range(given["batch"])]
anchors = sample_anchors(base, [[0]], count=given["anchors"], tokens=64, seed=0, progress=no_progress)
settings = loop.TrainingSettings(
    objective="sft", goal=0.7, threshold=0.5, learning_rate=1e-3, batch_size=given["batch"], max_epochs=1, recheck_every=4, clip_norm=1.0,
    seed=0, train_basis=True, guard_weight=1.0, anchors_per_step=given["anchors"], max_kl_nats=0.1, stop_when_stored=False,
)
memory = grow(empty_memory(shape), 8, seed="0", scale=2.0)
# What sampling freed may be used again without being seen: begin at what is in use now.
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
with open("/proc/self/status") as file:
    used = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
loop.write_facts(base, memory, examples, settings, anchors, anchors, no_progress, loop.Means(recompute=given["recompute"]))
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
print(json.dumps((peak - used) * 1024))
"""


def measured(**given: Any) -> int:
    # What is freed goes back to the system at once, so that the peak is of what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(json.loads(done.stdout))


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("placement", "batch", "anchors", "recompute"),
    [("mlp-all", 48, 24, False), ("mlp-all", 96, 1, True), ("mlp-one", 64, 32, False)],
)
def test_estimate_against_a_measured_peak(placement: str, batch: int, anchors: int, recompute: bool) -> None:
    config = resolve_model("atlas").config
    shape = resolve_placement(placement, config)
    tokens = 64 * (batch + 2 * anchors)
    load = TrainingLoad(
        batch_size=batch, longest_tokens=64, longest_target_tokens=24, anchors_per_step=anchors, anchor_tokens=64, train_basis=True,
        dtype="float32", recompute=recompute, cached_tokens=tokens, cache_limit_bytes=2**29,
    )  # fmt: skip
    estimate = estimate_memory(config, shape, 8, load).beside_weights
    peak = measured(placement=placement, batch=batch, anchors=anchors, recompute=recompute)
    assert peak > 20 * 2**20
    assert peak <= estimate <= 2 * peak, (peak / 2**20, estimate / 2**20)
