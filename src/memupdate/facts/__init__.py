"""Facts: the model, the formats that they come in, reading and rendering. Torch-free.

Invariant: importing this loads the model only; the readers and their formats are looked up when they are first asked for, so that
commands that read the ledger start without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memupdate.facts.files import FactsFile, LocatedFact, Problem
from memupdate.facts.model import Fact, Probe

if TYPE_CHECKING:
    from memupdate.facts.reader import read_facts
    from memupdate.facts.stream import FactStream

__all__ = ["Fact", "FactStream", "FactsFile", "LocatedFact", "Probe", "Problem", "read_facts"]


def __getattr__(name: str) -> Any:
    if name == "read_facts":
        from memupdate.facts.reader import read_facts

        return read_facts
    if name == "FactStream":
        from memupdate.facts.stream import FactStream

        return FactStream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
