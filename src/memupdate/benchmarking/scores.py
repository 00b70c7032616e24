"""Outcomes of single questions, and their means as the field takes them: over each edit's questions, then over edits.

By *teacher forcing* the model is shown the right answer so far, and each next token counts by itself; by *free generation* it goes on from
what it said itself. A share of tokens under teacher forcing is what most papers print. Torch-free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from memupdate.benchmarking.questions import BenchQuestion, Kind
from memupdate.ledger.measures import Judged

_AT_LEAST: Mapping[str, tuple[str, ...]] = {
    "exact": ("exact",),
    "normalised": ("exact", "normalised"),
    "contained": ("exact", "normalised", "contained"),
}


@dataclass(frozen=True)
class Outcome:
    """What one model did with one question."""

    tokens_right: float
    """Share of the expected answer's tokens, without the end token, that are the likeliest given the true ones before, 0 to 1."""
    judged: Judged
    """The free answer; see `memupdate.verification.questions.judge_text`."""
    proved: bool
    """Every token, end token included, is the likeliest, at the policy's probability or more."""
    answer: str
    """The free answer's text."""

    @property
    def whole(self) -> bool:
        """By teacher forcing, all tokens of the answer are right; that it ends there is not asked."""
        return self.tokens_right == 1.0


@dataclass(frozen=True)
class Score:
    """Means over edits; shares are 0 to 1, and each of the three by free generation includes the stricter ones."""

    forced_tokens_share: float
    forced_answer_share: float
    generated_contained_share: float
    generated_normalised_share: float
    generated_exact_share: float


@dataclass(frozen=True)
class MeasureRow:
    """One measure of the field's table."""

    measure: Kind
    questions: int
    edits: int
    """That have such questions."""
    before: Score | None
    """Of the unedited model; None for specificity, which compares with it."""
    after: Score


Answered = tuple[BenchQuestion, Outcome]


def score(answered: Sequence[Answered]) -> Score:
    """Means over the edits of `answered`, which must not be empty."""
    by_edit: dict[str, list[Outcome]] = defaultdict(list)
    for question, outcome in answered:
        by_edit[question.fact_id].append(outcome)
    edits = list(by_edit.values())
    return Score(
        forced_tokens_share=_mean([_mean([o.tokens_right for o in own]) for own in edits]),
        forced_answer_share=_mean([_mean([float(o.whole) for o in own]) for own in edits]),
        generated_contained_share=_generated(edits, "contained"),
        generated_normalised_share=_generated(edits, "normalised"),
        generated_exact_share=_generated(edits, "exact"),
    )


def measure_rows(
    kinds: Sequence[Kind], before: Iterable[Answered], after: Iterable[Answered]
) -> tuple[MeasureRow, ...]:
    """One row for each of `kinds` that has questions; what was not asked before the edits has no score before."""
    by_kind = [defaultdict[Kind, list[Answered]](list) for _ in range(2)]
    for found, answered in zip(by_kind, (before, after), strict=True):
        for question, outcome in answered:
            found[question.kind].append((question, outcome))
    earlier, later = by_kind
    return tuple(
        MeasureRow(
            kind, len(later[kind]), len({question.fact_id for question, _ in later[kind]}),
            score(earlier[kind]) if earlier[kind] else None, score(later[kind]),
        )
        for kind in kinds if later[kind]
    )  # fmt: skip


def _generated(edits: Sequence[Sequence[Outcome]], judged: str) -> float:
    enough = _AT_LEAST[judged]
    return _mean([_mean([float(o.judged in enough) for o in own]) for own in edits])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
