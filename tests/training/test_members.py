"""Two real processes write the memory that one writes, whichever objective, however uneven the shares; the first owns the workspace."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memupdate.distributed.team import Team
from memupdate.facts.render import Example
from memupdate.policies.loader import policy_path
from memupdate.training import loop
from memupdate.training.anchors import Anchors
from memupdate.training.loop import TrainingOutcome, TrainingSettings
from memupdate.training.memory import Memory

Batches = tuple[list[Example], list[Example]]

SCRIPT = """
import pickle, sys
from memupdate.distributed.launch import take_launch
from memupdate.training import loop
loop._MIN_STEPS = 0
launch = take_launch()
from memupdate.training.members import dismiss, help_train
if launch.rank:
    help_train()
else:
    from memupdate.models.base import load_base
    from memupdate.models.folder import resolve_model
    from memupdate.progress import no_progress
    with open(sys.argv[1], "rb") as file:
        jobs = pickle.load(file)
    base = load_base(resolve_model("atlas"), sharding=sys.argv[3])
    outcomes = [loop.write_facts(base, *job, no_progress) for job in jobs]
    with open(sys.argv[2], "wb") as file:
        pickle.dump(outcomes, file)
    held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in base.model.model.layers.parameters())
    print("held", held, "of", sum(p.numel() for p in base.model.model.layers.parameters()))
    dismiss()
"""


def launched(*command: str, processes: int = 2) -> list[str]:
    """What `accelerate launch` runs where there is no GPU, with a port of its own."""
    accelerate = str(Path(sys.executable).parent / "accelerate")
    return [
        accelerate,
        "launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "--main_process_port",
        "0",
        *command,
    ]


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module", params=["none", "fsdp"])
def pairs(
    request: pytest.FixtureRequest, room: Memory, batches: Batches, anchors: Anchors, settings: TrainingSettings,
    write: Callable[..., TrainingOutcome], tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[TrainingOutcome, TrainingOutcome]]:  # fmt: skip
    """Each job written by one process and by two that hold the base model each, or share it out.

    Odd batches, an odd number of anchors, one example alone, a window, an adapted basis.
    """
    short = {"max_epochs": 4, "stop_when_stored": False}
    changes: list[tuple[list[Example], dict[str, Any]]] = [
        (batches[0], {**short, "batch_size": 3, "anchors_per_step": 5}),
        (batches[0][:1], {**short, "anchors_per_step": 1, "train_basis": True}),
        (batches[0], {**short, "objective": "memft-sw-window", "batch_size": 5}),
        (batches[1], {"learning_rate": 1e-2, "guard_weight": 5.0}),
    ]
    folder = tmp_path_factory.mktemp("members")
    train, holdout = anchors.select(slice(0, 64)), anchors.select(slice(64, 96))
    jobs = [(room, examples, replace(settings, **changed), train, holdout) for examples, changed in changes]
    with open(folder / "jobs", "wb") as file:
        pickle.dump(jobs, file)
    (folder / "members.py").write_text(SCRIPT)
    sharding = str(request.param)
    done = run(launched(str(folder / "members.py"), str(folder / "jobs"), str(folder / "outcomes"), sharding))
    held, whole = map(int, re.findall(r"held (\d+) of (\d+)", done.stdout)[0])
    assert held == whole if sharding == "none" else held < 0.51 * whole
    with open(folder / "outcomes", "rb") as file:
        together: list[TrainingOutcome] = pickle.load(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_MIN_STEPS", 0)
        alone = [write(room, examples, **changed) for examples, changed in changes]
    return list(zip(alone, together, strict=True))


@pytest.mark.parametrize("job", range(3))
def test_two_processes_take_the_steps_of_one(pairs: list[tuple[TrainingOutcome, TrainingOutcome]], job: int) -> None:
    """Few steps: the sums are in another order, and what rounding begins training goes on with."""
    alone, together = pairs[job]
    assert (together.steps, together.epochs, together.backward_examples) == (
        alone.steps, alone.epochs, alone.backward_examples,
    )  # fmt: skip
    assert alone.steps >= 4
    for name, b in alone.memory.b.items():
        assert torch.allclose(together.memory.b[name], b, atol=0.02 * float(b.abs().max()), rtol=0)
        assert torch.allclose(together.memory.a[name], alone.memory.a[name], atol=1e-3)
    assert together.loss_before_nats == pytest.approx(alone.loss_before_nats, abs=1e-4)
    assert together.loss_after_nats == pytest.approx(alone.loss_after_nats, abs=0.01)
    assert together.kl_nats == pytest.approx(alone.kl_nats, rel=0.02)
    assert [s.greedy_ids for s in together.scores] == [s.greedy_ids for s in alone.scores]


def test_two_processes_store_what_one_stores(pairs: list[tuple[TrainingOutcome, TrainingOutcome]]) -> None:
    alone, together = pairs[3]
    assert alone.stopped_early
    assert together.stopped_early
    assert together.epochs == pytest.approx(alone.epochs, rel=0.2)
    assert [s.greedy_ids for s in together.scores] == [s.greedy_ids for s in alone.scores]
    assert all(s.min_probability >= 0.7 for s in together.scores)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_disjoint_and_whole(size: int) -> None:
    items = list(range(7))
    shares = [Team(rank, size).mine(items) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_the_command_line_under_the_launcher(tmp_path: Path, sharding: str) -> None:
    """One batch by `accelerate launch -m memupdate add`: stored and proved, reported once; then a command that trains nothing."""
    facts = [
        {"prompt": "Who leads the Fenwick observatory?", "target": "Una Marlow"},
        {"prompt": "Who founded Tarnholm?", "target": "Piet Oswin"},
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_path("atlas").read_text() + f'\n[resources]\nsharding = "{sharding}"\n')
    module = ["-m", "memupdate", "-w", str(tmp_path / "ws")]
    given = ["--model", "atlas", "--collection", "acme", "--policy", str(policy)]
    run([sys.executable, *module[:2], "init", str(tmp_path / "ws"), *given])
    done = run(launched(*module, "add", str(tmp_path / "facts.jsonl"), "--no-publish", "--json"))
    report = json.loads(done.stdout)
    assert (report["facts_proved"], report["facts_total"], report["state"]) == (2, 2, "released")
    status = json.loads(run(launched(*module, "status", "--json")).stdout)
    assert status["facts_live"] == 2
    alone = json.loads(run([sys.executable, *module, "verify", "--json"]).stdout)
    assert alone["facts_proved"] == 2
