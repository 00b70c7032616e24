"""Other wordings of facts, asked of the base model itself, and written into a facts file for a person to look through.

Invariant: a fact is written as it was given, but for wordings added after its own; the ledger is not touched. The same file, seed, model
and machine give the same wordings. What makes a text a wording is in `facts.rewording`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from memupdate.facts.model import Fact
from memupdate.facts.render import resolve_style
from memupdate.facts.rewording import RULES, WordingFilter, is_question
from memupdate.facts.secrets import SecretPatterns
from memupdate.operations.reports import Report
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent

Style = Literal["chat", "completion"]
Tell = Callable[[int, int, int], None]
"""Told texts done, texts to come in all, and the round, from 0."""

DEFAULT_COUNT = 4
DEFAULT_ATTEMPTS = 4

_TEMPERATURE = 0.8
_MOST_TOKENS = 256
_SPARE_TOKENS = 16
"""A wording may take twice the prompt's tokens and so many more before it is cut off."""

_CHAT_REQUEST = """\
Ask the following in other words, in the same language. Keep its meaning and every name, number and quotation in it. \
Do not answer it. Write the new wording only, on one line.

{prompt}"""

_PLAIN_REQUEST = """\
Each question is followed by the same question in other words.

Question: Who wrote the novel "Emma"?
In other words: Which author is the novel "Emma" by?

Question: When was the bridge at Remagen built?
In other words: In what year did they build the bridge at Remagen?

Question: How many people live in Oslo?
In other words: What is the population of Oslo?

Question: {prompt}
In other words:"""


@dataclass(frozen=True)
class Wish:
    """What is asked for."""

    count: int = DEFAULT_COUNT
    """New wordings of each fact, at most."""
    attempts: int = DEFAULT_ATTEMPTS
    """Rounds; in each, `count` texts are sampled for every fact that lacks wordings still."""
    seed: int = 0


@dataclass(frozen=True)
class DroppedTexts(Report):
    """Texts that one rule kept out."""

    rule: str
    texts: int
    because: str


@dataclass(frozen=True)
class ParaphraseReport(Report):
    """What the base model offered, and what was taken of it."""

    out: str | None
    """The file written; None where the caller takes `written`."""
    asked_by: Style
    """How the model was asked."""
    seed: int
    facts: int
    facts_left_alone: int
    """Facts that have no other wording of their own: earlier turns come before them, or they are no question but a text to go on from; and
    those too long for the model."""
    facts_without: int
    """Facts that were asked for, and of which no wording was taken."""
    wordings_given: int
    wordings_kept: int
    """New ones."""
    texts_judged: int
    model_able: bool | None
    """Whether a wording was taken for half of the facts asked for, at least; None where none was asked for."""
    dropped: tuple[DroppedTexts, ...]
    """For every rule, in the order in which they are asked."""
    written: tuple[Fact, ...]
    duration_s: float
    skipped: tuple[str, ...] = ()
    """Bad lines that `--skip-invalid` left out."""
    messages: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Without the facts, which are a file of their own."""
        plain = super().to_dict()
        del plain["written"]
        return plain


def paraphrase(
    session: Session, facts: Sequence[Fact], live: Sequence[Fact], wish: Wish, progress: Progress
) -> ParaphraseReport:
    """`facts` with wordings of the base model added.

    Args:
        live: facts whose questions no new wording may ask.

    Raises:
        ModelError: the base model cannot be loaded.
    """
    started = time.monotonic()
    requests = _requests(session, facts)
    keys = {fact.key for fact in facts}
    # What a fact supersedes may have been asked by the same wordings.
    others = (fact for fact in live if fact.key not in keys)
    judge = WordingFilter((*facts, *others), session.wordings, SecretPatterns.named(session.policy.facts.refuse))
    taken: dict[int, list[str]] = {index: [] for index in requests}

    def tell(done: int, texts: int, attempt: int) -> None:
        progress(ProgressEvent("paraphrase", done, texts, f"round {attempt + 1} of at most {wish.attempts}"))

    for attempt in range(wish.attempts):
        lacking = {index: ids for index, ids in requests.items() if len(taken[index]) < wish.count}
        for index, text in _offered(session, facts, lacking, wish, tell, attempt) if lacking else ():
            if len(taken[index]) < wish.count and (wording := judge.take(facts[index], text)):
                taken[index].append(wording)
    return _report(session, facts, taken, judge, wish.seed, time.monotonic() - started)


def _report(
    session: Session,
    facts: Sequence[Fact],
    taken: Mapping[int, Sequence[str]],
    judge: WordingFilter,
    seed: int,
    duration_s: float,
) -> ParaphraseReport:
    kept = sum(map(len, taken.values()))
    without = sum(not wordings for wordings in taken.values())
    return ParaphraseReport(
        out=None,
        asked_by=_style(session),
        seed=seed,
        facts=len(facts),
        facts_left_alone=len(facts) - len(taken),
        facts_without=without,
        wordings_given=sum(len(fact.paraphrases) for fact in facts),
        wordings_kept=kept,
        texts_judged=kept + judge.dropped.total(),
        model_able=2 * without <= len(taken) if taken else None,
        dropped=tuple(DroppedTexts(rule.name, judge.dropped[rule.name], rule.reason) for rule in RULES),
        written=tuple(
            replace(fact, paraphrases=(*fact.paraphrases, *taken.get(index, ()))) for index, fact in enumerate(facts)
        ),
        duration_s=duration_s,
        messages=tuple(_messages(session, without, len(taken), kept)),
    )


def _requests(session: Session, facts: Sequence[Fact]) -> dict[int, tuple[int, ...]]:
    """Token ids that ask for another wording, by the fact's place; facts that are left alone have none."""
    renderer, style = session.renderer, _style(session)
    form = _CHAT_REQUEST if style == "chat" else _PLAIN_REQUEST
    found: dict[int, tuple[int, ...]] = {}
    for index, fact in enumerate(facts):
        if _can_be_asked_otherwise(session, fact):
            ids = renderer.prompt_ids(form.replace("{prompt}", " ".join(fact.prompt.split())), style)
            if not renderer.context or len(ids) + _room(session, fact) <= renderer.context:
                found[index] = ids
    return found


