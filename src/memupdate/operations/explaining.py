"""Why a release answers one question as it does: token by token, what is said instead, what competes with it, and what would help.

Competitors are found in the ledger: facts whose answer is the one that came out, and facts asked in nearly the same words, by the share of
words that two prompts have in common. Nothing is changed, and nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memupdate.errors import UsageError
from memupdate.facts.model import Fact, normalise
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.measures import MeasureRecord, TokenRecord
from memupdate.ledger.records import ReleaseRecord
from memupdate.operations.publishing import release_memory
from memupdate.operations.reports import Report
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent
from memupdate.verification.questions import OTHER_WORDINGS

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
    """One fact in one release, looked at closely."""

    release: str
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
    session: Session, ledger: Ledger, release: ReleaseRecord, fact_id: str, progress: Progress
) -> AnswerExplanation:
    """Load the release's memory and look at one of its facts.

    Args:
        fact_id: the beginning of its id.

    Raises:
        LedgerError: no fact's id begins so, or several do.
        UsageError: the release does not hold it, or its files or the base model are not what they were.
    """
    from memupdate.training.memory import attach, detach
    from memupdate.verification.asking import greedy_answer, look_at_tokens
    from memupdate.verification.inprocess import prove_recall

    live = ledger.live_facts(release.collection, as_of_version=release.version)
    fact = _live_fact(ledger, release, live, fact_id)
    base, example = session.base, session.renderer.render(fact)
    progress(ProgressEvent("explain", 0, 1, f"{release.name}: {fact.prompt}"))
    model = attach(base.model, release_memory(session, release))
    try:
        threshold = session.policy.proof.min_probability
        (proof,), _ = prove_recall(base, model, [example], min_probability=threshold)
        (views,) = look_at_tokens(base, model, [example])
        says = greedy_answer(base, model, example, progress)
    finally:
        base.model = detach(model)
    tokens = tuple(
        TokenRecord(release.name, fact.id, i, v.token, v.probability, v.best_token, v.best_probability)
        for i, v in enumerate(views)
    )
    dead = ledger.superseded_facts(release.collection, as_of_version=release.version)
    competitors = find_competitors(fact, says, live, dead)
    measures = tuple(ledger.measures(release.name, "in-process", fact=fact.id))
    help_ = _advice(session, release, fact, proof.proved, tokens, competitors, measures)
    return AnswerExplanation(
        release.name, fact.id, fact.prompt, fact.target, proof.proved, says, tokens, competitors, measures, tuple(help_)
    )


def _live_fact(ledger: Ledger, release: ReleaseRecord, live: Iterable[Fact], fact_id: str) -> Fact:
    fact = ledger.fact(fact_id).fact
    if any(fact.id == other.id for other in live):
        return fact
    raise UsageError(
        f"{release.name} does not hold {fact.prompt!r} → {fact.target!r}",
        f"`memupdate facts explain {fact_id}` says what became of it",
    )


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
    release: ReleaseRecord,
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
            f"`memupdate compact -c {release.collection}`, which begins without it"
        )
    if not proved and near:
        lines.append(
            f"{near[0].prompt!r} is asked almost the same and answered {near[0].target!r}: if one of the two is not true any more, "
            "supersede it (the same subject and relation); else give both a paraphrase that tells them apart"
        )
    if not proved:
        limit = policy.memory.max_rank
        room = f"the policy allows {limit}" if release.rank < limit else f"which is the policy's largest: raise {limit}"
        lines.append(f"more rank (memory.min_rank, memory.max_rank): the memory has rank {release.rank}, {room}")
    wordings = [m for m in measures if m.part in OTHER_WORDINGS]
    if missed := [m for m in wordings if m.judged != "exact"]:
        lines.append(
            f"{len(missed)} of {len(wordings)} other wordings are answered otherwise: add paraphrases, or templates of its relation "
            f"(facts.templates), and train more of them (facts.train_paraphrases is {policy.facts.train_paraphrases:g})"
        )
    elif proved and not wordings:
        lines.append("how it answers in other words is not known: it has no paraphrases that were not trained on")
    return lines or [f"nothing: {fact.prompt!r} is proved, and so is every other wording that was asked"]
