"""Which texts that a model offers as other wordings of a fact's question are taken: rules that a person can check, in a fixed order.

Invariant: what is taken names what the prompt names, gives nothing of the answer away, and is no question of another fact, so that a
file with such wordings added reads back with all of its facts. Whether a text means the same is not judged here: no rule can, and who
reads the file does. Torch-free.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from memupdate.facts.model import Fact, contains_words, normalise
from memupdate.facts.secrets import SecretPatterns

LONGEST_RATIO = 3
"""Characters of a wording over those of the prompt, at most, and the other way round."""

_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|‘([^’]+)’(?!\w)|(?<!\w)'([^']+)'(?!\w)")
_WORD = re.compile(r"\w+(?:[-.&]\w+)*")
_SENTENCE_START = re.compile(r"(?:^|[.?!:]\s)\W*$")
_LIST_MARK = re.compile(r"(?:[-*•]|\d{1,2}[.)])\s+")
_QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "'": "'", "`": "`"}
_QUESTION_MARKS = ("?", "？", "؟")
_JOINERS = str.maketrans("", "", "\u200c\u200d")
"""Characters that some scripts write inside words, and that Python does not call printable."""


@dataclass(frozen=True)
class Asked:
    """A fact and one text that might ask for it."""

    fact: Fact
    text: str

    @cached_property
    def said(self) -> str:
        """The text, normalised."""
        return normalise(self.text)

    def names(self, words: Iterable[str]) -> Iterator[bool]:
        """For each of `words` whether the text has it, as whole words."""
        return (contains_words(self.said, normalise(word)) for word in words)


class WordingFilter:
    """Judges texts one after the other; what it took counts for those that follow.

    Args:
        facts: whose questions no other fact's wording may be, no two with one key.
        wordings: all questions that a fact answers already, its prompt first.
        secrets: what a text may not look like.
    """

    def __init__(
        self, facts: Iterable[Fact], wordings: Callable[[Fact], Sequence[str]], secrets: SecretPatterns
    ) -> None:
        self._secrets = secrets
        self._asks_for: dict[str, str] = {}
        for fact in facts:
            for wording in wordings(fact):
                self._asks_for.setdefault(fact.wording_key(wording), fact.key)
        self.dropped: Counter[str] = Counter()
        """Texts that were not taken, by the name of the first rule that they broke."""

    def take(self, fact: Fact, text: str) -> str | None:
        """The wording that `text` offers for `fact`, tidied; None where it breaks a rule."""
        asked = Asked(fact, tidied(text))
        broken = next((rule.name for rule in RULES if rule.breaks(self, asked)), None)
        if broken is not None:
            self.dropped[broken] += 1
            return None
        self._asks_for[fact.wording_key(asked.text)] = fact.key
        return asked.text

    def asks_for(self, asked: Asked) -> str | None:
        """The key of the fact that the text asks for already."""
        return self._asks_for.get(asked.fact.wording_key(asked.text))

    def holds_secret(self, asked: Asked) -> bool:
        """Whether the text looks like a secret that the policy refuses."""
        return self._secrets.match(asked.text) is not None


class Rule(NamedTuple):
    """One reason not to take a text."""

    name: str
    reason: str
    """What is wrong with a text that breaks it."""
    breaks: Callable[[WordingFilter, Asked], bool]


def tidied(text: str) -> str:
    """`text` on one line without a list's mark and the quotation marks around all of it; empty where it is not one line of text."""
    lines = [line for line in text.splitlines() if not line.isspace() and line]
    if len(lines) != 1:
        return ""
    line = " ".join(_LIST_MARK.sub("", lines[0].strip(), count=1).split())
    inner = line[1:-1]
    if len(line) > 2 and _QUOTES.get(line[0]) == line[-1] and line[0] not in inner and line[-1] not in inner:
        line = inner.strip()
    return line if line.translate(_JOINERS).isprintable() and "\ufffd" not in line else ""


def is_question(text: str) -> bool:
    """Whether it ends with a question mark, closing quotation marks and brackets aside."""
    return text.rstrip(" \"'”’»)]").endswith(_QUESTION_MARKS)


def named_in(text: str) -> tuple[str, ...]:
    """What another wording of `text` must say too: its numbers, what it quotes, and its names.

    A name is a word with a capital letter, at the beginning of a sentence one with a capital further on ("What", but "IBM").
    """
    quoted = (next(filter(None, match.groups())) for match in _QUOTED.finditer(text))
    return tuple(dict.fromkeys((*numbers_in(text), *quoted, *_names(text))))


def numbers_in(text: str) -> tuple[str, ...]:
    """Runs of digits, with what joins them: `1,250.50`, `2026-03-01`."""
    return tuple(_NUMBER.findall(unicodedata.normalize("NFKC", text)))


def _names(text: str) -> Iterator[str]:
    for match in _WORD.finditer(text):
        word = match.group()
        starts = _SENTENCE_START.search(text, 0, match.start()) is not None
        if word != "I" and any(character.isupper() for character in (word[1:] if starts else word)):
            yield word


def _omits_subject(_: WordingFilter, asked: Asked) -> bool:
    subject = normalise(asked.fact.subject or "")
    return contains_words(normalise(asked.fact.prompt), subject) and not contains_words(asked.said, subject)


def _omits_a_name(_: WordingFilter, asked: Asked) -> bool:
    return not all(asked.names(named_in(asked.fact.prompt)))


def _adds_a_number(_: WordingFilter, asked: Asked) -> bool:
    return not set(numbers_in(asked.text)) <= set(numbers_in(asked.fact.prompt))


def _gives_the_answer(_: WordingFilter, asked: Asked) -> bool:
    prompt = Asked(asked.fact, asked.fact.prompt)
    parts = named_in(asked.fact.target)
    told = (part for part, known in zip(parts, prompt.names(parts), strict=True) if not known)
    return any(asked.names((asked.fact.target, *told)))


def _has_another_length(_: WordingFilter, asked: Asked) -> bool:
    length, given = len(asked.text), len(asked.fact.prompt)
    return length > LONGEST_RATIO * given or given > LONGEST_RATIO * length


RULES = (
    Rule("line", "no text, not one line, or cut off before its end", lambda _, asked: not asked.text),
    Rule("repeated", "says what the prompt or another wording says", lambda f, a: f.asks_for(a) == a.fact.key),
    Rule("other fact", "is a question of another fact", lambda f, a: f.asks_for(a) is not None),
    Rule("subject", "does not name the subject, which the prompt names", _omits_subject),
    Rule("names", "leaves out a number, quotation or name of the prompt", _omits_a_name),
    Rule("numbers", "has a number that the prompt has not", _adds_a_number),
    Rule("answer", "has the answer in it, or a number or name of the answer", _gives_the_answer),
    Rule("secret", "looks like a secret, which the policy refuses", lambda f, a: f.holds_secret(a)),
    Rule("length", "under a third of the prompt's length, or over three times", _has_another_length),
    Rule("question", "a question where the prompt is none, or the other way round",
         lambda _, a: is_question(a.text) != is_question(a.fact.prompt)),
)  # fmt: skip
"""In the order in which they are asked; a text is counted under the first that it breaks."""