def _style(session: Session) -> Style:
    """How the model is asked: by its chat template where there is one."""
    return "chat" if session.tokenizer.chat_template else "completion"


def _can_be_asked_otherwise(session: Session, fact: Fact) -> bool:
    """What other turns come before, or a text to go on from, only its author can put otherwise: so that the answer still fits."""
    rendering, has_template = session.policy.facts.rendering, bool(session.tokenizer.chat_template)
    style = resolve_style(fact.rendering, rendering, has_chat_template=has_template)
    return not fact.context and (style == "chat" or is_question(fact.prompt))


def _room(session: Session, fact: Fact) -> int:
    """Tokens that a wording of `fact` may take."""
    return min(_MOST_TOKENS, 2 * len(session.tokenizer.encode(fact.prompt)) + _SPARE_TOKENS)


def _offered(
    session: Session,
    facts: Sequence[Fact],
    requests: Mapping[int, tuple[int, ...]],
    wish: Wish,
    tell: Tell,
    attempt: int,
) -> Iterator[tuple[int, str]]:
    """`wish.count` texts for each request, each with its fact's place; empty where one was cut off before its end."""
    from memupdate.verification.inprocess import end_ids, generate_sampled

    base, style = session.base, _style(session)
    stops = end_ids(base) | ({session.renderer.chat_end} if style == "chat" else set())
    places = [index for index in requests for _ in range(wish.count)]
    sampled = generate_sampled(
        base,
        [requests[index] for index in places],
        max(_room(session, facts[index]) for index in requests),
        temperature=_TEMPERATURE,
        seed=wish.seed + attempt,
        stops=stops,
        stop_text=None if style == "chat" else "\n",
        tell=lambda done: tell(done, len(places), attempt),
    )
    for index, ids in zip(places, sampled, strict=True):
        text = session.tokenizer.decode(ids, skip_special_tokens=True)
        yield index, whole_text(text, style, ended=bool(ids) and ids[-1] in stops)


def whole_text(text: str, style: Style, *, ended: bool) -> str:
    """What the model wrote: all of its turn, or the rest of the line; empty where it was cut off before that ended."""
    if style == "chat":
        return text if ended else ""
    line, newline, _ = text.lstrip(" ").partition("\n")
    return line if newline or ended else ""


def _messages(session: Session, without: int, asked: int, kept: int) -> Iterator[str]:
    """What is to be said of the outcome."""
    if not asked:
        yield "no fact here is a question that can be put otherwise; the facts are as they were"
        return
    if 2 * without > asked:
        yield (
            f"the base model is not able to do this: no wording of it was usable for {without} of {asked} facts; "
            "give `paraphrases` in the file, or wordings of a relation in the policy's facts.templates"
        )
    if kept:
        share = session.policy.facts.train_paraphrases
        yield (
            "no rule can tell whether a wording means the same: read them before `memupdate add`, which trains on the first "
            f"{share:.0%} of each fact's wordings; `memupdate plan` counts what that costs"
        )
