"""`memupdate bench`: a published editing data set through the real `add`, and the field's table of what came of it.

Nothing here trains or proves by itself: edits go through `Workspace.add` in a workspace of their own, under the policy given, whose
gates decide what is released. What is measured is the memory that the last batch wrote, also where the gates refused it; the report says
which.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memupdate.benchmarking.fluency import mean_entropy
from memupdate.benchmarking.questions import KINDS, BenchQuestion, bench_questions
from memupdate.benchmarking.report import BenchBatch, BenchReport, Fluency
from memupdate.benchmarking.scores import Outcome, measure_rows
from memupdate.errors import MemupdateError, OverBudget, ProofFailed, UsageError
from memupdate.facts.files import FactsFile, Problem
from memupdate.facts.formats import native_record
from memupdate.facts.model import Fact
from memupdate.facts.reader import collect_facts
from memupdate.facts.sources import refuse_what_is_no_file
from memupdate.operations.session import Session
from memupdate.operations.updating import BatchRun
from memupdate.operations.workspace import Workspace
from memupdate.progress import Progress, ProgressEvent, no_progress
from memupdate.storage import write_text_atomic

if TYPE_CHECKING:
    from memupdate.training.memory import Memory

COLLECTION = "bench"
_OVERRIDES = {"proof.publish": "proved"}
"""A fact that is not stored is an edit that failed, and counts as one, instead of holding back the others."""
_FLUENCY_TEXTS = 32
_SHOWN = 5
"""Lines of each kind in the report's messages; counts are whole."""


@dataclass(frozen=True)
class BenchWish:
    """What is to be run."""

    model: str
    """A folder, a hub repository, or `atlas`."""
    policy: str | None = None
    """A shipped policy or a file; None: the model's usual one."""
    limit: int | None = None
    """The first so many edits of the file; None: all."""
    edits_per_batch: int | None = None
    """Edits of one `add`, one after the other into the same memory; None: all at once."""
    augment: bool = False
    """Train the policy's share of each edit's wordings, and measure generalization on the others; by default none is trained."""
    format: str | None = None
    """Of the records, where it is not to be detected."""
    keep: Path | None = None
    """A folder for the workspace; by default a temporary one."""


def run_bench(file: Path | str, wish: BenchWish, *, progress: Progress = no_progress) -> BenchReport:
    """Measure the unedited model, write the edits through `add`, measure again.

    Raises:
        FactsError: the file cannot be read, or no record of it is an edit.
        UsageError: numbers below 1, or `keep` is in use.
        OverBudget: no rank within the policy holds the first batch.
        ModelError, PolicyError, TrainingError: as in `Workspace.init` and `Workspace.add`.
    """
    for name, number in (("--limit", wish.limit), ("--edits-per-batch", wish.edits_per_batch)):
        if number is not None and number < 1:
            raise UsageError(f"{name} {number}: nothing would be edited", "give 1 or more")
    refuse_what_is_no_file(Path(file))  # before anything is made
    with _folder(wish.keep) as root:
        Workspace.init(root, model=wish.model, policy=wish.policy, collection=COLLECTION)
        return _Bench(Workspace(root, overrides=_OVERRIDES), Path(file), wish, progress).run()


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield Path(keep)
        return
    with tempfile.TemporaryDirectory(prefix="memupdate-bench-") as folder:
        yield Path(folder) / "workspace"


