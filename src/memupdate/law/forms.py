"""What a plan could be made on, side by side: how well each form foretells whether a memory of a size it has not seen holds everything.

A form is scored by the mean ln of the probability that it gave to what happened, each size left out of its fit in turn: 0 is a prophet,
and worse than the guess (the share of points that held) is worse than nothing. No form sees the point that it is scored on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memupdate.law.needed_rank import LAPSE, fit_needed_rank
from memupdate.law.points import LawPoint
from memupdate.law.recall_link import fit_recall_link
from memupdate.law.residual_law import RESIDUAL_LOSS, fit_residual_law

GUESS = "the share of points that held"
PLANNED = "needed rank, ℓ and base loss"
TOKENS = "needed rank, target tokens ℓ"
INFORMATION = "needed rank, information ℓ·L0"
SHARE = "residual loss and recall of each fact"
_BOOTSTRAP = 20
"""Draws of a law that is fitted only to be scored."""


@dataclass(frozen=True)
class FormScore:
    """One form's score."""

    name: str
    log_score: float
    """Mean ln probability per point, sizes left out."""


def compare_forms(
    points: Sequence[LawPoint], held: Sequence[bool], *, confidence: float, seed: int
) -> tuple[FormScore, ...]:
    """Every form's score on the same points; empty with fewer than three sizes."""
    if len({point.target_tokens for point in points}) < 3:
        return ()
    parameters = [point.effective_parameters for point in points]
    tokens, losses = [point.target_tokens for point in points], [point.loss_before_nats for point in points]
    kinds = ((PLANNED, None), (TOKENS, 0.0), (INFORMATION, 1.0))
    laws = {
        name: fit_needed_rank(parameters, tokens, losses, held, confidence=confidence, fixed_weight=weight)
        for name, weight in kinds
    }
    scores = [FormScore(name, _rounded(law.log_score)) for name, law in laws.items()]
    share = _score_share(points, held, confidence, seed)
    if share is not None:
        scores.append(FormScore(SHARE, _rounded(share)))
    return (*scores, FormScore(GUESS, _rounded(laws[PLANNED].log_score_guess)))


def _score_share(points: Sequence[LawPoint], held: Sequence[bool], confidence: float, seed: int) -> float | None:
    """The form that counts each fact for itself; None where a size left out leaves too little to fit."""
    scores: list[float] = []
    for size in sorted({point.target_tokens for point in points}):
        seen = [point for point in points if point.target_tokens != size]
        if len({p.effective_parameters for p in seen}) < 2 or len({p.target_tokens for p in seen}) < 2:
            return None
        parameters, tokens = [p.effective_parameters for p in seen], [p.target_tokens for p in seen]
        law = fit_residual_law(
            parameters, tokens, [p.loss_after_nats for p in seen],
            shape=RESIDUAL_LOSS, confidence=confidence, bootstrap=_BOOTSTRAP, seed=seed, scored=False,
        )  # fmt: skip
        link = fit_recall_link(
            law, parameters, tokens, [p.facts for p in seen], [p.facts_proved for p in seen], confidence=confidence, seed=seed
        )  # fmt: skip
        for point, whole in zip(points, held, strict=True):
            if point.target_tokens == size:
                chance = link.predict_all(law, point.effective_parameters, size, point.facts)
                scores.append(math.log(LAPSE / 2 + (1 - LAPSE) * (chance if whole else 1 - chance)))
    return float(np.mean(scores))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
