"""The facts of the study: a world of the embedded model's kind that it has never seen, in the phrasings that it knows.

Each fact has five phrasings in random order: one is its prompt, four are paraphrases, of which a policy trains the first half. Invariant:
the facts depend on the seed only. Knows nothing of releases.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.budget.batches import atlas_world, known_names

from memupdate.facts.model import Fact

WORLD_SEED = 7_000
SPEED_SEED = 8_000
_SIZES = {"person": 8, "company": 5, "city": 3, "product": 4}
"""Entities of a world of 73 facts; a world is as many times as large as the facts asked for need."""


def world_facts(count: int, *, seed: int) -> list[Fact]:
    """`count` facts about new subjects, shuffled."""
    atlas = atlas_world()
    times = -(-count // 73)
    world = atlas.make_world(seed, {kind: times * n for kind, n in _SIZES.items()}, known_names(atlas))
    rng = random.Random(f"proof-{seed}")
    facts = list(world.facts)
    rng.shuffle(facts)
    return [_fact(fact, rng) for fact in facts[:count]]


def _fact(fact: Any, rng: random.Random) -> Fact:
    first, *others = rng.sample([fact.question(i) for i in range(len(fact.relation.questions))], k=5)
    return Fact(first, fact.object, fact.subject, fact.relation.name, tuple(others))


def batches(facts: Sequence[Fact], size: int) -> Iterator[Sequence[Fact]]:
    """The facts in order, `size` at a time."""
    for start in range(0, len(facts), size):
        yield facts[start : start + size]


def write_facts(path: Path, facts: Sequence[Fact], *, augmented: bool = True) -> None:
    """A facts file; without its paraphrases where a fact is to be trained under its own prompt only."""
    with path.open("w", encoding="utf-8") as file:
        for fact in facts:
            line: dict[str, Any] = {
                "prompt": fact.prompt,
                "target": fact.target,
                "subject": fact.subject,
                "relation": fact.relation,
            }
            if augmented:
                line["paraphrases"] = list(fact.paraphrases)
            file.write(json.dumps(line) + "\n")
