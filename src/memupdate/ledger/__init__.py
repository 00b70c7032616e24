"""The ledger: facts with provenance, batches with states, releases with proofs, in one SQLite file. Torch-free."""

from memupdate.ledger.ledger import Ledger
from memupdate.ledger.lock import LockHolder, lock_holder, workspace_lock

__all__ = ["Ledger", "LockHolder", "lock_holder", "workspace_lock"]
