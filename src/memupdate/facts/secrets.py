"""Refuses facts that hold a secret: a key in a model's weights answers whoever asks, and cannot be taken back for sure.

Invariant: nothing that is returned here holds the text that matched, only the names of patterns and fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from memupdate.facts.model import Fact

_HIDDEN = "(not shown)"


@dataclass(frozen=True)
class Pattern:
    """One kind of secret."""

    name: str
    meaning: str
    regex: re.Pattern[str]
    hints: tuple[str, ...] = ()
    """Texts of which one is in every match, in lower case; looking for them takes a hundredth of the time of the pattern."""
    luhn: bool = False
    """Whether a match must also have the check digit of payment cards."""

    def finds(self, text: str, lowered: str) -> bool:
        """Whether `text` holds one; `lowered` is the same in lower case."""
        if self.hints and not any(map(lowered.__contains__, self.hints)):
            return False
        if not self.luhn:
            return self.regex.search(text) is not None
        return any(_has_check_digit(match.group()) for match in self.regex.finditer(text))


def _has_check_digit(text: str) -> bool:
    digits = [int(character) for character in text if character.isdecimal()]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


BUILT_IN: dict[str, Pattern] = {
    pattern.name: pattern
    for pattern in (
        Pattern(
            "private-key",
            "private keys in PEM or OpenSSH armour, PuTTY key files",
            re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY( BLOCK)?-----|PuTTY-User-Key-File-\d"),
            ("private key", "putty-user-key-file"),
        ),
        Pattern(
            "aws-key",
            "AWS access key ids, and secret access keys named as such",
            re.compile(
                r"\b(?:AKIA|ASIA|AGPA|AIDA|AROA)[A-Z2-7]{16}\b"
                r"|(?i:aws.{0,20}secret.{0,20}?)[=:]\s*[\"']?[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])"
            ),
            ("akia", "asia", "agpa", "aida", "aroa", "aws"),
        ),
        Pattern(
            "api-token",
            "tokens by their prefix (GitHub, GitLab, Slack, Stripe, OpenAI, Google, Hugging Face, npm, PyPI), JSON web tokens",
            re.compile(
                r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,}|glpat-[\w-]{20}|xox[abeoprs]-[A-Za-z0-9-]{10,}"
                r"|[sr]k_live_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{32,}|AIza[\w-]{35}|hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{36}"
                r"|pypi-[\w-]{40,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
            ),
            ("_", "glpat-", "xox", "sk-", "aiza", "pypi-", "eyj"),  # prose has hardly any underscore
        ),
        Pattern(
            "card-number",
            "payment card numbers: 13 to 19 digits with a right check digit",
            re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.]*\d)"),
            luhn=True,
        ),
        Pattern(
            "env-line",
            "lines like those of a .env file whose name says password, secret, token or key",
            re.compile(
                r"(?im)^\s*(?:export\s+)?[A-Z0-9_]*(?:PASSWORD|PASSWD|SECRET|TOKEN|API_?KEY|PRIVATE_?KEY|ACCESS_?KEY)[A-Z0-9_]*"
                r"\s*=\s*\S{6,}"
            ),
            ("=",),
        ),
    )
}
"""What a policy can name in `facts.refuse`."""

DEFAULT_NAMES = ("private-key", "aws-key", "api-token")
OWN_PREFIX = "re:"
"""How an operator's own regular expression begins in a policy."""


def parse_pattern(text: str) -> Pattern:
    """A built-in pattern by name, or `re:` and a regular expression.

    Raises:
        ValueError: neither; the message says what is allowed.
    """
    if not text.startswith(OWN_PREFIX):
        if text not in BUILT_IN:
            raise ValueError(f"{text!r} is no pattern; allowed: {', '.join(BUILT_IN)}, or re: and a regular expression")
        return BUILT_IN[text]
    own = text.removeprefix(OWN_PREFIX)
    try:
        regex = re.compile(own)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{text!r} is no regular expression ({error}); allowed: what Python's `re` takes") from error
    if regex.search(""):
        raise ValueError(f"{text!r} matches every text; allowed: an expression that matches only what is to be refused")
    return Pattern(text, "the policy's own", regex)


@dataclass(frozen=True)
class SecretPatterns:
    """What is refused."""

    patterns: tuple[Pattern, ...] = field(default=tuple(BUILT_IN[name] for name in DEFAULT_NAMES))

    @cached_property
    def _hints(self) -> tuple[str, ...]:
        """Texts of which one is in every match of any pattern; the empty one where a pattern has none."""
        return tuple(dict.fromkeys(hint for pattern in self.patterns for hint in pattern.hints or ("",)))

    def may_be_in(self, text: str) -> bool:
        """False where `text` and every part of it are without a secret, which takes little time to see."""
        return any(map(text.lower().__contains__, self._hints))

    @classmethod
    def named(cls, texts: Sequence[str]) -> SecretPatterns:
        """See `parse_pattern`. Raises ValueError."""
        return cls(tuple(parse_pattern(text) for text in texts))

    def match(self, text: str) -> str | None:
        """The name of the first pattern that `text` holds."""
        lowered = text.lower()
        return next((pattern.name for pattern in self.patterns if pattern.finds(text, lowered)), None)

    def problems(self, fact: Fact) -> list[tuple[str, str]]:
        """(field, reason) for each text of `fact` that holds a secret; all of its texts are looked at."""
        # Nearly all facts hold none, and one text is looked at faster than many.
        if not self.patterns or not self.may_be_in(_all_text(fact)):
            return []
        found = [(name, kind) for name, text in _texts(fact) if text and (kind := self.match(text))]
        return [(name, f"looks like a secret ({kind}), which the policy refuses") for name, kind in found]

    def without_secrets(self, problems: list[tuple[str, str]], record: str) -> list[tuple[str, str]]:
        """Problems of a record that cannot be read, without what they quote of it, if its text holds a secret."""
        kind = self.match(record)
        if kind is None:
            return problems
        return [(name if self.match(name) is None else _HIDDEN, _unquoted(reason)) for name, reason in problems]


def _unquoted(reason: str) -> str:
    """`reason` up to the first quotation."""
    plain = re.split(r"[\"']", reason, maxsplit=1)
    return reason if len(plain) == 1 else f"{plain[0]}{_HIDDEN}"


def _all_text(fact: Fact) -> str:
    if fact.locality or fact.portability or fact.context:
        return "\n".join(text for _, text in _texts(fact) if text)
    texts = (fact.prompt, fact.target, fact.subject, fact.relation, fact.source, fact.external_id)
    return "\n".join(filter(None, (*texts, *fact.paraphrases, *fact.tags)))


def _texts(fact: Fact) -> Iterator[tuple[str, str | None]]:
    yield "prompt", fact.prompt
    yield "target", fact.target
    yield "subject", fact.subject
    yield "relation", fact.relation
    yield "source", fact.source
    yield "id", fact.external_id
    yield from ((f"paraphrases[{i}]", text) for i, text in enumerate(fact.paraphrases))
    yield from ((f"tags[{i}]", text) for i, text in enumerate(fact.tags))
    yield from ((f"context[{i}].content", turn.content) for i, turn in enumerate(fact.context))
    for name, probes in (("locality", fact.locality), ("portability", fact.portability)):
        for i, probe in enumerate(probes):
            yield f"{name}[{i}].prompt", probe.prompt
            yield f"{name}[{i}].target", probe.target
