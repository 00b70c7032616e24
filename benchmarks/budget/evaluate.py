"""Plans against the ground truth, and what the law and a plan cost."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.budget.batches import HeldOutBatch
from benchmarks.budget.truth import LADDER, Run

from memupdate.errors import OverBudget
from memupdate.law.fit import LawFit
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.records import FactsDiff
from memupdate.operations.planning import Candidate, make_plan
from memupdate.operations.session import Session

MANY_FACTS = 100_000


@dataclass(frozen=True)
class Outcome:
    """One plan against what training showed."""

    batch: str
    kind: str
    facts: int
    target_tokens: int
    planned_rank: int | None
    """None: over budget by the plan."""
    needed_rank: int | None
    """The smallest rank that proved every fact within the harm budget; None where none did."""
    planned_rank_works: bool
    """The run at the planned rank, or where there is none a smaller rank that works (rank only helps)."""
    run_at_planned_rank: bool

    @property
    def within_one_step(self) -> bool:
        """The smallest rank that works is the planned one, or half or twice of it."""
        if self.planned_rank is None or self.needed_rank is None:
            return self.planned_rank == self.needed_rank
        return self.needed_rank / 2 <= self.planned_rank <= 2 * self.needed_rank


def plan_rank(session: Session, ledger: Ledger, fit: LawFit, batch: HeldOutBatch, *, measure: bool) -> int | None:
    """The rank that `add` (`measure`: the base model is asked) or `plan` (without torch) chooses for an empty memory."""
    diff = FactsDiff(batch.facts, (), ())
    try:
        return make_plan([Candidate(session, fit)], ledger, "budget", diff, live_before=[], measure=measure).rank
    except OverBudget:
        return None


def outcome_of(batch: HeldOutBatch, planned: int | None, runs: Sequence[Run]) -> Outcome:
    """What the runs of one batch say about its plan."""
    works = {run.rank: run.works for run in runs if run.batch == batch.name}
    needed = min((rank for rank, ok in works.items() if ok), default=None)
    sufficient = planned is None if needed is None else planned is not None and works.get(planned, planned >= needed)
    tokens = next((run.target_tokens for run in runs if run.batch == batch.name), 0)
    return Outcome(batch.name, batch.kind, len(batch.facts), tokens, planned, needed, sufficient, planned in works)


def is_measured(name: str, runs: Sequence[Run]) -> bool:
    """Whether the border of a batch is known: a rank that works, and a failure one step below it (or rank 1)."""
    works = {run.rank: run.works for run in runs if run.batch == name}
    needed = min((rank for rank, ok in works.items() if ok), default=None)
    if needed is None:
        return works.get(LADDER[-1]) is False
    return needed == LADDER[0] or works.get(needed // 2) is False


def plan_many_facts_s(root: Path) -> float:
    """Seconds that `memupdate plan` takes for 100,000 facts, start and reading included, in a process of its own.

    That there is room for them is not asked: over budget is an answer too.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "many.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            for number in range(MANY_FACTS):
                fact = {
                    "prompt": f"What is the code of part {number}?",
                    "target": f"K-{number * 7919 % MANY_FACTS:05d}",
                }
                lines.write(json.dumps(fact) + "\n")
        started = time.monotonic()
        command = [sys.executable, "-m", "memupdate", "-w", str(root), "plan", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - started
    if done.returncode not in (0, 4):
        raise RuntimeError(f"plan ended with {done.returncode}: {done.stderr[-500:]}")
    return seconds


def outcome_rows(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """As JSON."""
    return [{**asdict(outcome), "within_one_step": outcome.within_one_step} for outcome in outcomes]
