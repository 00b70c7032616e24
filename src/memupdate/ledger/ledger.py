"""The `Ledger`: one workspace's whole history, put together from one module per noun.

Invariant: facts are content-addressed and rows are append-only, apart from a batch's state and plan and the outcome of
its facts; triggers of the schema refuse anything else. What is live is never stored: it follows from releases, outcomes
and supersessions.
"""

from __future__ import annotations

from memupdate.ledger.batches import Batches
from memupdate.ledger.checking import Checking
from memupdate.ledger.copies import Copies
from memupdate.ledger.events import Events
from memupdate.ledger.facts import Facts
from memupdate.ledger.figures import Figures
from memupdate.ledger.law import Law
from memupdate.ledger.maintenance import Maintenance
from memupdate.ledger.measures import Measures
from memupdate.ledger.purges import Purges
from memupdate.ledger.releases import Releases


class Ledger(Maintenance, Purges, Batches, Facts, Releases, Measures, Law, Events, Figures, Copies, Checking):
    """Open with `Ledger.open(path)` or `Ledger.create(path)`; close it, or use it as a context manager.

    Each method that changes something is one transaction; `with ledger.transaction():` makes several into one. One
    process writes at a time (`workspace_lock`); any number may read. A `Ledger` belongs to the thread that opened it.
    """

    def verify(self) -> list[str]:
        """Recompute every hash and check every reference; one line per problem, empty where all is well."""
        return [
            *self.verify_file(),
            *self.verify_schema(),
            *self.verify_chain(),
            *self.verify_facts(),
            *self.verify_purges(),
            *self.verify_law(),
        ]
