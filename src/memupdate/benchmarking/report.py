"""What one benchmark run found, as frozen data. Torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from memupdate.benchmarking.scores import MeasureRow


@dataclass(frozen=True)
class BenchBatch:
    """One `add`."""

    edits: int
    release: str | None
    """None where the policy's gates refused it."""
    rank: int
    facts_proved: int
    """In this process, of all edits so far."""
    facts_total: int
    probes_unchanged_share: float | None
    kl_nats: float | None
    refused: tuple[str, ...]
    """Why, in words."""
    duration_s: float


@dataclass(frozen=True)
class Fluency:
    """Entropy of free continuations, bits; see `memupdate.benchmarking.fluency`."""

    texts: int
    tokens: int
    """Of each."""
    before: float
    after: float


@dataclass(frozen=True)
class BenchReport:
    """The field's table, and what it was measured on."""

    file: str
    format: str
    sha256: str
    model: str
    policy: str
    edits: int
    left_out: int
    """Records that are no valid edit, or contradict another; not counted where `limit` ended before them."""
    edits_per_batch: int | None
    augmented: bool
    batches: tuple[BenchBatch, ...]
    measures: tuple[MeasureRow, ...]
    fluency: Fluency
    edits_proved: int
    """Every token of the answer to the edit's own prompt, end token included, is the likeliest, at the policy's probability or more."""
    proved_not_generated: int
    """Proved edits whose free answer was not exactly the target: a proof that failed its promise."""
    workspace: str | None
    """Where it was kept."""
    duration_s: float
    messages: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    @property
    def is_released(self) -> bool:
        """Whether the memory that was measured is one that the policy released."""
        return self.batches[-1].release is not None
