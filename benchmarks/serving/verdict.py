"""What is wrong with answers: failed, mixed of two releases, or of a release that was not in force any more.

Invariant: an answer is right only if every name in it is the same release's and its text is, letter for letter, what that release gave
when it was asked alone, by its own name, with no other request in flight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.serving.load import Answer, Question, ask_all

Key = tuple[str, bool, int, bool]


@dataclass(frozen=True)
class Flip:
    """One move of the alias, as whoever ordered it saw it."""

    release: str
    begun_s: float
    ended_s: float


@dataclass(frozen=True)
class References:
    """What each release answers alone."""

    texts: dict[tuple[str, Key], str]
    """(release, question) → text."""

    def tells_apart(self, question: Question, one: str, other: str) -> bool:
        return self.texts[one, question.key] != self.texts[other, question.key]


def take_references(url: str, questions: Sequence[Question], releases: Sequence[str]) -> References:
    """Ask every question of every release, one at a time and twice. Raises RuntimeError where the two answers differ."""
    alone = list({question.key: replace(question, stream=False) for question in questions}.values())
    texts: dict[tuple[str, Key], str] = {}
    for release in releases:
        for _ in range(2):
            for answer in ask_all(url, alone, at_once=1, model=release)[0]:
                if answer.failed or answer.models != (release,):
                    raise RuntimeError(f"{release} alone: {answer}")
                if texts.setdefault((release, answer.question.key), answer.text) != answer.text:
                    raise RuntimeError(f"{release} alone gives two answers to {answer.question.prompt!r}")
    return References(texts)


def is_mixed(answer: Answer, references: References) -> bool:
    """Whether the answer is not exactly what the one release that it names gives alone."""
    if len(answer.models) != 1:
        return True
    return references.texts.get((answer.models[0], answer.question.key)) != answer.text


def allowed(answer: Answer, flips: Sequence[Flip]) -> set[str]:
    """Releases that may answer: the one whose flip had returned last when the request was begun, and those being flipped to meanwhile.

    `flips` are in order of time, none beside another.
    """
    before = [flip for flip in flips if flip.ended_s <= answer.begun_s]
    meanwhile = {flip.release for flip in flips if flip.ended_s > answer.begun_s and flip.begun_s < answer.ended_s}
    return meanwhile | ({before[-1].release} if before else set())


def judge(answers: Sequence[Answer], flips: Sequence[Flip], references: References) -> dict[str, int]:
    """Counts over answers of which each was begun after the first flip had returned."""
    counts: Counter[str] = Counter(requests=len(answers))
    for answer in answers:
        if answer.failed:
            counts["failed_requests"] += 1
            continue
        counts["mixed_responses"] += is_mixed(answer, references)
        counts["answered_by_old_release"] += not set(answer.models) <= allowed(answer, flips)
        counts["streamed"] += answer.question.stream
        counts["chat"] += answer.question.chat
        counts["during_a_flip"] += any(f.begun_s < answer.ended_s and f.ended_s > answer.begun_s for f in flips)
    keys = (
        "requests",
        "failed_requests",
        "mixed_responses",
        "answered_by_old_release",
        "streamed",
        "chat",
        "during_a_flip",
    )
    return {key: counts[key] for key in keys}
