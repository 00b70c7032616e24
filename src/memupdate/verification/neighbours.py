"""Locality: questions near the facts whose answers must stay as the base model gives them.

The nearest are of the same relation about another subject, and about the same subject in another relation. Probes that are given
are sorted into these two where they say what they are about; more are made from the ledger's own facts: a wording of one fact with
another's subject in it, wherever no live fact and no probe answers that. What the base model says to a question it was not sure of is
a guess: kept apart, since a guess that changes loses nothing that was known. Invariant: no neighbour asks what a live fact
answers. Torch-free.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from memupdate.facts.model import Fact, normalise, prompt_key
from memupdate.verification.questions import fill, template_of

PROBE = "workspace probe"
SAME_RELATION = "same relation, another subject"
SAME_SUBJECT = "same subject, another relation"
GUESSED = " (a guess)"
"""After the neighbourhood, where the base model was not sure of its answer."""


@dataclass(frozen=True)
class Neighbour:
    """One question near the facts."""

    part: str
    """Its neighbourhood."""
    fact_id: str | None
    """The fact that it is near to; None for a probe of the workspace that is near to none in particular."""
    asked: Fact
    """The question; its target is no more than a guess at the base model's answer."""


def is_guess(part: str) -> bool:
    """Whether a part of locality holds what the base model was not sure of."""
    return part.endswith(GUESSED)


def changed_keys(live: Iterable[Fact]) -> set[str]:
    """Keys and wordings that live facts answer: what no neighbour may ask."""
    return {key for fact in live for key in (fact.key, *(prompt_key(p) for p in (fact.prompt, *fact.paraphrases)))}


def sort_probe(probe: Fact, near: Mapping[str, str]) -> str:
    """The neighbourhood of a probe, `near` being what `nearness` gives; "" for none."""
    if probe.subject and f"s:{normalise(probe.subject)}" in near:
        return SAME_SUBJECT
    if probe.relation and f"r:{normalise(probe.relation)}" in near:
        return SAME_RELATION
    return ""


def nearness(live: Iterable[Fact]) -> dict[str, str]:
    """`s:subject` and `r:relation` of live facts, normalised → id of one of them."""
    near: dict[str, str] = {}
    for fact in live:
        if fact.subject and fact.relation:
            near.setdefault(f"s:{normalise(fact.subject)}", fact.id)
            near.setdefault(f"r:{normalise(fact.relation)}", fact.id)
    return near


def made_neighbours(
    facts: Sequence[Fact], live: Sequence[Fact], probes: Sequence[Fact], *, seed: int
) -> list[Neighbour]:
    """At most one neighbour of each kind for each of `facts`, the same ones for the same seed.

    Subjects are exchanged only between those that are of a kind: they, or others that they share a relation with, are asked the same.
    """
    known = _Known.of([*live, *probes])
    taken = changed_keys(live) | changed_keys(probes)
    rng = random.Random(seed)
    found: list[Neighbour] = []
    others: dict[str, Sequence[str]] = {}
    for fact in facts:
        if not fact.subject or not fact.relation or fact.context:
            continue
        subject, relation = normalise(fact.subject), normalise(fact.relation)
        candidates: list[tuple[str, str, str, str]] = []
        if relation not in others:
            others[relation] = known.lacking(relation)
        lacking = others[relation]
        template = template_of(fact.prompt, fact.subject)
        if lacking and template is not None:
            candidates.append((SAME_RELATION, template, known.spelling[rng.choice(lacking)], fact.relation))
        absent = sorted((known.kind_of(relation) & known.templates.keys()) - known.relations[subject])
        if absent:
            other = rng.choice(absent)
            candidates.append((SAME_SUBJECT, known.templates[other], fact.subject, other))
        for part, wording, about, asked_of in candidates:
            asked = Fact(fill(wording, about), "?", subject=about, relation=asked_of, rendering=fact.rendering)
            keys = {asked.key, prompt_key(asked.prompt)}
            if not taken & keys:
                found.append(Neighbour(part, fact.id, asked))
                taken |= keys
    return found


@dataclass(frozen=True)
class _Known:
    """Subjects and relations of facts and probes, normalised."""

    subjects: Sequence[str]
    relations: Mapping[str, Set[str]]
    """Of each subject."""
    holders: Mapping[str, Set[str]]
    """Subjects of each relation."""
    spelling: Mapping[str, str]
    templates: Mapping[str, str]
    """Of each relation one."""

    @classmethod
    def of(cls, facts: Iterable[Fact]) -> _Known:
        relations: dict[str, set[str]] = defaultdict(set)
        holders: dict[str, set[str]] = defaultdict(set)
        spelling: dict[str, str] = {}
        templates: dict[str, str] = {}
        for fact in facts:
            if not fact.subject or not fact.relation:
                continue
            subject, relation = normalise(fact.subject), normalise(fact.relation)
            relations[subject].add(relation)
            holders[relation].add(subject)
            spelling.setdefault(subject, fact.subject)
            template = template_of(fact.prompt, fact.subject)
            if template is not None and not fact.context:
                templates.setdefault(relation, template)
        return cls(sorted(relations), relations, holders, spelling, templates)

    def kind_of(self, relation: str) -> set[str]:
        """All relations of subjects that have this one."""
        return {other for subject in self.holders[relation] for other in self.relations[subject]}

    def lacking(self, relation: str) -> list[str]:
        """Subjects of that kind of which it is not known."""
        kind = self.kind_of(relation)
        return [s for s in self.subjects if relation not in self.relations[s] and self.relations[s] & kind]