class _Bench:
    """One run."""

    def __init__(self, workspace: Workspace, file: Path, wish: BenchWish, progress: Progress) -> None:
        self.workspace, self.wish, self.progress = workspace, wish, progress
        self.session: Session = workspace.session
        self.source: FactsFile = collect_facts(self.session.fact_stream(file, format=wish.format), skip_invalid=True)
        self.facts = [located.fact for located in self.source.facts][: wish.limit]
        self.started = time.monotonic()

    def run(self) -> BenchReport:
        """All of it."""
        from memupdate.benchmarking.looking import FLUENCY_TOKENS, with_own_answers

        base = self.session.base
        asked = bench_questions(self.session.renderer, self.facts, self.held_out)
        questions = with_own_answers(base, asked, self.progress)
        texts = min(_FLUENCY_TEXTS, len(self.facts))
        changing = [
            question for question in questions if question.kind != "specificity"
        ]  # of the others this is the yardstick
        before, fluent_before = self.look(base.model, changing, texts)
        batches = self.write()
        after, fluent_after = self.look_with(self.last_memory(), questions, texts)
        rows = measure_rows(KINDS, zip(changing, before, strict=True), zip(questions, after, strict=True))
        proved = [i for i, q in enumerate(questions) if q.kind == "efficacy" and after[i].proved]
        broken = [i for i in proved if after[i].judged != "exact"]
        source, wish = self.source, self.wish
        left_out = {problem.line for problem in self.left_out()}
        return BenchReport(
            file=source.path, format=source.format, sha256=source.sha256, model=self.session.config.model,
            policy=self.session.policy.name, edits=len(self.facts), left_out=len(left_out),
            edits_per_batch=wish.edits_per_batch, augmented=wish.augment, batches=tuple(batches),
            measures=rows,
            fluency=Fluency(texts, FLUENCY_TOKENS, fluent_before, fluent_after), edits_proved=len(proved),
            proved_not_generated=len(broken), workspace=str(wish.keep) if wish.keep else None,
            duration_s=time.monotonic() - self.started, messages=tuple(self.messages(questions, after, broken, batches)),
        )  # fmt: skip

    def held_out(self, fact: Fact) -> Sequence[str]:
        """Wordings that are not trained on."""
        trained, _ = self.session.phrasings(self.taught(fact))
        return [wording for wording in fact.paraphrases if wording not in trained]

    def taught(self, fact: Fact) -> Fact:
        """What is given to `add`: without the wordings that must not be trained on, whatever the policy's share."""
        return fact if self.wish.augment else replace(fact, paraphrases=())

    def write(self) -> list[BenchBatch]:
        """The edits, batch by batch; ends early where no further batch fits."""
        size = self.wish.edits_per_batch or len(self.facts)
        batches: list[BenchBatch] = []
        for start in range(0, len(self.facts), size):
            chosen = self.facts[start : start + size]
            file = self.workspace.root / f"edits-{start + 1}.jsonl"
            lines = [json.dumps(native_record(self.taught(fact)), ensure_ascii=False) for fact in chosen]
            write_text_atomic(file, "\n".join(lines) + "\n")
            self.progress(ProgressEvent("bench", start, len(self.facts), f"edits {start + 1} to {start + len(chosen)}"))
            started = time.monotonic()
            try:
                batches.append(self.add(file, len(chosen), started))
            except OverBudget as error:
                if not batches:
                    raise
                batches.append(_refused(len(chosen), error, time.monotonic() - started))
                break
        return batches

    def add(self, file: Path, edits: int, started: float) -> BenchBatch:
        """One batch, released or refused by the gates."""
        try:
            report = self.workspace.add(file, publish=False, progress=self.progress)
        except ProofFailed as error:
            return replace(_refused(edits, error, time.monotonic() - started), rank=self.last_memory().rank)
        return BenchBatch(
            edits=edits, release=report.release, rank=report.rank or 0, facts_proved=report.facts_proved, facts_total=report.facts_total,
            probes_unchanged_share=report.probes_unchanged_share, kl_nats=report.kl_nats, refused=(), duration_s=report.duration_s,
        )  # fmt: skip

    def last_memory(self) -> Memory:
        """What the last batch that was trained wrote, released or not."""
        from memupdate.training.memory import load_adapter

        with self.workspace.reader() as ledger:
            batch = ledger.batches()[-1]
            if batch.release is not None:
                return load_adapter(self.workspace.root / ledger.release(batch.release).relative_path)
            return BatchRun(self.session, ledger, batch.id, self.progress).memory()

    def look_with(self, memory: Memory, questions: Sequence[BenchQuestion], texts: int) -> tuple[list[Outcome], float]:
        """`look`, with a memory attached for the time."""
        from memupdate.training.memory import attach, detach

        base = self.session.base
        model = attach(base.model, memory)
        try:
            return self.look(model, questions, texts)
        finally:
            base.model = detach(model)

    def look(self, model: Any, questions: Sequence[BenchQuestion], texts: int) -> tuple[list[Outcome], float]:
        """Outcomes of all questions, and the entropy of continuations of the first `texts` edits' prompts."""
        from memupdate.benchmarking.looking import FLUENCY_TOKENS, continuations, look

        base, policy = self.session.base, self.session.policy
        outcomes = look(base, model, questions, self.progress, min_probability=policy.proof.min_probability)
        prompts = [q.example.prompt_ids for q in questions if q.kind == "efficacy"][:texts]
        written = continuations(base, model, prompts, tokens=FLUENCY_TOKENS, seed=policy.training.seed)
        return outcomes, mean_entropy(written)

    def left_out(self) -> list[Problem]:
        """What was passed over up to the last edit taken."""
        if len(self.facts) == len(self.source.facts):
            return list(self.source.skipped)
        last = self.source.facts[len(self.facts) - 1].line
        return [problem for problem in self.source.skipped if problem.line <= last]

    def messages(
        self,
        questions: Sequence[BenchQuestion],
        after: Sequence[Outcome],
        broken: Sequence[int],
        batches: Sequence[BenchBatch],
    ) -> list[str]:
        """What a reader of the table must know."""
        lines = []
        if batches[-1].release is None:
            lines.append(
                "the policy refused the last batch; what is measured is the memory that it was not released with"
            )
        lines += [f"left out: {problem.describe(self.source.path)}" for problem in self.left_out()[:_SHOWN]]
        for index in broken[:_SHOWN]:
            example = questions[index].example
            lines.append(
                f"proved, but not generated: {example.prompt!r} → {example.answer!r}: {after[index].answer!r} came out"
            )
        return lines


def _refused(edits: int, error: MemupdateError, duration_s: float) -> BenchBatch:
    """A batch that was not released, and why."""
    return BenchBatch(
        edits=edits, release=None, rank=0, facts_proved=0, facts_total=0, probes_unchanged_share=None, kl_nats=None,
        refused=(error.message,), duration_s=duration_s,
    )  # fmt: skip
