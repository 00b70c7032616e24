"""The `Fact`: what an operator wants the model to know, its identity and its key.

Invariant: two facts with the same content have the same `id`, whatever file or field order they came in. Nothing here
reads files or knows tokenizers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from json.encoder import encode_basestring
from typing import Any, Literal

from memupdate.storage import text_sha256

Rendering = Literal["auto", "chat", "completion"]
"""How a fact is put to the model: by the chat template, as plain text, or (`auto`) as policy and tokenizer say."""


Role = Literal["system", "developer", "user", "assistant"]


@dataclass(frozen=True)
class Probe:
    """A further question: one whose answer must not change (locality), or one that the new fact implies (portability).

    `target` is the expected answer where it is known.
    """

    prompt: str
    target: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn of the conversation that a fact's prompt goes on from."""

    role: Role
    content: str


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
    valid_to: str | None = None
    """ISO 8601 date or time from which it is true no more."""
    portability: tuple[Probe, ...] = ()
    """Questions that whoever knows the fact can answer; measured, never trained on, and no part of the identity."""
    context: tuple[Message, ...] = ()
    """The turns before `prompt`, which is then the user's last message; a client must send them too."""

    @cached_property
    def id(self) -> str:
        """Content address `sha256:<hex>` over what the model is taught and when it holds."""
        # Canonical JSON, put together by hand: `json.dumps` takes longer than all the rest of reading a fact.
        until = "" if self.valid_to is None else f',"valid_to":{_json(self.valid_to)}'
        turns = "" if not self.context else f'"context":[{",".join(map(_turn_json, self.context))}],'
        return text_sha256(
            f'{{{turns}"paraphrases":[{",".join(map(_json, self.paraphrases))}],"prompt":{_json(self.prompt)},'
            f'"relation":{_json(self.relation)},"rendering":{_json(self.rendering)},"separator":{_json(self.separator)},'
            f'"subject":{_json(self.subject)},"target":{_json(self.target)},"valid_from":{_json(self.valid_from)}{until}}}'
        )

    @cached_property
    def key(self) -> str:
        """What the fact is about: subject and relation where both are given, else the normalised prompt.

        Two facts with one key and different targets contradict each other; the later one supersedes.
        """
        if self.subject and self.relation:
            return f"sr:{normalise(self.subject)}\x1f{normalise(self.relation)}"
        return self.wording_key(self.prompt)

    def wording_key(self, wording: str) -> str:
        """What identifies a question: the normalised wording, and the turns before it where there are any."""
        if not self.context:
            return prompt_key(wording)
        turns = "\x1f".join(f"{turn.role}:{normalise(turn.content)}" for turn in self.context)
        return f"c:{turns}\x1f{normalise(wording)}"


def fact_of(values: Mapping[str, Any]) -> Fact:
    """`Fact(**values)` in a sixth of the time, by which a million facts are read: a frozen dataclass sets its fields one by one.

    What `values` leaves out has its default from the class.
    """
    fact = object.__new__(Fact)
    fact.__dict__.update(values)
    return fact


def _json(text: str | None) -> str:
    return "null" if text is None else encode_basestring(text)


def _turn_json(turn: Message) -> str:
    return f'{{"content":{_json(turn.content)},"role":{_json(turn.role)}}}'


def prompt_key(prompt: str) -> str:
    """The key of a fact that is known by its prompt alone."""
    return f"p:{normalise(prompt)}"


def normalise(text: str) -> str:
    """NFKC, case-folded, white space collapsed, closing punctuation dropped: texts that a person calls the same."""
    # Normalising ASCII changes nothing and takes half of the time of storing a fact.
    folded = text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    collapsed = " ".join(folded.split())
    return collapsed.rstrip(" .:?!") or collapsed


def contains_words(text: str, words: str) -> bool:
    """Whether `words` stand in `text` as whole words, both being normalised: "19" is no part of "1999"."""
    return bool(words) and re.search(_edge(words[0], "<") + re.escape(words) + _edge(words[-1], ""), text) is not None


def _edge(character: str, behind: str) -> str:
    """No letter or digit may stand beside it. Scripts that write words without spaces have no such edge."""
    bounded = character.isdigit() or character.upper() != character.lower()
    return rf"(?{behind}!\w)" if bounded else ""
