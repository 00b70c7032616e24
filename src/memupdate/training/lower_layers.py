"""What the layers below the lowest adapted matrix give for a sequence: computed once, kept by its token ids.

Invariant: these layers are frozen, so that what is kept equals what would be computed, to rounding; nothing of it needs gradient. Within
its bounds it is kept in memory, then in a file mapped into memory that vanishes with the process; what fits neither is computed again
each time. Knows token ids only: facts, older facts and anchors are the same to it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memupdate.training.decoder import Cut, Decoder, Rows

_BATCH_TOKENS = 4096
"""Tokens computed together."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class CacheBounds:
    """How much may be kept."""

    memory_bytes: int = 512 * 2**20
    file_bytes: int = 0
    """In a temporary file, beyond what memory holds."""
    folder: Path | None = None
    """Where that file is; the system's folder for temporary files by default."""


@dataclass(frozen=True)
class _Place:
    block: Tensor
    start: int


class LowerLayers:
    """Hidden states at `cut` by token ids.

    Args:
        decoder: of the base model.
        cut: the highest point below which nothing is adapted.
        bounds: of what is kept.
    """

    def __init__(self, decoder: Decoder, cut: Cut, bounds: CacheBounds) -> None:
        self.decoder, self.cut, self.bounds = decoder, cut, bounds
        self._places: dict[Ids, _Place] = {}
        self._memory_bytes = self._file_bytes = 0
        self.computed_tokens = 0
        """Tokens that went through the lower layers so far."""

    @property
    def kept_bytes(self) -> int:
        """In memory and in the file."""
        return self._memory_bytes + self._file_bytes

    def prepare(self, sequences: Iterable[Sequence[int]]) -> None:
        """Compute and keep what is not kept yet; what an earlier run has kept makes room where it must."""
        if self.cut.is_bottom:
            return
        wanted = list(dict.fromkeys(tuple(ids) for ids in sequences))
        missing = [ids for ids in wanted if ids not in self._places]
        if not self._fits(missing):
            self._places.clear()
            self._memory_bytes = self._file_bytes = 0
            missing = wanted
        for rows in _batches(missing):
            if not self._remember(rows, self._compute(rows)):
                return

    def states(self, rows: Rows) -> Tensor:
        """(N, D) at the cut, on the model's device, without gradient; kept from now on where there is room."""
        if self.cut.is_bottom:
            with torch.no_grad():
                return self.decoder.embeddings(rows)
        places = [self._places.get(ids) for ids in rows.ids]
        if any(place is None for place in places):
            hidden = self._compute(rows)
            self._remember(rows, hidden)
            return hidden
        found = [
            p.block[p.start : p.start + len(ids)] for p, ids in zip(places, rows.ids, strict=True) if p is not None
        ]
        return torch.cat(found).to(self.decoder.device, non_blocking=True)

    def _compute(self, rows: Rows) -> Tensor:
        """(N, D) at the cut. On a CPU each sequence by itself: its last bits must not tell which run asked for it, in what company."""
        if self.decoder.device.type == "cpu" and len(rows.ids) > 1:
            return torch.cat([self._compute(Rows((ids,))) for ids in rows.ids])
        self.computed_tokens += rows.tokens
        # Whoever asks: what inference mode makes may not be saved for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            return self.decoder.run(self.decoder.embeddings(rows), rows, start=Cut(0), stop=self.cut)

    def _remember(self, rows: Rows, hidden: Tensor) -> bool:
        """Keep (N, D) at the cut. False where there is no room."""
        block = self._keep(hidden.to("cpu"))
        if block is None:
            return False
        start = 0
        for ids in rows.ids:
            self._places[ids] = _Place(block, start)
            start += len(ids)
        return True

    def _bytes(self, tokens: int) -> int:
        weight = self.decoder.embed.weight
        return tokens * weight.shape[1] * weight.element_size()

    def _fits(self, sequences: Sequence[Ids]) -> bool:
        room = self.bounds.memory_bytes + self.bounds.file_bytes - self.kept_bytes
        return not self._places or self._bytes(sum(len(ids) for ids in sequences)) <= room

    def _keep(self, hidden: Tensor) -> Tensor | None:
        """The same numbers in memory or in a file; None where both are full."""
        size = hidden.numel() * hidden.element_size()
        if self._memory_bytes + size <= self.bounds.memory_bytes:
            self._memory_bytes += size
            return hidden
        if self._file_bytes + size > self.bounds.file_bytes:
            return None
        self._file_bytes += size
        # Unlinked as soon as it is mapped: the space is given back with the tensor, also after a crash.
        with tempfile.NamedTemporaryFile(dir=self.bounds.folder, prefix="lower-layers-") as file:
            block = torch.from_file(file.name, shared=True, size=hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
        return block.copy_(hidden)


def _batches(sequences: Sequence[Ids]) -> Iterable[Rows]:
    """Sequences of like length together."""
    batch: list[Ids] = []
    for ids in sorted(sequences, key=len):
        if batch and (len(batch) + 1) * len(ids) > _BATCH_TOKENS:
            yield Rows(tuple(batch))
            batch = []
        batch.append(ids)
    if batch:
        yield Rows(tuple(batch))
