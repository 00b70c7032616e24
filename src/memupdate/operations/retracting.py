"""Retraction: which live facts are meant, and what stands in for each until a compaction. `BatchRun` carries it out.

Invariant: all that is asked for can be retracted, or nothing is, and every problem is told at once. A stand-in has the
key and the phrasings of the fact that it replaces, so that it supersedes it and is trained wherever the fact was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from memupdate.errors import LedgerError, UsageError
from memupdate.facts.model import Fact, normalise
from memupdate.facts.reader import read_facts
from memupdate.facts.secrets import SecretPatterns
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.maintenance import Retraction
from memupdate.ledger.records import FactHistory
from memupdate.operations.session import Session
from memupdate.progress import Progress

BASE_ANSWER = "base"
"""The policy's word for the base model's own answer."""
_ANSWER_TOKENS = 48
"""Longest answer of the base model that stands in for a fact."""
_SHOWN_ID = len("sha256:") + 12


def find_facts(
    ledger: Ledger, collection: str, *, ids: Sequence[str] = (), keys: Sequence[str] = (), file: Path | None = None
) -> list[Fact]:
    """The live facts that are meant, each once.

    Args:
        ids: beginnings of facts' ids.
        keys: facts' keys, or their prompts as a person would write them.
        file: a facts file; each of its facts must be live with this very target.

    Raises:
        UsageError: nothing was named, or something that cannot be retracted; every such thing has a line in `details`.
        FactsError: the file cannot be read.
    """
    if not ids and not keys and file is None:
        raise UsageError("no fact was named", "give a fact's id, --key or --file; see `memupdate facts list`")
    search = _Search(ledger, collection)
    for prefix in ids:
        search.by_id(prefix)
    for key in keys:
        search.by_key(key)
    # What a policy now refuses as a secret may be in the weights from before, and is then what most wants retracting.
    for located in read_facts(file, secrets=SecretPatterns(())).facts if file is not None else ():
        search.by_content(located.fact, f"{file}:{located.line}")
    if search.problems:
        first, count = search.problems[0], len(search.problems)
        message = first if count == 1 else f"{count} facts cannot be retracted from {collection}"
        raise UsageError(
            message, "nothing was changed; see `memupdate facts list`", search.problems if count > 1 else ()
        )
    return list(search.found.values())


class _Search:
    """Looks facts up among the live ones and says what is wrong with each that is not there."""

    def __init__(self, ledger: Ledger, collection: str) -> None:
        self.ledger, self.collection = ledger, collection
        stand_ins = {item.stand_in.id for item in ledger.stand_ins(collection)}
        every = ledger.live_facts(collection)
        self.live = {fact.id: fact for fact in every if fact.id not in stand_ins}
        self.by_any_key: dict[str, list[Fact]] = {}
        for fact in self.live.values():
            for key in {fact.key, normalise(fact.prompt)}:
                self.by_any_key.setdefault(key, []).append(fact)
        self.found: dict[str, Fact] = {}
        self.problems: list[str] = []

    def by_id(self, prefix: str) -> None:
        try:
            detail = self.ledger.fact(prefix)
        except LedgerError as error:
            self.problems.append("; ".join([error.message, *error.details]))
            return
        if detail.fact.id in self.live:
            self.found[detail.fact.id] = detail.fact
        else:
            self.problems.append(self._why_not(detail.fact, prefix, detail.history))

    def by_key(self, key: str) -> None:
        facts = self.by_any_key.get(key) or self.by_any_key.get(normalise(key), [])
        self.found |= {fact.id: fact for fact in facts}
        if not facts and (history := self._history_of(key)):
            self.problems.append(self._why_not(history[-1].fact, key, history))
        elif not facts:
            self.problems.append(f"{key}: no fact of {self.collection} is about this")

    def by_content(self, fact: Fact, where: str) -> None:
        same = [old for old in self.by_any_key.get(fact.key, []) if old.target == fact.target]
        if fact.id in self.live or same:
            old = self.live.get(fact.id) or same[0]
            self.found[old.id] = old
        elif others := self.by_any_key.get(fact.key):
            self.problems.append(f"{where}: {fact.prompt!r} is answered {others[0].target!r} now, not {fact.target!r}")
        else:
            self.problems.append(self._why_not(fact, where, self.ledger.key_history(fact.key, self.collection)))

    def _history_of(self, key: str) -> list[FactHistory]:
        """What was ever taught about a key or a prompt, oldest first; no stand-ins."""
        asked = normalise(key)
        rows = self.ledger.key_history(key, self.collection) or [
            row
            for row in self.ledger.facts_list(self.collection, status=None, search=key.strip(" .:?!"), limit=-1)
            if normalise(row.fact.prompt) == asked
        ]
        return [row for row in rows if row.change not in ("retracting", "dropped")]

    def _why_not(self, fact: Fact, asked: str, history: Iterable[FactHistory]) -> str:
        rows = [row for row in history if row.collection == self.collection]
        if not rows:
            return f"{asked}: {fact.prompt!r} is no fact of {self.collection}"
        last = rows[-1]
        what = f"{asked}: {last.fact.prompt!r} → {last.fact.target!r}"
        if last.status == "live":  # what is live and not among the facts looked through stands in for one
            return f"{what} already stands in for a retracted fact; a compaction drops it"
        if last.status in ("retracted", "dropped"):
            return f"{what} is retracted already"
        if last.status == "superseded":
            now = [f.target for f in self.by_any_key.get(last.fact.key, [])]
            return f"{what} is superseded already" + (f"; the answer is {now[0]!r} now" if now else "")
        return f"{what} is not stored ({last.status})"


def retractions_of(session: Session, facts: Sequence[Fact], progress: Progress) -> list[Retraction]:
    """Each fact with what stands in for it: the policy's text, or the base model's own greedy answer.

    Raises:
        UsageError: a stand-in would say what the fact says, or the base model says nothing; all such facts are listed.
    """
    answer = session.policy.retraction.answer
    answers = _base_answers(session, facts, progress) if answer == BASE_ANSWER else [answer] * len(facts)
    problems = [
        f"{fact.id[:_SHOWN_ID]} {fact.prompt!r}: the stand-in would be {text!r}"
        for fact, text in zip(facts, answers, strict=True)
        if not text.strip() or normalise(text) == normalise(fact.target)
    ]
    if problems:
        whose = "the base model's own answers" if answer == BASE_ANSWER else "the policy's text"
        raise UsageError(
            f"{len(problems)} of {len(facts)} facts cannot be retracted by {whose}",
            "set another text as retraction.answer in the policy; nothing was changed",
            problems,
        )
    return [
        Retraction(fact, replace(fact, target=text, locality=(), source=None, tags=(), external_id=None))
        for fact, text in zip(facts, answers, strict=True)
    ]


def _base_answers(session: Session, facts: Sequence[Fact], progress: Progress) -> list[str]:
    """What the base model says to each prompt, as the text of a target."""
    from memupdate.verification.inprocess import generate_greedy

    base, renderer = session.base, session.renderer
    examples = renderer.render_all(facts)
    prompts = [example.prompt_ids for example in examples]
    generated = generate_greedy(base, base.model, prompts, _ANSWER_TOKENS, progress)
    texts = [str(base.tokenizer.decode(ids, skip_special_tokens=True)) for ids in generated]
    return [
        text.removeprefix(fact.separator) if example.style == "completion" else text
        for fact, example, text in zip(facts, examples, texts, strict=True)
    ]
