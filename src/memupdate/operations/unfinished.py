"""What is said of batches that are on their way or were left there: where each stands, what comes next, how to go on.

Torch-free; nothing here changes anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from memupdate.errors import LedgerError
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.lock import LockHolder
from memupdate.ledger.records import Batch, BatchState

_NEXT_STEP: dict[BatchState, str] = {
    "received": "its facts are stored; planning comes next",
    "planned": "its plan is stored; training comes next",
    "trained": "its slice is stored; the proof comes next",
    "verified": "it is proved; the release comes next",
}


def unfinished_messages(batches: Sequence[Batch], holder: LockHolder | None) -> list[str]:
    """One line per unfinished batch, and one about who is at work on them or how to go on."""
    waiting = [batch for batch in batches if batch.state == "released"]
    left = [batch for batch in batches if batch.state != "released"]
    lines = [f"{describe(batch)}" for batch in left]
    if left and holder is None:
        lines.append("nobody is at work on that: `memupdate resume` goes on from there")
    if holder is not None:
        lines.append(f"at work: {holder.describe()}")
    latest = {batch.collection: batch.release for batch in waiting}
    lines += [
        f"{release} waits to be published: `memupdate serve` does it, or `memupdate resume` where an engine runs"
        for release in latest.values()
    ]
    return lines


def describe(batch: Batch) -> str:
    """Where a batch stands and what comes next."""
    if batch.state == "released":
        return f"batch {batch.id} of {batch.collection} is released as {batch.release}; publishing comes next"
    return f"batch {batch.id} of {batch.collection} is {batch.state}: {_NEXT_STEP[batch.state]}"


def kept(ledger: Ledger, batch_id: int) -> list[str]:
    """After an error: that the batch is still there, and in which state; empty where it was given up or is done.

    Where even that cannot be read, nothing is said: the error itself is what matters.
    """
    try:
        unfinished = [batch for batch in ledger.batches(unfinished=True) if batch.id == batch_id]
    except LedgerError:
        return []
    return [f"{describe(batch)}; `memupdate resume` goes on from there" for batch in unfinished]
