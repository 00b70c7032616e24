"""The demo: the main job on the embedded base model, with real vLLM, in a temporary workspace; measured, not told."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from memupdate.errors import EngineError, MemupdateError, UsageError
from memupdate.facts.model import Fact
from memupdate.facts.reader import read_facts
from memupdate.models.folder import EMBEDDED_MODEL
from memupdate.operations.reports import AddReport, Report
from memupdate.operations.workspace import Workspace
from memupdate.progress import Progress, ProgressEvent, no_progress
from memupdate.resources import resource_dir
from memupdate.serving.client import EngineClient

COLLECTION = "acme"
NEWS = ("news-1.jsonl", "news-2.jsonl")
_ANSWER_TOKENS = 32
T = TypeVar("T")


@dataclass(frozen=True)
class DemoBatch(Report):
    """One `add` of the demo."""

    file: str
    facts: int
    release: str
    rank: int
    placement: str
    target_tokens: int
    """Live target tokens that the memory holds after this batch."""
    predicted_loss_nats: float
    predicted_loss_low: float
    predicted_loss_high: float
    measured_loss_nats: float
    bits_per_parameter: float
    facts_proved: int
    facts_total: int
    facts_proved_served: int
    generated_served: int
    probes_unchanged_share: float
    attempts: int
    duration_s: float


@dataclass(frozen=True)
class Question(Report):
    """One chat question over HTTP, before and after."""

    when: str
    prompt: str
    answer: str
    model: str
    """The response's `model` field."""


@dataclass(frozen=True)
class DemoReport(Report):
    """What the demo showed; keys as in the design."""

    facts_total: int
    facts_proved: int
    facts_proved_served: int
    batches: tuple[DemoBatch, ...]
    probes_unchanged_share: float
    """In the last release, against the base model."""
    probes: int
    alias: str
    release: str
    served_model_field: str
    """What the alias's response named while the last release was live."""
    rollback_ok: bool
    questions: tuple[Question, ...]
    workspace: str | None
    duration_s: float


def run_demo(*, keep: Path | None = None, progress: Progress = no_progress) -> DemoReport:
    """Two batches of news into the embedded model, each proved in process and on vLLM, an alias moved, a rollback.

    Args:
        keep: a folder for the workspace; by default a temporary one, removed at the end.

    Raises:
        MemupdateError: whatever went wrong; a demo that returns has shown all of it.
    """
    if keep is not None:
        return _run(Path(keep), progress, kept=True)
    with tempfile.TemporaryDirectory(prefix="memupdate-demo-") as folder:
        return _run(Path(folder) / "workspace", progress, kept=False)


def _run(root: Path, progress: Progress, *, kept: bool) -> DemoReport:
    started = time.monotonic()
    atlas = resource_dir(EMBEDDED_MODEL)
    workspace = Workspace.init(root, model=EMBEDDED_MODEL, collection=COLLECTION)
    changed, old, new = _changed_fact(atlas)
    questions: list[Question] = []
    with _engine_in_background(workspace, progress) as engine:
        first, first_s = _timed(lambda: workspace.add(atlas / NEWS[0], publish=False, progress=progress))
        url = engine()
        publication, publish_s = _timed(lambda: workspace.publish(first.release or "", progress=progress))
        questions.append(_ask(url, COLLECTION, changed.prompt, "after the first batch"))
        second, second_s = _timed(lambda: workspace.add(atlas / NEWS[1], progress=progress))
        questions.append(_ask(url, COLLECTION, changed.prompt, "after the second batch"))
        workspace.rollback()
        questions.append(_ask(url, COLLECTION, changed.prompt, "after the rollback"))
        progress(ProgressEvent("demo", 1, 1, "all shown; stopping the engine"))
    batches = (
        _batch(NEWS[0], replace(first, publication=publication), first_s + publish_s),
        _batch(NEWS[1], second, second_s),
    )
    answers = [q.answer for q in questions]
    return DemoReport(
        facts_total=batches[-1].facts_total, facts_proved=batches[-1].facts_proved, facts_proved_served=batches[-1].facts_proved_served,
        batches=batches, probes_unchanged_share=batches[-1].probes_unchanged_share, probes=second.probes, alias=COLLECTION,
        release=batches[-1].release, served_model_field=questions[1].model, rollback_ok=answers == [old, new, old],
        questions=tuple(questions), workspace=str(root) if kept else None, duration_s=time.monotonic() - started,
    )  # fmt: skip


@contextmanager
def _engine_in_background(workspace: Workspace, progress: Progress) -> Iterator[Callable[[], str]]:
    """Start vLLM while the first batch trains; yields a function that waits for it and returns its URL."""
    failure: list[MemupdateError] = []
    with workspace.engine_to_start() as engine:

        def start() -> None:
            try:
                engine.start(progress)
            except MemupdateError as error:
                failure.append(error)

        thread = threading.Thread(target=start, name="engine", daemon=True)
        thread.start()

        def url() -> str:
            thread.join()
            if failure:
                raise failure[0]
            return engine.url

        try:
            yield url
        finally:
            engine.stop()
            thread.join(timeout=30)


def _timed(step: Callable[[], T]) -> tuple[T, float]:
    """What `step` returned, and the seconds that it took."""
    started = time.monotonic()
    return step(), time.monotonic() - started


def _changed_fact(atlas: Path) -> tuple[Fact, str, str]:
    """A fact of the second batch that replaces one of the first: the fact, the old answer, the new one."""
    first = {located.fact.key: located.fact for located in read_facts(atlas / NEWS[0]).facts}
    for located in read_facts(atlas / NEWS[1]).facts:
        old = first.get(located.fact.key)
        if old is not None and old.target != located.fact.target:
            return located.fact, old.target, located.fact.target
    raise UsageError(f"{atlas}: no fact of {NEWS[1]} replaces one of {NEWS[0]}", "build the embedded model again")


def _ask(url: str, model: str, prompt: str, when: str) -> Question:
    """Ask as any client would: a chat completion for the alias."""
    with EngineClient(url) as client:
        answer = client.chat(model, [{"role": "user", "content": prompt}], _ANSWER_TOKENS)
    return Question(when, prompt, answer.text, answer.model)


def _batch(file: str, report: AddReport, duration_s: float) -> DemoBatch:
    plan, publication = report.plan, report.publication
    if plan is None or publication is None or report.measured_loss_nats is None or report.release is None:
        raise EngineError(f"{file}: the batch stopped at {report.state}", "; ".join(report.messages))
    rank = report.rank or plan.rank
    return DemoBatch(
        file=file, facts=report.facts_new, release=report.release, rank=rank, placement=plan.placement,
        target_tokens=plan.target_tokens_live, predicted_loss_nats=plan.predicted_loss_nats.mid,
        predicted_loss_low=plan.predicted_loss_nats.low, predicted_loss_high=plan.predicted_loss_nats.high,
        measured_loss_nats=report.measured_loss_nats, bits_per_parameter=plan.bits_per_parameter * plan.rank / rank,
        facts_proved=report.facts_proved, facts_total=report.facts_total, facts_proved_served=publication.facts_proved_served or 0,
        generated_served=publication.generated or 0, probes_unchanged_share=report.probes_unchanged_share or 0.0,
        attempts=report.attempts, duration_s=duration_s,
    )  # fmt: skip
