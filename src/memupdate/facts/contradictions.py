"""Facts of one file against each other: which say what an earlier one said, which contradict it.

Invariant: of the facts that are neither repeats, refused nor contradicted, no two share an id or a key, and no wording asks for two
answers. Memory grows with the facts that are added; whoever has a million of them adds only those that share a question with another
one, with the same result. The ledger is not known here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import NamedTuple

from memupdate.facts.files import Problem, Unit
from memupdate.facts.model import Fact, normalise

_SHOWN_CHARACTERS = 60


class _Told(NamedTuple):
    seq: int
    line: int
    fact: Fact


class Contradictions:
    """Add facts in the order of their file; then read the four lists.

    Args:
        unit: what the lines of the file count.
    """

    def __init__(self, unit: Unit) -> None:
        self._unit: Unit = unit
        self.kept: list[int] = []
        """seq of each fact that says something of its own, the contradicted ones included."""
        self.repeats: list[tuple[int, int]] = []
        """(seq, seq of the earlier fact that says the same)."""
        self.refused: list[tuple[int, Problem]] = []
        """(seq, why) of those that do not fit what an earlier line says."""
        self.contradicted: list[tuple[int, Problem]] = []
        """(seq, why) of the earlier lines, each once."""
        self._by_key: dict[str, _Told] = {}
        self._by_wording: dict[str, _Told] = {}
        """Prompts and paraphrases, normalised, and who asks them first."""
        self._named: set[int] = set()
        self._refused_ids: dict[str, Problem] = {}

    def add(self, seq: int, line: int, fact: Fact) -> None:
        """The next fact.

        Args:
            seq: what the lists name it by.
            line: its place in the file.
        """
        if (problem := self._refused_ids.get(fact.id)) is not None:  # said once more, it fits no better
            self.refused.append((seq, replace(problem, line=line)))
            return
        told = _Told(seq, line, fact)
        old = self._by_key.get(fact.key)
        if old is not None and says_the_same(old.fact, fact):
            self.repeats.append((seq, old.seq))
            return
        other = old or self._asks_the_same(fact)
        if other is None:
            self.kept.append(seq)
            self._by_key[fact.key] = told
            for wording in wordings(fact):
                self._by_wording.setdefault(wording, told)
        elif other.fact.target == fact.target:
            unit = self._unit
            reason = f"says what {unit} {other.line} says, otherwise; make one {unit} of them, with paraphrases"
            self._refuse(told, Problem(line, "prompt", reason, unit))
        else:
            self._contradict(other, told)

    def _refuse(self, told: _Told, problem: Problem) -> None:
        self.refused.append((told.seq, problem))
        self._refused_ids[told.fact.id] = problem

    def _asks_the_same(self, fact: Fact) -> _Told | None:
        """An earlier fact that asks one of this fact's questions and answers it differently."""
        others = (self._by_wording.get(wording) for wording in wordings(fact))
        return next((other for other in others if other and other.fact.target != fact.target), None)

    def _contradict(self, old: _Told, new: _Told) -> None:
        unit = self._unit
        reason = f"{_quoted(new.fact.target)} contradicts {unit} {old.line}, which has {_quoted(old.fact.target)}"
        self._refuse(new, Problem(new.line, "target", reason, unit))
        if old.seq not in self._named:
            self._named.add(old.seq)
            self.contradicted.append((old.seq, Problem(old.line, "target", f"contradicted by {unit} {new.line}", unit)))


def says_the_same(old: Fact, new: Fact) -> bool:
    """Whether two facts teach the same, but for case, spacing and closing punctuation of the prompt."""
    return (
        (old.target, old.rendering, old.separator, old.context)
        == (new.target, new.rendering, new.separator, new.context)
        and (old.paraphrases, old.valid_from, old.valid_to) == (new.paraphrases, new.valid_from, new.valid_to)
        and normalise(old.prompt) == normalise(new.prompt)
        and (old.subject, old.relation) == (new.subject, new.relation)
    )


def wordings(fact: Fact) -> list[str]:
    """Its questions, normalised, the prompt first; some may be equal."""
    return [fact.wording_key(wording) for wording in (fact.prompt, *fact.paraphrases)]


def _quoted(text: str) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 3] + '..."'
