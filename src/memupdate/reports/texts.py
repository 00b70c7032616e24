"""Figures as people read them, the same words in terminal, page and Markdown; and texts of facts made safe to show.

Invariant: a fact's text is hostile input: what comes out of `shown` has no control character, no direction override and
a bounded length. Escaping for HTML or Markdown is the renderer's own step after it.
"""

from __future__ import annotations

import math
import unicodedata

from memupdate.budget.forecast import Forecast
from memupdate.law.points import Interval
from memupdate.reports.content import CollectionCapacity

MAX_TEXT = 200
"""Characters of a prompt or an answer in a report; the ledger has the rest."""


def shown(text: str | None, limit: int = MAX_TEXT) -> str:
    """One line of at most `limit` characters; what could not be seen, or would reorder the line, becomes `�`."""
    if not text:
        return ""
    line = " ".join(text.split())
    # Control and format characters (NUL, direction overrides) and lone surrogates; joiners are part of scripts and emoji.
    safe = "".join(
        "�" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\u200c\u200d" else c for c in line
    )
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


def percent(share: float | None, digits: int = 1) -> str:
    """`98.3 %`; a share below 1 never reads as 100 %, nor one above 0 as 0 %. `–` for None."""
    if share is None:
        return "–"
    text = f"{100 * share:.{digits}f}"
    if share < 1 and float(text) >= 100:
        text = f"{100 - 10.0**-digits:.{digits}f}"
    if share > 0 and float(text) == 0:
        return f"< {10.0**-digits:.{digits}f} %"
    return f"{text} %"


def number(value: float | None) -> str:
    """Three significant digits for fractions, thousands separated for whole numbers; `–` for None."""
    if value is None:
        return "–"
    if isinstance(value, int) or (value == round(value) and abs(value) >= 100):
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(value: Interval | None) -> str:
    """`0.12 (0.08 to 0.15)`."""
    return "–" if value is None else f"{number(value.mid)} ({number(value.low)} to {number(value.high)})"


def times(count: int) -> str:
    """`1 time`, `3 times`."""
    return f"{count:,} time" + ("" if count == 1 else "s")


def forecast_sentence(capacity: CollectionCapacity) -> str:
    """The forecast in one or two sentences."""
    found = capacity.forecast
    if found is None:
        return "No forecast: no law is fitted."
    if found.note:
        return f"{found.note[0].upper()}{found.note[1:]}."
    assert capacity.policy_limit is not None
    assert capacity.engine_limit is not None
    pace = f"At the rate of the last {found.batches_seen} batches ({_whole(found.tokens_per_batch)} tokens each)"
    policy = (
        f"the policy's largest rank ({capacity.policy_limit.rank}) is full {_batches(found.until_policy_limit, found)}"
    )
    engine = f"the engine's rank limit ({capacity.engine_limit.rank}) {_batches(found.until_engine_limit, found)}"
    return f"{pace}, {policy}: compact or raise memory.max_rank then; {engine}."


def _whole(value: Interval | None) -> str:
    return "–" if value is None else f"{value.mid:,.0f}, {value.low:,.0f} to {value.high:,.0f}"


def _batches(until: Interval | None, found: Forecast) -> str:
    if until is None:
        return "at a time that nothing tells"
    if until.mid < 1:
        return "with the next batch"
    high = "no end" if math.isinf(until.high) else f"{until.high:,.0f}"
    text = f"in about {until.mid:,.0f} batches ({until.low:,.0f} to {high})"
    if found.batches_per_day:
        text += f", {until.mid / found.batches_per_day:,.0f} days"
    return text


def gauge_sentence(capacity: CollectionCapacity) -> str:
    """Used and free in one sentence."""
    used = f"{capacity.facts_live:,} live facts, {capacity.target_tokens_live:,} target tokens"
    if capacity.now is None or capacity.policy_limit is None:
        return f"{used} at rank {capacity.rank}; without a law nobody can say how much room is left."
    at = f"rank {capacity.now.rank}"
    if capacity.rank == 0:
        at = f"nothing written yet; {at}, the policy's smallest,"
    text = f"{used}; {at} holds about {capacity.now.target_tokens:,}"
    if capacity.now.free == 0 and capacity.target_tokens_live > capacity.now.target_tokens:
        text += f", {capacity.target_tokens_live - capacity.now.target_tokens:,} fewer than there are"
    else:
        text += f", {capacity.now.free:,} free"
    if capacity.policy_limit.rank > capacity.now.rank:
        text += f"; grown to rank {capacity.policy_limit.rank}, {capacity.policy_limit.free:,} free"
    return text + "."
