"""Why a release answers one question as it does: token by token, what is said instead, what competes with it, and what would help.

Competitors are found in the ledger: facts whose answer is the one that came out, and facts asked in nearly the same words, by the share of
words that two prompts have in common. Nothing is changed, and nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memupdate.budget.plan import plan_from_json
from memupdate.errors import UsageError
from memupdate.facts.model import Fact, normalise
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.measures import MeasureRecord, TokenRecord
from memupdate.ledger.records import FactDetail, FactStatus
from memupdate.operations.publishing import release_memory
from memupdate.operations.reports import Report
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent
from memupdate.verification.questions import OTHER_WORDINGS

if TYPE_CHECKING:
    from memupdate.training.memory import Memory

_NEAR = 0.5
"""Share of common words from which two prompts count as nearly the same."""
_COMPETITORS = 5


@dataclass(frozen=True)
class Competitor(Report):
    """A fact that pulls at another one's answer."""

    fact: str
    """Its id."""
    prompt: str
    target: str
    is_live: bool
    """False where it was superseded or retracted: its answer may still be in the weights."""
    answers_so: bool
    """Whether its answer is the one that came out."""
    words_in_common: float
    """Of both prompts' words, 0 to 1."""


@dataclass(frozen=True)
class AnswerExplanation(Report):
    """One fact in one memory, looked at closely."""

    release: str
    """The release, or the failed batch whose memory was kept."""
    status: FactStatus
    """What became of the fact."""
    fact: str
    prompt: str
    target: str
    proved: bool
    says: str
    """What greedy decoding gives to the fact's own prompt."""
    tokens: tuple[TokenRecord, ...]
    competitors: tuple[Competitor, ...]
    measures: tuple[MeasureRecord, ...]
    """Other questions that the newest verification asked of it."""
    advice: tuple[str, ...]


def explain_answer(
    session: Session, ledger: Ledger, fact_id: str, *, release: str | None, progress: Progress
) -> AnswerExplanation:
    """Look at one fact in the memory of a release, or in that of the failed batch that was to bring it.

    Args:
        fact_id: the beginning of its id.
        release: None for the failed batch, where the newest that brought the fact failed and left its slice, else for the newest release.

    Raises:
        LedgerError: no fact's id begins so, or several do; no such release.
        UsageError: it was taught to no memory that is there, or files or the base model are not what they were.
    """
    from memupdate.training.memory import attach, detach
    from memupdate.verification.asking import greedy_answer, look_at_tokens
    from memupdate.verification.inprocess import prove_recall

    detail = ledger.fact(fact_id)
    fact, seen = detail.fact, _where(session, ledger, detail, release)
    base, example = session.base, session.renderer.render(fact)
    progress(ProgressEvent("explain", 0, 1, f"{seen.name}: {fact.prompt}"))
    model = attach(base.model, seen.memory)
    try:
        threshold = session.policy.proof.min_probability
        (proof,), _ = prove_recall(base, model, [example], min_probability=threshold)
        (views,) = look_at_tokens(base, model, [example])
        says = greedy_answer(base, model, example, progress)
    finally:
        base.model = detach(model)
    tokens = tuple(
        TokenRecord(seen.name, fact.id, i, v.token, v.probability, v.best_token, v.best_probability)
        for i, v in enumerate(views)
    )
    competitors = find_competitors(fact, says, seen.live, seen.dead)
    measures = tuple(ledger.measures(seen.name, "in-process", fact=fact.id))
    help_ = _advice(session, seen, fact, proof.proved, tokens, competitors, measures)
    return AnswerExplanation(
        release=seen.name, status=seen.status, fact=fact.id, prompt=fact.prompt, target=fact.target, proved=proof.proved, says=says,
        tokens=tokens, competitors=competitors, measures=measures, advice=tuple(help_),
    )  # fmt: skip


@dataclass(frozen=True)
class _Seen:
    """The memory that is looked at, and what belongs to it."""

    name: str
    collection: str
    memory: Memory
    status: FactStatus
    live: Sequence[Fact]
    dead: Sequence[Fact]


def _where(session: Session, ledger: Ledger, detail: FactDetail, release: str | None) -> _Seen:
    """Raises UsageError where the fact was taught to none."""
    if not detail.history:
        raise UsageError(f"{detail.fact.prompt!r} was told, but not taught", "`memupdate facts explain` says why")
    if release is None and (last := detail.history[-1]).batch_state == "failed" and ledger.slice(last.batch):
        live = ledger.live_facts(last.collection, with_batch=last.batch)
        dead = ledger.superseded_facts(last.collection, with_batch=last.batch)
        memory = kept_memory(session, ledger, last.batch)
        return _Seen(f"batch {last.batch} (failed)", last.collection, memory, last.status, live, dead)
    record = ledger.latest_release(detail.history[-1].collection) if release is None else ledger.release(release)
    taught = [
        entry
        for entry in detail.history
        if record is not None
        and entry.collection == record.collection
        and (entry.version or record.version + 1) <= record.version
    ]
    if record is None or not taught:
        name = release or f"any release of {detail.history[-1].collection}"
        raise UsageError(
            f"{detail.fact.prompt!r} → {detail.fact.target!r} was not taught to {name}",
            f"`memupdate facts explain {detail.fact.id[:19]}` says what became of it",
        )
    collection, version = record.collection, record.version
    live = ledger.live_facts(collection, as_of_version=version)
    dead = ledger.superseded_facts(collection, as_of_version=version)
    return _Seen(record.name, collection, release_memory(session, record), taught[-1].status, live, dead)


