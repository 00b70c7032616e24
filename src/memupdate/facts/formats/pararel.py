"""ParaRel with its templates filled in: one fact in many wordings, as a list of `[sentence with [MASK], answer, relation]`.

Invariant: only sentences that end at the mask become wordings, since the model writes from left to right.
"""

from __future__ import annotations

from typing import Any

from memupdate.facts.fields import Fields
from memupdate.facts.formats.base import checked, paraphrases_of
from memupdate.facts.model import Fact

MASK = "[MASK]"


class ParaRelFormat:
    """One element of ParaRel instantiated."""

    name = "pararel"
    summary = "a list of [sentence with [MASK], answer, relation]: ParaRel instantiated; sentences that end at the mask"

    def detect(self, record: Any) -> bool:
        """See `RecordFormat`."""
        return isinstance(record, list) and bool(record) and isinstance(record[0], list) and len(record[0]) == 3

    def parse(self, record: Any) -> tuple[Fact, ...]:
        """See `RecordFormat`."""
        fields = Fields({})
        answers: set[tuple[str, str]] = set()
        wordings: list[str] = []
        for index, triple in enumerate(record):
            if not (isinstance(triple, list) and len(triple) == 3 and all(isinstance(text, str) for text in triple)):
                fields.note(f"[{index}]", "must be a list of sentence, answer and relation")
                continue
            sentence, answer, relation = triple
            answers.add((answer, relation))
            before, mask, after = sentence.partition(MASK)
            if not mask:
                fields.note(f"[{index}][0]", f"no {MASK} in it")
            elif before.strip() and not after.strip(" ."):
                wordings.append(before.rstrip())
        fields.raise_problems()
        if not wordings:
            fields.note("[0][0]", f"no sentence ends at {MASK}")
        if len(answers) != 1:
            fields.note("[0][1]", "the sentences have different answers or relations")
        fields.raise_problems()
        ((answer, relation),) = answers
        inner = Fields({"[0][0]": wordings[0], "[0][1]": answer, "[0][2]": relation})
        fact = Fact(
            prompt=inner.text("[0][0]"),
            target=inner.text("[0][1]"),
            paraphrases=paraphrases_of(wordings[0], wordings[1:]),
            tags=(inner.text("[0][2]"),),
            rendering="completion",
        )
        return checked(inner, fact)
