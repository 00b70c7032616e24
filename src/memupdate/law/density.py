"""What a target token costs a base model, by what it looks like: a torch-free estimate of the base loss of new facts.

A token's class follows from its text alone (digits, end of the answer, start of a name, …). The table holds the mean loss of each
class, from a calibration's own scores. Invariant: facts added never lower the information of a set, tokens times
base loss; and what is uncertain about it stays, so that a larger set never looks easier for being better known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

END, DIGIT, NUMBER, MARK, NAME, WORD, PIECE = "end", "digit", "number", "mark", "name", "word", "piece"
CLASSES = (END, DIGIT, NUMBER, MARK, NAME, WORD, PIECE)
LONG_NUMBER = 6
"""Digits in one target from which they count as `NUMBER`: a phone number is not guessed, a year or a price is half known."""
SET_SCATTER = 0.15
"""In ln of the loss: how far the estimate for a set of facts is off, which are written in other words than those calibrated on."""


@dataclass(frozen=True)
class TokenClass:
    """One class of target tokens."""

    name: str
    mean_nats: float
    sd_nats: float
    tokens: int


@dataclass(frozen=True)
class BaseLoss:
    """Loss before anything is written, mean over target tokens."""

    nats: float
    """Per token."""
    sd_log: float
    """Uncertainty of its logarithm; 0 where measured."""


@dataclass(frozen=True)
class Density:
    """The table; made by `fit_density`."""

    classes: tuple[TokenClass, ...]

    def estimate(self, counts: Mapping[str, int]) -> BaseLoss:
        """Mean base loss of target tokens of these classes; classes that were never seen count as the mean of all."""
        known = {row.name: row for row in self.classes}
        everything = _together(self.classes)
        total = sum(counts.values())
        if not total:
            return BaseLoss(everything.mean_nats, SET_SCATTER)
        rows = [(known.get(name, everything), count) for name, count in counts.items() if count]
        return BaseLoss(sum(row.mean_nats * count for row, count in rows) / total, SET_SCATTER)


def density_from(value: Any) -> Density | None:
    """The table in a document that holds `dataclasses.asdict` of one; None for anything else."""
    try:
        return Density(tuple(TokenClass(**row) for row in value["classes"]))
    except (TypeError, KeyError):
        return None


def fit_density(scored: Sequence[tuple[Sequence[str], Sequence[float]]]) -> Density:
    """The table from scored facts.

    Args:
        scored: for each fact the texts of its target tokens, "" for the end token, and their losses in nats.
    """
    losses: dict[str, list[float]] = {}
    for texts, nats in scored:
        for name, value in zip(token_classes(texts), nats, strict=True):
            losses.setdefault(name, []).append(value)
    return Density(tuple(_class(name, losses[name]) for name in CLASSES if name in losses))


def token_classes(texts: Sequence[str]) -> list[str]:
    """The class of each target token of one fact, in order."""
    digit = NUMBER if sum(map(_digits, texts)) >= LONG_NUMBER else DIGIT
    return [_class_of(text, digit, index == 0) for index, text in enumerate(texts)]


@lru_cache(maxsize=1 << 16)  # a hundred thousand facts repeat the same few thousand tokens
def _class_of(text: str, digit: str, first: bool) -> str:
    bare = text.strip()
    if not text:
        return END
    if any(character.isdigit() for character in bare):
        return digit
    if not any(character.isalpha() for character in bare):
        return MARK
    if not first and text == bare:
        return PIECE
    return NAME if bare[0].isupper() else WORD


@lru_cache(maxsize=1 << 16)
def _digits(text: str) -> int:
    return sum(character.isdigit() for character in text)


def _class(name: str, nats: Sequence[float]) -> TokenClass:
    mean = sum(nats) / len(nats)
    sd = math.sqrt(sum((value - mean) ** 2 for value in nats) / max(len(nats) - 1, 1))
    return TokenClass(name, float(f"{mean:.6g}"), float(f"{sd:.6g}"), len(nats))


def _together(classes: Sequence[TokenClass]) -> TokenClass:
    total = sum(row.tokens for row in classes)
    mean = sum(row.mean_nats * row.tokens for row in classes) / total
    variance = sum(row.tokens * (row.sd_nats**2 + (row.mean_nats - mean) ** 2) for row in classes) / total
    return TokenClass("", mean, math.sqrt(variance), total)
