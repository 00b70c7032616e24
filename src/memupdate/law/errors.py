"""What can be wrong with the points or the document that a fit is made from."""

from __future__ import annotations

from memupdate.errors import UsageError


class LawError(UsageError):
    """Points that cannot be fitted (too few, mixed, broken) or a fit document that this version cannot read."""