def kept_memory(session: Session, ledger: Ledger, batch: int) -> Memory:
    """The memory that a failed batch trained, from the release that it began with and the slice that it left.

    Raises:
        UsageError: files or the base model are not what they were.
    """
    from memupdate.training.memory import apply_slice, empty_memory, load_slice

    slice_, record = ledger.slice(batch), ledger.batch(batch)
    assert slice_ is not None  # the caller has looked
    earlier = [
        release
        for release in ledger.releases(record.collection, failed=False)
        if release.created_at_utc < slice_.created_at_utc
    ]
    if record.kind == "compact" or not earlier:
        plan = plan_from_json(record.plan_json or "")
        parent = empty_memory(session.with_placement(plan.placement).shape)
    else:
        parent = release_memory(session, earlier[-1])
    folder = session.root / slice_.relative_path
    if not folder.is_dir():
        raise UsageError(f"{folder}: the slice is not there", "restore the workspace from a backup")
    return apply_slice(parent, load_slice(folder))


def find_competitors(fact: Fact, says: str, live: Sequence[Fact], dead: Sequence[Fact]) -> tuple[Competitor, ...]:
    """Facts whose answer is `says`, nearest wording first, then live ones that are asked almost as `fact` is."""
    said = normalise(says) if normalise(says) != normalise(fact.target) else None
    found = []
    for others, is_live in ((live, True), (dead, False)):
        for other in others:
            if other.id == fact.id or normalise(other.target) == normalise(fact.target):
                continue
            answers_so, common = normalise(other.target) == said, words_in_common(fact.prompt, other.prompt)
            if answers_so or (is_live and common >= _NEAR):
                found.append(Competitor(other.id, other.prompt, other.target, is_live, answers_so, round(common, 3)))
    found.sort(key=lambda c: (-c.answers_so, -c.words_in_common, c.fact))
    return tuple(found[:_COMPETITORS])


def words_in_common(first: str, second: str) -> float:
    """Words that both have over words that either has, 0 to 1."""
    one, other = set(normalise(first).split()), set(normalise(second).split())
    return len(one & other) / len(one | other) if one | other else 1.0


def _advice(
    session: Session,
    seen: _Seen,
    fact: Fact,
    proved: bool,
    tokens: Sequence[TokenRecord],
    competitors: Sequence[Competitor],
    measures: Sequence[MeasureRecord],
) -> list[str]:
    policy, lines = session.policy, []
    right = all(t.token == t.best_token for t in tokens)
    old = [c for c in competitors if c.answers_so and not c.is_live]
    near = [c for c in competitors if c.is_live and c.words_in_common >= _NEAR]
    if not proved and right:
        lines.append("it comes out, but not surely: raise training.margin or training.max_epochs")
    if not proved and old:
        lines.append(
            f"an answer that it replaced still comes out ({old[0].target!r}): more training.max_epochs or escalation.attempts, or "
            f"`memupdate compact -c {seen.collection}`, which begins without it"
        )
    if not proved and near:
        lines.append(
            f"{near[0].prompt!r} is asked almost the same and answered {near[0].target!r}: if one of the two is not true any more, "
            "supersede it (the same subject and relation); else give both a paraphrase that tells them apart"
        )
    if not proved:
        limit = policy.memory.max_rank
        room = (
            f"the policy allows {limit}"
            if seen.memory.rank < limit
            else f"which is the policy's largest: raise {limit}"
        )
        lines.append(f"more rank (memory.min_rank, memory.max_rank): the memory has rank {seen.memory.rank}, {room}")
    wordings = [m for m in measures if m.part in OTHER_WORDINGS]
    if missed := [m for m in wordings if m.judged != "exact"]:
        lines.append(
            f"{len(missed)} of {len(wordings)} other wordings are answered otherwise: add paraphrases, or templates of its relation "
            f"(facts.templates), and train more of them (facts.train_paraphrases is {policy.facts.train_paraphrases:g})"
        )
    elif proved and not wordings:
        lines.append("how it answers in other words is not known: it has no paraphrases that were not trained on")
    return lines or [f"nothing: {fact.prompt!r} is proved, and so is every other wording that was asked"]
