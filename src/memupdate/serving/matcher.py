"""The matcher of a release: whether a conversation mentions anything that the release knows.

Invariant: what is matched is whole words, whatever their case, width, composition or the dashes and blanks between them;
a term that is in a text is found, however long the text is, in one pass over it. The file beside the release
(`matcher.json`) is a list of words in JSON, so that nothing of it can be executed; the index is built from it in the
engine's process. It is one of plain sets, by a term's first words: an Aho–Corasick automaton in C (pyahocorasick) is built
without letting go of the interpreter, which for 100,000 terms stopped every stream for 0.4 s, and takes twice the memory.
This module knows nothing about requests or the ledger.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Protocol

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

_BREAK = re.compile(r"[\s.,;:!?、。，．！？]")
"""Where a text can be cut: no word has these in it, and nothing is composed across them."""
_PIECE_CHARS = 1 << 14
"""What is looked at in one go: 2 to 6 ms."""
_RUN_CHARS = 1 << 17
"""What has no place to cut in so many characters is no writing, and is cut where it is."""
_KEYS = (2, 4, 16, 64)
"""Of a term so many of its first words are keys: no text can make us join many long pieces of it at each of its words."""


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


class _Index:
    """Terms by their first words. Looking is linear in the text, times the few lengths of terms that begin alike."""

    def __init__(self) -> None:
        self._terms: set[str] = set()
        self._singles: set[str] = set()
        """Terms of one word."""
        self._firsts: set[str] = set()
        """First words of the others."""
        self._lengths: dict[str, int] = {}
        """First 2, 4, … words of terms → bits: how many words those have; bit 0: some are longer than the next key."""
        self.longest = 0
        """Words of the longest term."""

    def __len__(self) -> int:
        return len(self._terms)

    def add(self, term: str) -> None:
        said = term.split()
        if not said:
            return
        self._terms.add(" ".join(said))
        self.longest = max(self.longest, len(said))
        if len(said) == 1:
            self._singles.add(said[0])
            return
        self._firsts.add(said[0])
        for words_of_key, next_key in zip(_KEYS, (*_KEYS[1:], len(said)), strict=True):
            key, is_longer = " ".join(said[:words_of_key]), len(said) > next_key
            self._lengths[key] = self._lengths.get(key, 0) | (1 if is_longer else 1 << len(said))
            if not is_longer:
                return

    def finds(self, said: Sequence[str]) -> bool:
        """Whether any term is in this list of words."""
        if not self._singles.isdisjoint(said):
            return True
        firsts = self._firsts.intersection(said)
        if not firsts:
            return False
        for start, (word, following) in enumerate(pairwise(said)):
            # Most words end here, so this much is written out: it is most of what a look costs.
            if word in firsts and f"{word} {following}" in self._lengths and self._begins(said, start):
                return True
        return False

    def _begins(self, said: Sequence[str], start: int) -> bool:
        """Whether any term of several words begins there."""
        for words_of_key in _KEYS:
            lengths = self._lengths.get(" ".join(said[start : start + words_of_key]), 0)
            if any(" ".join(said[start : start + length]) in self._terms for length in _bits(lengths >> 1)):
                return True
            if not lengths & 1:
                break
        return False


@dataclass(frozen=True)
class Matcher:
    """Finds any of a release's terms in a text. Build with `compile_matcher` or `load_matcher`."""

    terms: int
    _index: _Index

    def mentions(self, texts: Iterable[str]) -> bool:
        """Whether any of `texts` holds a term."""
        return any(self.scan(texts))

    def scan(self, texts: Iterable[str]) -> Iterator[bool]:
        """True, once, as soon as one of `texts` holds a term; False every few milliseconds till then, for others to go on."""
        looked_chars = 0
        for text in texts if self.terms else ():
            before: list[str] = []
            for piece in _pieces(text):
                said = [*before, *_words(piece)]
                if self._index.finds(said):
                    yield True
                    return
                before = said[max(0, len(said) - self._index.longest + 1) :] if len(piece) < len(text) else []
                looked_chars += len(piece)
                if looked_chars >= _PIECE_CHARS:
                    yield False
                    looked_chars = 0


def words(text: str) -> str:
    """`text` as words between single blanks, with one at each end: NFKC, case-folded, all else dropped."""
    return f" {' '.join(_words(text))} "


def _words(text: str) -> list[str]:
    if text.isascii():
        folded = text.lower()
    else:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        folded = _INVISIBLE.sub("", folded)
    return _WORD.findall(folded)


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
    """The index of `terms`, each as `words` gives it. Some seconds for a million terms, in which other threads go on."""
    index = _Index()
    for term in terms:
        index.add(term)
    return Matcher(len(index), index)


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
    index, kept = _Index(), []
    for term in sorted(terms, key=lambda term: (len(term), term)):
        if not index.finds(term.split()):
            index.add(term)
            kept.append(term)
    return tuple(sorted(kept))


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces of about `_PIECE_CHARS` characters, cut where no word and nothing composed can be."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        found = _BREAK.search(text, start + _PIECE_CHARS, start + _RUN_CHARS)
        end = found.end() if found else start + _RUN_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


@lru_cache(maxsize=4096)
def _bits(number: int) -> tuple[int, ...]:
    """Which bits of `number` are set, counted from 1, the lowest."""
    return tuple(bit + 1 for bit in range(number.bit_length()) if number >> bit & 1)
