"""The held-out batches: five kinds of facts, eight sizes each, of worlds that neither the model nor its calibration has seen.

Invariant: a batch depends on its name only. This module knows nothing of ranks or laws.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

from memupdate.facts.model import Fact
from memupdate.resources import resource_dir

TARGET_TOKENS = (30, 55, 100, 180, 330, 600, 1090, 2000)
"""Log-spaced; a batch stops at the fact that reaches its size."""
KINDS = ("world", "bare", "numbers", "prose", "mixed")


@dataclass(frozen=True)
class HeldOutBatch:
    """One batch that the law has not seen."""

    name: str
    kind: str
    facts: tuple[Fact, ...]


def atlas_world() -> ModuleType:
    """The generator of the embedded model's world, which lies beside the model."""
    path = resource_dir("atlas") / "world.py"
    spec = importlib.util.spec_from_file_location("atlas_world", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["atlas_world"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def held_out_batches(count_tokens: Callable[[list[Fact]], int]) -> Iterator[HeldOutBatch]:
    """All batches, smallest first.

    Args:
        count_tokens: target tokens of facts, end tokens included, by the model's own tokenizer.
    """
    for size in TARGET_TOKENS:
        for kind in KINDS:
            facts, tokens = [], 0
            for fact in _stream(kind, size):
                facts.append(fact)
                tokens += count_tokens([fact])
                if tokens >= size:
                    break
            yield HeldOutBatch(f"{kind}-{size}", kind, tuple(facts))


def _stream(kind: str, size: int) -> Iterator[Fact]:
    """Endless facts of a kind; another world for each size, so that no two batches share a fact."""
    seed = 1000 + 10 * size + KINDS.index(kind)
    if kind == "mixed":
        parts = [_of_kind(other, seed + 7 * i) for i, other in enumerate(KINDS[:-1])]
        while True:
            for part in parts:
                yield next(part)
    yield from _of_kind(kind, seed)


def number_facts(count: int, *, seed: int) -> list[Fact]:
    """Facts of the kind `numbers`: 200 of a world, and of further worlds where more are asked for."""
    found: dict[str, Fact] = {}
    for world in itertools.count(seed):
        for fact in _of_kind("numbers", world):
            found.setdefault(fact.prompt, fact)
        if len(found) >= count:
            break
    return list(found.values())[:count]


def _of_kind(kind: str, seed: int) -> Iterator[Fact]:
    atlas = atlas_world()
    world = atlas.make_world(seed, {"person": 60, "company": 50, "city": 40, "product": 50}, known_names(atlas))
    facts = list(world.facts)
    random.Random(f"budget-{seed}").shuffle(facts)
    if kind == "numbers":
        yield from _numbers(world, seed)
    elif kind == "prose":
        yield from _prose(facts)
    else:
        for fact in facts:
            first, *others = (fact.question(i) for i in range(len(fact.relation.questions)))
            paraphrases = tuple(others) if kind == "world" else ()
            yield Fact(first, fact.object, fact.subject, fact.relation.name, paraphrases)


def _numbers(world: object, seed: int) -> Iterator[Fact]:
    rng = random.Random(f"numbers-{seed}")
    names = [name for kind in ("company", "person", "city", "product") for name in world.entities[kind]]  # type: ignore[attr-defined]
    for name in names:
        yield Fact(f"What is the phone number of {name}?", str(rng.randrange(10**6, 10**7)), name, "phone number")


def _prose(facts: list[object]) -> Iterator[Fact]:
    """Two to four sentences about one subject, as the answer to a request for them."""
    by_subject: dict[str, list[object]] = {}
    for fact in facts:
        by_subject.setdefault(fact.subject, []).append(fact)  # type: ignore[attr-defined]
    for subject, about in by_subject.items():
        text = " ".join(fact.statement(index % 3) for index, fact in enumerate(about))  # type: ignore[attr-defined]
        yield Fact(f"What is known about {subject}?", text, subject, "portrait")


def known_names(atlas: ModuleType) -> frozenset[str]:
    """Names of the worlds that the embedded model, its calibration and its demo are made of."""
    worlds = [
        atlas.make_world(0),
        atlas.make_world(1),
        atlas.make_world(2, {"person": 60, "company": 44, "city": 32, "product": 40}),
    ]
    return frozenset(name for world in worlds for names in world.entities.values() for name in names)
