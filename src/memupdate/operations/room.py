"""Whether training fits into this machine's memory, and the means it gets: asked before facts are taken, and again before a run.

Invariant: what is estimated is `budget.training_memory`'s; here it meets what is free. `room_line` loads no torch.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from memupdate.budget.plan import Plan
from memupdate.budget.training_memory import MemoryEstimate, TrainingLoad, estimate_memory, mending
from memupdate.distributed.launch import current_launch
from memupdate.errors import UsageError
from memupdate.facts.model import Fact
from memupdate.facts.render import Example
from memupdate.operations.session import Session

if TYPE_CHECKING:
    from memupdate.training.loop import Means

_MIB = 2**20
_LOOKED_AT = 64
"""Facts of the longest texts, whose tokens are counted for a plan."""
_TEMPLATE_TOKENS = 32
"""Of a chat template around a prompt, for a plan."""
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def means_for(session: Session, rank: int, examples: Sequence[Example]) -> Means:
    """How a run may use the machine; gradient checkpointing where the policy leaves it open and nothing else fits.

    Raises:
        UsageError: the run would not fit into the memory that is free; `details` says what to change.
    """
    from memupdate.training.loop import Means
    from memupdate.training.lower_layers import CacheBounds

    section = session.policy.resources
    lengths = [(example.length, len(example.target_ids)) for example in examples]
    free = _free_beside(session)
    load = _load(session, lengths, on_gpu=session.base.device.type == "cuda")
    load, estimate = _choose(session, rank, load, free, is_loaded=True)
    if free is not None and section.memory_share and estimate.beside_weights > free * section.memory_share:
        # The base model is loaded already: what is free then comes on top of it.
        fitting = int(free * section.memory_share) + estimate.total - estimate.beside_weights
        hints = mending(session.folder.config, session.shape, rank, load, fitting)
        raise UsageError(
            f"training would take {_size(estimate.beside_weights)} beside the base model, and {_size(free)} are free",
            "change one of these" if hints else "take a machine with more memory, or a smaller base model",
            (*_parts(estimate), *hints),
        )
    bounds = CacheBounds(section.cache_memory_mib * _MIB, section.cache_file_mib * _MIB, session.layout.cache)
    return Means(bounds, load.recompute)


def room_line(session: Session, plan: Plan, facts: Iterable[Fact]) -> str:
    """What a plan says of memory: the need by parts, and what is free where that can be seen. Torch-free."""
    session = session.with_placement(plan.placement)
    on_gpu = shutil.which("nvidia-smi") is not None
    longest = sorted(facts, key=lambda fact: -len(fact.prompt) - len(fact.target))[:_LOOKED_AT]
    count = session.folder.count_tokens
    lengths = [(count(f.prompt) + count(f.target) + _TEMPLATE_TOKENS, count(f.target) + 1) for f in longest]
    load = replace(_load(session, lengths, on_gpu=on_gpu), cached_tokens=plan.target_tokens_live * 4)
    free = _free_on_gpu() if on_gpu else free_bytes()
    load, estimate = _choose(session, plan.rank, load, free, is_loaded=False)
    told = f"training takes about {_size(estimate.total)} of memory ({', '.join(_parts(estimate))})"
    if load.recompute:
        told += ", with gradient checkpointing"
    if free is None:
        return told
    fits = not session.policy.resources.memory_share or estimate.total <= free * session.policy.resources.memory_share
    return f"{told}; {_size(free)} are free" + ("" if fits else ": `add` will refuse, and say what to change")


def free_bytes() -> int | None:
    """What this process may still take of the host's memory: its container's bound counts too. None where it cannot be seen."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        bound = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return min(free, bound - used + int(stat["inactive_file"]))
    except (OSError, KeyError, ValueError):  # no bound: the file says "max"
        return free


def _choose(
    session: Session, rank: int, load: TrainingLoad, free: int | None, *, is_loaded: bool
) -> tuple[TrainingLoad, MemoryEstimate]:
    """The load with checkpointing as the policy says, by default where it does not fit without; and its estimate.

    Args:
        free: bytes; None where it cannot be seen.
        is_loaded: the base model is in memory already, and `free` is what is left beside it.
    """
    section, config = session.policy.resources, session.folder.config
    plain = estimate_memory(config, session.shape, rank, load)
    need = plain.beside_weights if is_loaded else plain.total
    too_much = free is not None and section.memory_share > 0 and need > free * section.memory_share
    if section.checkpointing == "always" or (section.checkpointing == "auto" and too_much):
        load = replace(load, recompute=True)
    return load, estimate_memory(config, session.shape, rank, load)


def _load(session: Session, lengths: Sequence[tuple[int, int]], *, on_gpu: bool) -> TrainingLoad:
    launch = current_launch()
    training, guard, section = session.policy.training, session.policy.guard, session.policy.resources
    dtype = training.dtype if training.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    anchors = (guard.anchors + guard.holdout) * guard.anchor_tokens if guard.enabled else 0
    return TrainingLoad(
        batch_size=min(training.batch_size, len(lengths)), longest_tokens=max((n for n, _ in lengths), default=0),
        longest_target_tokens=max((n for _, n in lengths), default=0),
        anchors_per_step=guard.anchors_per_step if guard.enabled else 0, anchor_tokens=guard.anchor_tokens,
        train_basis=session.policy.memory.train_basis, dtype=dtype, quantization=section.quantization,
        shards=launch.size if launch and section.sharding == "fsdp" else 1,
        cached_tokens=sum(n for n, _ in lengths) + anchors, cache_limit_bytes=section.cache_memory_mib * _MIB, on_gpu=on_gpu,
    )  # fmt: skip


def _free_beside(session: Session) -> int | None:
    """What is free where the base model, which is loaded, has its weights."""
    if session.base.device.type != "cuda":
        return free_bytes()
    import torch

    # What torch has set aside and does not use is free to us too.
    idle = torch.cuda.memory_reserved(session.base.device) - torch.cuda.memory_allocated(session.base.device)
    return int(torch.cuda.mem_get_info(session.base.device)[0]) + int(idle)


def _free_on_gpu() -> int | None:
    """Of the first GPU, as its driver says."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return int(done.stdout.splitlines()[0]) * _MIB
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def _parts(estimate: MemoryEstimate) -> tuple[str, ...]:
    parts = ("weights", "adapter", "activations", "logits", "cache")
    return tuple(f"{name} {_size(getattr(estimate, name))}" for name in parts)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / _MIB:,.0f} MiB"
