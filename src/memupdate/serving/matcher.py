"""The matcher of a release: whether a conversation mentions anything that the release knows.

Invariant: what is matched is whole words, whatever their case, width, composition or the dashes and blanks between them;
a term that is in a text is found, however long the text is, in one pass over it. The file beside the release
(`matcher.json`) is a list of words in JSON, so that nothing of it can be executed; the Aho–Corasick automaton is built
from it in the engine's process. This module knows nothing about requests or the ledger.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ahocorasick

from memupdate.errors import EngineError

SCHEMA_VERSION = 1
_MAX_FILE_BYTES = 512 << 20
# Writing without blanks between words: each character is a word, so that a term is found inside a sentence.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    r"\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7a3"  # kana, Han, Hangul
    r"\U00020000-\U0003ffff"
)
# A word may end in + or #, as C++ and C# do. The underscore is none: Markdown has it around words.
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:[+#]+(?!\w))?")
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
"""Soft hyphens, zero-width characters and direction marks, which would split a word that looks whole."""


class MatcherError(EngineError):
    """A matcher file that cannot be used; the message says which and why."""


class Mention(Protocol):
    """What a fact tells about how it may be mentioned; `memupdate.facts.model.Fact` has it."""

    @property
    def subject(self) -> str | None:
        """What the fact is about."""

    @property
    def prompt(self) -> str:
        """The question, or the key of a passage."""

    @property
    def paraphrases(self) -> tuple[str, ...]:
        """Other wordings."""


@dataclass(frozen=True)
class Matcher:
    """Finds any of a release's terms in a text. Build with `compile_matcher` or `load_matcher`."""

    terms: int
    _automaton: Any

    def mentions(self, texts: Iterable[str]) -> bool:
        """Whether any of `texts` holds a term."""
        if not self.terms:
            return False
        return any(next(self._automaton.iter(words(text)), None) is not None for text in texts)


def words(text: str) -> str:
    """`text` as words between single blanks, with one at each end: NFKC, case-folded, all else dropped."""
    if text.isascii():
        folded = text.lower()
    else:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        folded = _INVISIBLE.sub("", folded)
    return f" {' '.join(_WORD.findall(folded))} "


def terms_of(facts: Iterable[Mention], *, trained: Sequence[Sequence[str]] | None = None) -> tuple[str, ...]:
    """By what a conversation is known to be about `facts`: subjects, and those wordings that do not name theirs.

    Args:
        trained: for each fact the paraphrases that are trained on; the others measure, and must not become terms. None: none.

    Returns:
        Terms as `words` gives them, sorted, without those that contain another one.
    """
    found: set[str] = set()
    for number, fact in enumerate(facts):
        subject = words(fact.subject) if fact.subject else ""
        named = bool(subject.strip())
        if named:
            found.add(subject)
        wordings = (fact.prompt, *(trained[number] if trained is not None else ()))
        found.update(text for text in map(words, wordings) if not (named and subject in text))
    found.discard("  ")
    return _shortest(found)


def compile_matcher(terms: Iterable[str]) -> Matcher:
    """The automaton of `terms`, each as `words` gives it. About a second for a million terms."""
    automaton = ahocorasick.Automaton(ahocorasick.STORE_LENGTH)
    for term in terms:
        automaton.add_word(term)
    count = len(automaton)
    if count:
        automaton.make_automaton()
    return Matcher(count, automaton)


def matcher_json(terms: Sequence[str]) -> str:
    """The text of `matcher.json`."""
    return json.dumps({"schema_version": SCHEMA_VERSION, "terms": list(terms)}, ensure_ascii=False) + "\n"


def load_matcher(path: Path, expected_digest: str) -> Matcher:
    """The matcher at `path`, if its digest is `sha256:…` as expected. Reads and builds: call it in a thread.

    Raises:
        MatcherError: the file is missing, a link, too large, another one, or malformed.
    """
    content = _read(path)
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    if digest != expected_digest:
        raise MatcherError(f"{path}: has digest {digest}, the manifest says {expected_digest}")
    return compile_matcher(_parse_terms(path, content))


def read_terms(path: Path) -> list[str]:
    """The terms in a matcher file, whatever its digest. Raises MatcherError."""
    return _parse_terms(path, _read(path))


def measure_matcher(matcher: Matcher, texts: Sequence[str], *, repeats: int = 1000) -> dict[str, float]:
    """Microseconds that one look at each of `texts` takes: `median_us` and `p99_us` over all looks."""
    took: list[float] = []
    for _ in range(repeats):
        for text in texts:
            started = time.perf_counter()
            matcher.mentions((text,))
            took.append((time.perf_counter() - started) * 1e6)
    took.sort()
    return {"median_us": took[len(took) // 2], "p99_us": took[min(len(took) - 1, round(len(took) * 0.99))]}


def _read(path: Path) -> bytes:
    try:
        # Not blocking: what was put in the file's place may be a pipe.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if os.fstat(file.fileno()).st_size > _MAX_FILE_BYTES:
                raise MatcherError(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
            return file.read(_MAX_FILE_BYTES + 1) or b""
    except (OSError, ValueError) as error:
        raise MatcherError(f"{path}: cannot be read ({error})") from error


def _parse_terms(path: Path, content: bytes) -> list[str]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise MatcherError(f"{path}: not JSON ({error})") from None
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION:
        raise MatcherError(f"{path}: schema_version is {version!r}, this memupdate reads {SCHEMA_VERSION}")
    terms = value.get("terms")
    if not isinstance(terms, list) or not all(isinstance(term, str) and term.strip() for term in terms):
        raise MatcherError(f"{path}: terms must be a list of texts")
    return terms


def _shortest(terms: set[str]) -> tuple[str, ...]:
    """Those in which no other one is found: what is found by the longer is found by the shorter."""
    by_length = sorted(terms, key=lambda term: (len(term), term))
    whole = compile_matcher(by_length)
    if not whole.terms:
        return ()
    kept = []
    for term in by_length:
        lengths = (length for _, length in whole._automaton.iter(term))
        if all(length == len(term) for length in lengths):
            kept.append(term)
    return tuple(sorted(kept))
