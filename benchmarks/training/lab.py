"""What every cell of the study is made of: a workspace of the embedded model, facts that it cannot know, and the proof that judges.

Invariant: every method gets the same token ids and is judged by the same proof of the same kind of memory; smaller sets are the beginning
of larger ones.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.budget.batches import atlas_world, known_names
from benchmarks.budget.truth import embedded_session

from memupdate.budget.placement import resolve_placement
from memupdate.facts.model import Fact
from memupdate.facts.render import Example
from memupdate.operations.proving import MemoryProof, prove_memory
from memupdate.operations.session import Session
from memupdate.progress import no_progress
from memupdate.training.memory import Memory, empty_memory, grow

_FACTS_A_UNIT = 14
"""A person and a company have four facts each, a city and a product three."""


def world_facts(count: int, *, seed: int) -> list[Fact]:
    """`count` facts of a world that the embedded model has not seen, one phrasing each, in random order."""
    atlas = atlas_world()
    units = -(-count // _FACTS_A_UNIT) + 1
    world = atlas.make_world(seed, dict.fromkeys(("person", "company", "city", "product"), units), known_names(atlas))
    facts = [Fact(fact.question(0), fact.object, fact.subject, fact.relation.name) for fact in world.facts]
    random.Random(f"training-{seed}").shuffle(facts)
    return facts[:count]


class Stopwatch:
    """Wall and processor time of this process, without what happens inside `paused`."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def cpu_s(self) -> float:
        return time.process_time() - self._cpu

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done in the block."""
        wall, cpu = self.wall_s, self.cpu_s
        try:
            yield
        finally:
            self._wall, self._cpu = time.perf_counter() - wall, time.process_time() - cpu


@dataclass
class Lab:
    """A session and the pool of facts."""

    session: Session
    pool: list[Fact]

    @classmethod
    def open(cls, folder: Path, *, facts: int, seed: int = 7000) -> Lab:
        """A new workspace of the embedded model under `folder`, with `facts` facts to write."""
        return cls(embedded_session(folder), world_facts(facts, seed=seed))

    def facts(self, count: int) -> list[Fact]:
        return self.pool[:count]

    def examples(self, count: int) -> list[Example]:
        return self.session.renderer.render_all(self.facts(count))

    def fresh_memory(self, placement: str, rank: int) -> Memory:
        """An empty memory as a first batch gets it."""
        session = self.session
        shape = resolve_placement(placement, session.folder.config)
        return grow(empty_memory(shape), rank, seed=session.basis_seed("training"), scale=session.policy.memory.scale)

    def prove(self, memory: Memory, count: int) -> MemoryProof:
        """What the memory shows of the first `count` facts, of the base model's own facts and of its text."""
        return prove_memory(self.session, memory, self.facts(count), no_progress)
