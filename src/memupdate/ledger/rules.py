"""The rules of identity, time and conflict: what becomes of a fact that is told when another one is live under its key.

Invariant: a rule looks at two facts and the present moment only, so that the same file told to the same ledger at the same
time always has the same effect. `docs/ledger-rules.md` states the rules for people; nothing here knows SQL.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache

from memupdate.facts.contradictions import wordings
from memupdate.facts.model import Fact
from memupdate.ledger.records import RecordedReason, Told


def judge(new: Fact, live: Fact, now: str) -> Told:
    """What `new` does where `live`, another fact with the same key, is in the weights.

    Args:
        now: the present moment, as `instant` writes it.
    """
    if untimely := outside_its_time(new, now):
        # That a live value begins later than told is no news; that it has ended is.
        return "unchanged" if untimely == "future" and teaches_nothing_new(new, live) else untimely
    if teaches_nothing_new(new, live):
        return "unchanged"
    if new.target != live.target and _is_older(new, live):
        return "older"
    return "superseding"


def outside_its_time(fact: Fact, now: str) -> RecordedReason | None:
    """`ended` for what is true no more, `future` for what is not true yet, None for what is true at `now`."""
    end, begin = instant(fact.valid_to), instant(fact.valid_from)
    if end is not None and end <= now:
        return "ended"
    return "future" if begin is not None and begin > now else None


def teaches_nothing_new(new: Fact, old: Fact) -> bool:
    """Whether whoever knows `old` answers all that `new` asks, to the letter: no wording and no rendering is new."""
    same_answer = (new.target, new.rendering, new.separator) == (old.target, old.rendering, old.separator)
    return same_answer and new.context == old.context and set(wordings(new)) <= set(wordings(old))


def _is_older(new: Fact, live: Fact) -> bool:
    """Whether both say since when they are true, and `new` since before `live`."""
    told, known = instant(new.valid_from), instant(live.valid_from)
    return told is not None and known is not None and told < known


@lru_cache(maxsize=4_096)  # a file says few dates many times
def instant(text: str | None) -> str | None:
    """An ISO 8601 date or time as a text that sorts by time: UTC, a year or month standing for its first day.

    None for None and for what is no date. Midnight is written as the date alone.
    """
    if text is None:
        return None
    try:
        if len(text) == 4:
            return f"{int(text):04d}-01-01"
        if len(text) == 7 and text[4] == "-":
            text = f"{text}-01"
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    try:
        moment = moment.astimezone(UTC) if moment.tzinfo else moment
    except OverflowError:  # within a day of the years 1 and 9999
        moment = moment.replace(tzinfo=None)
    written = moment.replace(tzinfo=None).isoformat()
    return written.removesuffix("T00:00:00")


def now_instant() -> str:
    """This moment, as `instant` writes it."""
    return datetime.now(UTC).replace(tzinfo=None).isoformat()
