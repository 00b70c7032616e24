"""All laws of one base model, placement and recipe, fitted together: what a plan asks.

Invariant: equal points, seed and settings give an equal `LawFit` with an equal `fit_id`;
`LawFit.from_json(fit.to_json())` predicts the very same numbers. With more target tokens no pessimistic end improves;
with more rank none gets worse. This module knows nothing about ranks that may be chosen, limits or the ledger.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from memupdate.law.density import BaseLoss, Density
from memupdate.law.errors import LawError
from memupdate.law.forms import FormScore, compare_forms
from memupdate.law.memory_law import MemoryLaw, fit_memory_law, is_saturated, why_not_fitted
from memupdate.law.needed_rank import NeededRank, Size, fit_needed_rank
from memupdate.law.points import Interval, LawPoint, point_problems
from memupdate.law.recall_link import RecallLink, fit_recall_link
from memupdate.law.residual_law import DURATION, HARM, RESIDUAL_LOSS, ResidualLaw, Shape, fit_residual_law
from memupdate.storage import canonical_json, text_sha256

FIT_SCHEMA_VERSION = 2
MIN_POINTS = 4
_CALIBRATE_HINT = "run `memupdate calibrate` for more points"


@dataclass(frozen=True)
class LawFit:
    """The laws with their uncertainty. Made by `fit_laws`; kept as JSON."""

    base_fingerprint: str
    placement: str
    recipe: str
    confidence: float
    """Of every interval here: central, so each end is passed with probability (1 − confidence) / 2."""
    seed: int
    points: int
    points_saturated: int
    rank_range: tuple[int, int]
    parameters_range: tuple[float, float]
    tokens_range: tuple[float, float]
    base_loss_nats: Interval
    """Loss before, per target token: mid is the mean over all tokens written, ends the spread over points."""
    memory: MemoryLaw | None
    """The paper's law; None where too few points are unsaturated."""
    memory_note: str
    """Why `memory` is None, or its lack of fit; empty otherwise."""
    loss: ResidualLaw
    harm: ResidualLaw | None
    """None where fewer than four points measured harm."""
    recall: RecallLink
    duration: ResidualLaw
    needed: NeededRank
    """What plans are made on."""
    max_kl_nats: float | None
    """Harm above which a run did not hold its facts, as `needed` counts; None where harm has no budget."""
    density: Density | None
    """Base loss of facts by their tokens; None where no calibration measured it."""
    forms: tuple[FormScore, ...]
    """What else could be planned on, and how well each foretells what holds."""
    drift: float = 1.0
    """How much wider than the points alone say: root mean square of what batches missed their plans by, in the plans' own deviations,
    at least 1. It widens the intervals of loss, harm and needed rank."""

    @cached_property
    def fit_id(self) -> str:
        """`sha256:…` of `to_json()`: the id under which the ledger keeps it."""
        return text_sha256(self.to_json())

    def predict_loss(self, effective_parameters: float, target_tokens: float) -> Interval:
        """Mean loss after training over the target tokens, nats per token; never above the loss before."""
        interval = self.loss.predict(effective_parameters, target_tokens, self.confidence)
        return _at_most(_widened(interval, self.drift), self.base_loss_nats.high)

    def predict_kl(self, effective_parameters: float, target_tokens: float) -> Interval | None:
        """Harm: KL(base ‖ adapted), nats per token of anchor text; None without harm data."""
        if self.harm is None:
            return None
        return _widened(self.harm.predict(effective_parameters, target_tokens, self.confidence), self.drift)

    def predict_all_proved(self, effective_parameters: float, size: Size) -> Interval:
        """Probability that every fact is proved, harm within its budget, in the policy's attempts at this rank, 0 to 1."""
        return self.needed.predict(effective_parameters, size, self.confidence, widening=self.drift)

    def predict_needed(self, size: Size) -> Interval:
        """Effective parameters that one set of this size needs; half of all such sets need less than the middle."""
        return self.needed.needed(size, self.confidence, widening=self.drift)

    def base_loss(self, counts: Mapping[str, int]) -> BaseLoss:
        """Loss before of facts with so many target tokens of each class (`density.token_classes`), nats per token."""
        if self.density is not None and self.density.classes:
            return self.density.estimate(counts)
        mid, high = self.base_loss_nats.mid, self.base_loss_nats.high
        return BaseLoss(mid, math.log(max(high, 1e-6) / max(mid, 1e-6)) / 2)

    def predict_proved_share(self, effective_parameters: float, target_tokens: float) -> Interval:
        """Expected share of live facts whose every token is the argmax, 0 to 1."""
        return self.recall.predict(self.loss, effective_parameters, target_tokens, self.confidence)

    def predict_duration_s(self, effective_parameters: float, target_tokens: float) -> Interval:
        """Seconds of training, on the machine that the points came from."""
        return self.duration.predict(effective_parameters, target_tokens, self.confidence)

    def predict_drop(self, rank: int, target_tokens: float) -> Interval | None:
        """ΔL by the paper's law, nats per token, cut at the loss before; None where that law was not fitted."""
        if self.memory is None:
            return None
        return _at_most(self.memory.predict_drop(rank, target_tokens, self.confidence), self.base_loss_nats.mid)

    def outside_range(self, effective_parameters: float, target_tokens: float) -> tuple[str, ...]:
        """In words, where a prediction leaves the fitted range (and is widened for it); empty inside."""
        found = []
        axes = (
            ("effective parameters", effective_parameters, self.parameters_range),
            ("target tokens", target_tokens, self.tokens_range),
        )
        for name, value, (low, high) in axes:
            if not low <= value <= high:
                side, edge = ("above", high) if value > high else ("below", low)
                found.append(
                    f"{value:,.0f} {name} are {side} the calibrated {low:,.0f} to {high:,.0f} ({_times(value, edge)})"
                )
        return tuple(found)

    def to_json(self) -> str:
        """One canonical JSON document with everything that predictions need."""
        return canonical_json({"schema_version": FIT_SCHEMA_VERSION, **self._content()})

    @classmethod
    def from_json(cls, text: str) -> LawFit:
        """The fit that `to_json` wrote.

        Raises:
            LawError: no such document, or one of another version.
        """
        try:
            document = json.loads(text)
            version = document.pop("schema_version")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise LawError("law fit: not a document of memupdate", _CALIBRATE_HINT) from error
        if version != FIT_SCHEMA_VERSION:
            raise LawError(
                f"law fit: schema_version {version!r} is not {FIT_SCHEMA_VERSION}", "fit again or update memupdate"
            )
        try:
            fit = _decode(cls, document)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise LawError(f"law fit: damaged document ({error})", _CALIBRATE_HINT) from error
        assert isinstance(fit, cls)
        return fit

    def _content(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def fit_laws(
    points: Sequence[LawPoint],
    *,
    confidence: float = 0.9,
    bootstrap: int = 200,
    seed: int = 0,
    max_kl_nats: float | None = None,
    density: Density | None = None,
    drift: float = 1.0,
) -> LawFit:
    """Fit every law to the points of one base model, placement and recipe.

    Args:
        points: measured memories, in any order; the order does not matter.
        confidence: of all intervals, in (0, 1).
        bootstrap: draws per law, at least 20.
        seed: of the draws.
        max_kl_nats: the policy's harm budget; a run above it did not hold its facts.
        density: base loss by token class, to be kept with the fit.
        drift: widening of intervals, see `LawFit.drift`.

    Raises:
        LawError: points of several base models, placements or recipes; broken points; fewer than four usable ones, or
            all of one rank or one size.
    """
    if not 0 < confidence < 1 or bootstrap < 20:
        raise ValueError("confidence must lie in (0, 1) and bootstrap be at least 20")
    usable = _usable(points)
    harmed = [point for point in usable if point.kl_nats is not None]
    fit_one = _Fitter(confidence, bootstrap, seed)
    loss = fit_one(usable, [point.loss_after_nats for point in usable], RESIDUAL_LOSS)
    harm = fit_one(harmed, [point.kl_nats or 0.0 for point in harmed], HARM) if _enough(harmed) else None
    reason = why_not_fitted(usable)
    memory = None if reason else fit_memory_law(usable, confidence=confidence, bootstrap=bootstrap, seed=seed)
    return LawFit(
        base_fingerprint=usable[0].base_fingerprint,
        placement=usable[0].placement,
        recipe=usable[0].recipe,
        confidence=confidence,
        seed=seed,
        points=len(usable),
        points_saturated=sum(is_saturated(point) for point in usable),
        rank_range=(int(min(point.rank for point in usable)), int(max(point.rank for point in usable))),
        parameters_range=loss.parameters_range,
        tokens_range=loss.tokens_range,
        base_loss_nats=_base_loss(usable, confidence),
        memory=memory,
        memory_note=memory.note if memory else reason,
        loss=loss,
        harm=harm,
        recall=fit_recall_link(
            loss,
            [point.effective_parameters for point in usable],
            [point.target_tokens for point in usable],
            [point.facts for point in usable],
            [point.facts_proved for point in usable],
            confidence=confidence,
            seed=seed,
        ),
        duration=fit_one(usable, [max(point.duration_s, 1e-3) for point in usable], DURATION),
        needed=_needed(usable, max_kl_nats, confidence),
        max_kl_nats=max_kl_nats,
        density=density,
        forms=compare_forms(usable, [holds(point, max_kl_nats) for point in usable], confidence=confidence, seed=seed),
        drift=max(1.0, float(f"{drift:.6g}")),
    )


def at_harm(fit: LawFit, points: Sequence[LawPoint], max_kl_nats: float | None) -> LawFit:
    """The same laws with the needed rank at another harm budget, tighter or looser: what held is counted anew from each point's harm.

    A run is what it is: it was trained under its policy's budget. At a looser one it might have ended sooner, at a tighter one it might
    have gone on until it kept that too; both make the rank found here rather too large than too small.

    Args:
        fit: of `points`.
        points: what it was fitted to.
        max_kl_nats: the budget; None for none.

    Raises:
        LawError: as `fit_laws`.
    """
    return (
        fit
        if max_kl_nats == fit.max_kl_nats
        else dataclasses.replace(
            fit, needed=_needed(_usable(points), max_kl_nats, fit.confidence), max_kl_nats=max_kl_nats
        )
    )


def holds(point: LawPoint, max_kl_nats: float | None) -> bool:
    """Whether the memory held all its facts, harm within the budget."""
    return point.all_proved and (max_kl_nats is None or point.kl_nats is None or point.kl_nats <= max_kl_nats)


def _needed(points: Sequence[LawPoint], max_kl_nats: float | None, confidence: float) -> NeededRank:
    return fit_needed_rank(
        [point.effective_parameters for point in points],
        [point.target_tokens for point in points],
        [point.loss_before_nats for point in points],
        [holds(point, max_kl_nats) for point in points],
        confidence=confidence,
    )


@dataclass(frozen=True)
class _Fitter:
    confidence: float
    bootstrap: int
    seed: int

    def __call__(self, points: Sequence[LawPoint], values: Sequence[float], shape: Shape) -> ResidualLaw:
        return fit_residual_law(
            [point.effective_parameters for point in points],
            [point.target_tokens for point in points],
            values,
            shape=shape,
            confidence=self.confidence,
            bootstrap=self.bootstrap,
            seed=self.seed,
        )


def _usable(points: Sequence[LawPoint]) -> list[LawPoint]:
    """Sorted, so that the fit does not depend on the order that a ledger returns."""
    if not points:
        raise LawError("the memory law has no points to be fitted to", _CALIBRATE_HINT)
    for name, label in (
        ("base_fingerprint", "base models"),
        ("placement", "placements"),
        ("recipe", "training recipes"),
    ):
        values = sorted({str(getattr(point, name)) for point in points})
        if len(values) > 1:
            raise LawError(f"points of {len(values)} {label} cannot be fitted together", "fit each on its own", values)
    broken = [f"points[{index}]: {problem}" for index, point in enumerate(points) for problem in point_problems(point)]
    if broken:
        raise LawError("the memory law cannot be fitted to broken points", _CALIBRATE_HINT, broken)
    if not _enough(points):
        ranks, sizes = (
            len({point.effective_parameters for point in points}),
            len({point.target_tokens for point in points}),
        )
        raise LawError(
            f"the memory law needs at least {MIN_POINTS} points over 2 ranks and 2 sizes; there are {len(points)} "
            f"over {ranks} and {sizes}",
            _CALIBRATE_HINT,
        )
    return sorted(points, key=lambda point: canonical_json(dataclasses.asdict(point)))


def _enough(points: Sequence[LawPoint]) -> bool:
    ranks, sizes = {point.effective_parameters for point in points}, {point.target_tokens for point in points}
    return len(points) >= MIN_POINTS and len(ranks) >= 2 and len(sizes) >= 2


def _base_loss(points: Sequence[LawPoint], confidence: float) -> Interval:
    losses = [float(point.loss_before_nats) for point in points]
    tokens = [point.target_tokens for point in points]
    mid = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    tail = (1 - confidence) / 2
    low, high = (float(value) for value in np.quantile(losses, (tail, 1 - tail)))
    return Interval(min(low, mid), mid, max(high, mid))


def _at_most(interval: Interval, limit: float) -> Interval:
    return Interval(min(interval.low, limit), min(interval.mid, limit), min(interval.high, limit))


def _widened(interval: Interval, factor: float) -> Interval:
    """Both ends further from the middle, in log units, by `factor`."""
    mid = max(interval.mid, 1e-9)
    low = mid * (max(interval.low, 1e-9) / mid) ** factor
    high = mid * (max(interval.high, 1e-9) / mid) ** factor
    return interval if factor == 1.0 else Interval(min(low, interval.mid), interval.mid, max(high, interval.mid))


def _times(value: float, edge: float) -> str:
    ratio = max(value, edge) / max(min(value, edge), 1e-9)
    return f"by {100 * (ratio - 1):.0f} %" if ratio < 2 else f"{ratio:,.1f} times"


def _decode(hint: Any, value: Any) -> Any:
    """A JSON value as what a field's type says; the opposite of `dataclasses.asdict`."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint)
        if set(value) != set(hints) & {field.name for field in dataclasses.fields(hint)}:
            raise ValueError(f"fields of {hint.__name__}")
        return hint(**{name: _decode(hints[name], item) for name, item in value.items()})
    if isinstance(hint, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        return None if value is None else _decode(kinds[0], value)
    if typing.get_origin(hint) is tuple:
        arguments = typing.get_args(hint)
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        return tuple(_decode(kind, item) for kind, item in zip(kinds, value, strict=True))
    if hint is float:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError("a number is not finite")
        return number
    if not isinstance(value, hint):
        raise TypeError(f"{value!r} is no {hint.__name__}")
    return value
