"""The `Fact`: what an operator wants the model to know, its identity and its key.

Invariant: two facts with the same content have the same `id`, whatever file or field order they came in. Nothing here
reads files or knows tokenizers.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from memupdate.storage import canonical_json, text_sha256

Rendering = Literal["auto", "chat", "completion"]
"""How a fact is put to the model: by the chat template, as plain text, or (`auto`) as policy and tokenizer say."""


@dataclass(frozen=True)
class Probe:
    """A prompt whose answer must not change. `target` is the expected answer where it is known."""

    prompt: str
    target: str | None = None


@dataclass(frozen=True)
class Fact:
    """One fact to be recalled verbatim: given `prompt`, greedy decoding must emit `target` and then stop.

    For `rendering="completion"` the model sees `prompt` and must continue with `separator + target`.
    """

    prompt: str
    target: str
    subject: str | None = None
    relation: str | None = None
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    source: str | None = None
    """Where the operator has it from (free text), not the file; no part of the identity."""
    valid_from: str | None = None
    """ISO 8601 date or time from which it is true."""
    tags: tuple[str, ...] = ()
    rendering: Rendering = "auto"
    separator: str = " "
    external_id: str | None = None
    """The `id` given in the file; no part of the identity."""

    @cached_property
    def id(self) -> str:
        """Content address `sha256:<hex>` over what the model is taught and when it holds."""
        content = {
            "prompt": self.prompt,
            "target": self.target,
            "subject": self.subject,
            "relation": self.relation,
            "paraphrases": list(self.paraphrases),
            "rendering": self.rendering,
            "separator": self.separator,
            "valid_from": self.valid_from,
        }
        return text_sha256(canonical_json(content))

    @cached_property
    def key(self) -> str:
        """What the fact is about: subject and relation where both are given, else the normalised prompt.

        Two facts with one key and different targets contradict each other; the later one supersedes.
        """
        if self.subject and self.relation:
            return f"sr:{normalise(self.subject)}\x1f{normalise(self.relation)}"
        return prompt_key(self.prompt)


def prompt_key(prompt: str) -> str:
    """The key of a fact that is known by its prompt alone."""
    return f"p:{normalise(prompt)}"


def normalise(text: str) -> str:
    """NFKC, case-folded, white space collapsed, closing punctuation dropped: texts that a person calls the same."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    collapsed = " ".join(folded.split())
    return collapsed.rstrip(" .:?!") or collapsed
