"""Twenty batches in a row on one collection: what is left of the earlier ones, and of what the base model knew.

Invariant: `memupdate` itself writes the first line of batches (`Workspace.add`, each batch planned, trained, proved and released), under
the embedded model's policy with one value changed: as many probes must answer as before as the study's goal asks for. The contrasts
write the same batches at the same ranks with the same trainer and the same number of attempts, without guard or without replay.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.training.lab import Lab, world_facts
from benchmarks.training.store import Row, Store, code_of_ours

from memupdate import Workspace
from memupdate.errors import OverBudget, ProofFailed
from memupdate.facts.model import Fact
from memupdate.operations.proving import prove_memory
from memupdate.operations.session import Session
from memupdate.policies.loader import policy_path
from memupdate.progress import no_progress
from memupdate.training.loop import write_facts
from memupdate.training.memory import Memory, empty_memory, grow, load_adapter

STUDY = "forgetting"
SEED = 7100


@dataclass(frozen=True)
class Line:
    """One line of batches."""

    how: str
    """One of `HOWS`."""
    batches: int
    facts_a_batch: int
    kept: float
    """`proof.min_probes_unchanged` of the first line: with less, `add` goes on training, takes more rank, or refuses."""


FULL, QUICK = (20, 10), (3, 4)
KEPT = 0.98
LOOKS = (1, 2, 5, 10, 15, 20)
"""Batches after which everything is asked, beside the last; a release of `memupdate` is proved by itself after each."""
_COLUMNS = ("batch", "facts", "proved", "older", "older_proved", "known_kept", "kl_nats")
"""One value of each at every look; older facts are those of the batches before."""
HOWS = ("memupdate", "no guard", "no replay")


def run(lab: Lab, store: Store, sizes: tuple[int, int]) -> None:
    """Measure what is missing."""
    ours = Line(HOWS[0], *sizes, KEPT)
    ranks = store.get_or(STUDY, asdict(ours), code_of_ours(), lambda: _through_workspace(ours))["ranks"]
    for how in HOWS[1:]:
        line = replace(ours, how=how)
        store.get_or(STUDY, asdict(line), code_of_ours(), lambda line=line: _contrast(lab.session, line, ranks))


def found(store: Store, how: str, sizes: tuple[int, int]) -> Row | None:
    """A line's row, if it is measured."""
    return store.get(STUDY, asdict(Line(how, *sizes, KEPT)), code_of_ours())


def batches_of(line: Line) -> list[list[Fact]]:
    """The batches: facts of a world of their own, none twice."""
    facts, size = world_facts(line.batches * line.facts_a_batch, seed=SEED), line.facts_a_batch
    return [facts[start : start + size] for start in range(0, len(facts), size)]


def _through_workspace(line: Line) -> Row:
    """`add --no-publish`, batch after batch; at each look the release is read back from its file and proved again."""
    row = _empty_row()
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "policy.toml"
        policy.write_text(f"{policy_path('atlas').read_text()}\n[proof]\nmin_probes_unchanged = {line.kept}\n")
        workspace = Workspace.init(Path(folder) / "workspace", model="atlas", policy=str(policy))
        written: list[Fact] = []
        for number, batch in enumerate(batches_of(line), start=1):
            file = Path(folder) / f"batch-{number}.jsonl"
            lines = [
                {"prompt": f.prompt, "target": f.target, "subject": f.subject, "relation": f.relation} for f in batch
            ]
            file.write_text("".join(json.dumps(entry) + "\n" for entry in lines), encoding="utf-8")
            try:
                report = workspace.add(file, publish=False)
            except (ProofFailed, OverBudget) as refusal:
                row["refused"] = f"batch {number}: {refusal.message}"
                break
            written += batch
            assert report.release is not None
            memory = load_adapter(workspace.session.layout.registry.release(report.release))
            row["complete"] += report.facts_proved == report.facts_total
            _look_if_due(workspace.session, memory, line, number, written, report.duration_s, row)
    return row


def _contrast(session: Session, line: Line, ranks: Sequence[int]) -> Row:
    policy, guard = session.policy, session.guard(no_progress)
    guarded, replays = line.how == "no replay", line.how == "no guard"
    anchors, holdout = (guard.train, guard.holdout) if guarded else (None, None)
    row, written, memory = _empty_row(), [], empty_memory(session.shape)
    last = ranks[-1] if ranks else policy.memory.min_rank
    planned = [
        *ranks,
        *[last] * (line.batches - len(ranks)),
    ]  # where memupdate refused to go on, at the rank that it had
    for number, (batch, rank) in enumerate(zip(batches_of(line), planned, strict=True), start=1):
        written += batch
        started = time.monotonic()
        memory = grow(memory, rank, seed=session.basis_seed("training"), scale=policy.memory.scale)
        examples = session.training_examples(written if replays else batch)
        settings = session.training_settings()
        if not guarded:
            settings = replace(settings, guard_weight=0.0)
        for _ in range(policy.escalation.attempts):
            outcome = write_facts(session.base, memory, examples, settings, anchors, holdout, no_progress)
            memory = outcome.memory
            if all(score.min_probability >= settings.threshold for score in outcome.scores):
                break
        _look_if_due(session, memory, line, number, written, time.monotonic() - started, row)
    return row


def _empty_row() -> Row:
    return {"ranks": [], "duration_s": [], "complete": 0, **{name: [] for name in _COLUMNS}}


def _look_if_due(
    session: Session, memory: Memory, line: Line, number: int, written: Sequence[Fact], duration_s: float, row: Row
) -> None:
    """Note what the batch took; prove all facts so far and ask the probes where it is one to look after."""
    row["ranks"].append(memory.rank)
    row["duration_s"].append(round(duration_s, 2))
    if number not in LOOKS and number != line.batches:
        return
    proof, older = prove_memory(session, memory, written, no_progress), len(written) - line.facts_a_batch
    older_proved = sum(p.proved for p in proof.facts[:older])
    values = (number, len(written), proof.proved, older, older_proved, proof.locality.share, proof.kl_nats)
    for name, value in zip(_COLUMNS, values, strict=True):
        row[name].append(value)
    print(f"  rank {memory.rank}, " + ", ".join(f"{name} {row[name][-1]}" for name in _COLUMNS), flush=True)
