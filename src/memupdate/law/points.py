"""What is measured, before any law is fitted to it: one trained memory is one `LawPoint`.

Invariant: `points_from_json(points_to_json(points)) == points`, and nothing but whole, plausible points comes out of a
document. This module does not know how points are fitted or where they are kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from memupdate.law.errors import LawError

POINTS_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Interval:
    """A prediction with its uncertainty; `low <= mid <= high`, all in the unit of what is predicted."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class LawPoint:
    """One memory written and measured.

    Loss is the mean over target tokens of −ln p, in nats. `ΔL = loss_before_nats − loss_after_nats`.
    """

    base_fingerprint: str
    """Which base model, `sha256:…` of its weights."""
    placement: str
    """Which matrices are adapted, for example `mlp-all`."""
    recipe: str
    """`sha256:…` of what else the numbers depend on: objective, guard, rate, dtype. Points of other recipes are not
    mixed."""
    rank: int
    effective_parameters: int
    """`r · Σ (d_in + d_out)` over the adapted matrices."""
    facts: int
    target_tokens: int
    """ℓ: target tokens written, end tokens included, over all live facts in this memory."""
    loss_before_nats: float
    loss_after_nats: float
    facts_proved: int
    """How many of `facts` have every target token as the argmax."""
    kl_nats: float | None
    """Harm: mean KL(base ‖ adapted) per token on held-out anchor text; None where not measured."""
    epochs: int
    stopped_early: bool
    """True where training stopped because every token cleared the margin: capacity would allow a lower loss still."""
    duration_s: float
    origin: Literal["calibration", "shipped", "batch"] = "calibration"
    examples: int = 0
    """Phrasings trained on, the facts' own included; 0 where not noted."""
    steps: int = 0
    """Optimiser steps of all attempts; 0 where not noted."""
    attempts: int = 1
    """Runs of the trainer at this rank: a second one goes on with more epochs."""
    kind: str = ""
    """What was written, where a calibration writes several kinds: `facts`, `numbers`."""

    @property
    def all_proved(self) -> bool:
        """Whether this rank held everything."""
        return self.facts_proved == self.facts

    @property
    def loss_drop_nats(self) -> float:
        """ΔL, the drop in mean target-token loss, nats per token."""
        return self.loss_before_nats - self.loss_after_nats


def points_to_json(points: Iterable[LawPoint], **about: Any) -> str:
    """One JSON document, `{"schema_version": 1, "points": [...], **about}`, indented so that diffs stay readable."""
    document = {
        "schema_version": POINTS_SCHEMA_VERSION,
        **about,
        "points": [dataclasses.asdict(point) for point in points],
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def points_from_json(text: str) -> tuple[LawPoint, ...]:
    """Points of a document that `points_to_json` wrote; keys beside `points` are ignored.

    Raises:
        LawError: no JSON, another schema, or points with missing, unknown or implausible fields (all of them in
            `details`).
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise LawError(f"calibration points: line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(document, dict) or not isinstance(document.get("points"), list):
        raise LawError('calibration points: expected an object with a list "points"')
    version = document.get("schema_version", POINTS_SCHEMA_VERSION)
    if version != POINTS_SCHEMA_VERSION:
        raise LawError(
            f"calibration points: schema_version {version!r} is not {POINTS_SCHEMA_VERSION}", "update memupdate"
        )
    problems: list[str] = []
    points: list[LawPoint] = []
    for index, row in enumerate(document["points"]):
        found = _row_problems(row)
        problems.extend(f"points[{index}]: {problem}" for problem in found)
        if not found:
            points.append(LawPoint(**row))
    if problems:
        raise LawError(
            "calibration points: some cannot be read", "make them again with `memupdate calibrate`", problems
        )
    return tuple(points)


def point_problems(point: LawPoint) -> list[str]:
    """What makes a point unusable for any fit, one line each; empty for a sound point."""
    problems = []
    for name in ("rank", "effective_parameters", "facts", "target_tokens"):
        if getattr(point, name) <= 0:
            problems.append(f"{name} is {getattr(point, name)}, not positive")
    for name in ("loss_before_nats", "loss_after_nats", "duration_s", "kl_nats"):
        value = getattr(point, name)
        if value is not None and not math.isfinite(value):
            problems.append(f"{name} is not a finite number")
    if not 0 <= point.facts_proved <= point.facts:
        problems.append(f"facts_proved is {point.facts_proved} of {point.facts}")
    return problems


def _row_problems(row: object) -> list[str]:
    if not isinstance(row, Mapping):
        return ["not an object"]
    hints = typing.get_type_hints(LawPoint)
    required = {field.name for field in dataclasses.fields(LawPoint) if field.default is dataclasses.MISSING}
    problems = [f"{name} is missing" for name in sorted(required - row.keys())]
    problems += [f"{name} is unknown" for name in sorted(row.keys() - hints.keys())]
    problems += [
        f"{name} has the wrong type: {row[name]!r}"
        for name in hints
        if name in row and not _fits(row[name], hints[name])
    ]
    return problems or point_problems(LawPoint(**row))


def _fits(value: object, hint: Any) -> bool:
    """Whether a JSON value may stand for a field: whole numbers also for floats, booleans for nothing but booleans."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)
