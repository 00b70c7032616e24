"""Conversations: the last answer of the assistant is what is to be recalled, after all the turns before it.

Invariant: the prompt is the user's last message, and the turns before that are the fact's context, word for word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from memupdate.facts.fields import Fields
from memupdate.facts.formats.base import checked
from memupdate.facts.formats.native import ROLES, probes
from memupdate.facts.model import Fact, Message, Role


class ChatFormat:
    """`{"messages": [{"role": …, "content": …}, …]}`, as chat APIs and fine-tuning files have it."""

    name = "chat"
    summary = "messages: the last one, the assistant's, is the target; the user's before it the prompt; the turns before that its context"
    keys = (
        "messages",
        "id",
        "subject",
        "relation",
        "paraphrases",
        "locality",
        "portability",
        "source",
        "valid_from",
        "valid_to",
        "tags",
    )

    def detect(self, record: Any) -> bool:
        """See `RecordFormat`."""
        return isinstance(record, Mapping) and "messages" in record

    def parse(self, record: Any) -> tuple[Fact, ...]:
        """See `RecordFormat`."""
        fields = Fields(record, self.keys)
        messages = _messages(fields)
        last = len(messages) - 1
        if not fields.problems:
            if last < 1:
                fields.note("messages", "needs a user's message and the assistant's answer")
            elif messages[last].role != "assistant":
                fields.note(
                    f"messages[{last}].role",
                    f"the last message must be the assistant's, not the {messages[last].role}'s",
                )
            elif messages[last - 1].role != "user":
                fields.note(f"messages[{last - 1}].role", "the message before the last must be the user's")
        fields.raise_problems()
        valid_from, valid_to = fields.period()
        fact = Fact(
            prompt=messages[last - 1].content,
            target=messages[last].content,
            context=messages[: last - 1],
            subject=fields.optional_text("subject"),
            relation=fields.optional_text("relation"),
            paraphrases=fields.texts("paraphrases"),
            locality=probes(fields, "locality"),
            portability=probes(fields, "portability"),
            source=fields.optional_text("source"),
            valid_from=valid_from,
            valid_to=valid_to,
            tags=fields.texts("tags"),
            rendering="chat",
            external_id=fields.optional_id("id"),
        )
        return checked(fields, fact)


def _messages(fields: Fields) -> tuple[Message, ...]:
    found: list[Message] = []
    for place, inner in fields.records("messages", ("role", "content", "name", "weight")):
        role = cast("Role", inner.choice("role", ROLES, "user"))
        if not inner.has("role"):
            inner.note("role", "missing")
        found.append(Message(role, _content(inner)))
        fields.take_problems(place, inner)
    return tuple(found)


def _content(message: Fields) -> str:
    """A text, or the text of `[{"type": "text", "text": …}, …]`."""
    if not message.is_list("content"):
        return message.text("content")
    texts: list[str] = []
    for place, part in message.records("content", ("type", "text")):
        part.choice("type", ("text",), "text")
        texts.append(part.text("text"))
        message.take_problems(place, part)
    if not texts:
        message.note("content", "empty")
    return "".join(texts)
