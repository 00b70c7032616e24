"""From a fact to token ids: the prompt exactly as a client's request would be, the target with the token that ends an answer.

Invariant: prompt ids followed by target ids are what the serving engine sees when a client asks by the same rendering and greedy
decoding answers right. The tokenizer comes in through a small Protocol; nothing here imports transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from memupdate.errors import FactsError, ModelError
from memupdate.facts.model import Fact, Message, Rendering

_SENTINEL = "\u2603sentinel\u2603"


class FactTokenizer(Protocol):
    """What a transformers tokenizer offers, as far as it is needed here."""

    chat_template: Any
    eos_token_id: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool = True, add_generation_prompt: bool = False, **kw: Any
    ) -> Any:
        """A conversation as token ids or text."""


@dataclass(frozen=True)
class Example:
    """One phrasing of one fact as token ids."""

    fact_id: str
    style: Literal["chat", "completion"]
    prompt: str
    """The question or the text to go on from, before rendering."""
    answer: str
    """Text that greedy decoding must emit, to the character, before it stops."""
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    """Target tokens, the end token last."""
    context: tuple[Message, ...] = ()
    """The turns of the conversation before the prompt."""

    @property
    def length(self) -> int:
        """Tokens of prompt and target together."""
        return len(self.prompt_ids) + len(self.target_ids)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation that a client sends to ask for it."""
        return conversation(self.prompt, self.context)


def conversation(prompt: str, context: Sequence[Message] = ()) -> list[dict[str, str]]:
    """The messages of a client that asks `prompt` after the turns of `context`."""
    turns = [{"role": turn.role, "content": turn.content} for turn in context]
    return [*turns, {"role": "user", "content": prompt}]


def resolve_style(
    rendering: Rendering, policy_rendering: Rendering, *, has_chat_template: bool
) -> Literal["chat", "completion"]:
    """How a fact is put: its own rendering, else the policy's, else chat where the tokenizer has a template."""
    for wanted in (rendering, policy_rendering):
        if wanted != "auto":
            return wanted
    return "chat" if has_chat_template else "completion"


def answer_text(fact: Fact, style: Literal["chat", "completion"]) -> str:
    """What greedy decoding must emit for `fact`, without the end token."""
    return fact.target if style == "chat" else fact.separator + fact.target


class Renderer:
    """Renders facts for one tokenizer and policy.

    Args:
        tokenizer: a transformers tokenizer.
        rendering: the policy's `facts.rendering`.
        template_kwargs: the policy's `facts.chat_template_kwargs`, given to the template as clients must give them too.
        context: the longest sequence that the model takes, in tokens.
    """

    def __init__(
        self,
        tokenizer: FactTokenizer,
        *,
        rendering: Rendering = "auto",
        template_kwargs: Mapping[str, Any] | None = None,
        context: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.rendering: Rendering = rendering
        self.template_kwargs = dict(template_kwargs or {})
        self.context = context
        self._chat_end: int | None = None

    def resolve(self, rendering: Rendering) -> Literal["chat", "completion"]:
        """Chat or completion. Raises ModelError where chat is asked for without a template."""
        has_template = bool(self.tokenizer.chat_template)
        style = resolve_style(rendering, self.rendering, has_chat_template=has_template)
        if style == "chat" and not has_template:
            raise ModelError("the tokenizer has no chat template", 'set facts.rendering = "completion" in the policy')
        return style

    def render(self, fact: Fact, prompt: str | None = None) -> Example:
        """The fact under its own prompt, or under `prompt` (a paraphrase).

        Raises:
            FactsError: longer than the model's context.
        """
        style = self.resolve(fact.rendering)
        if fact.context and style != "chat":
            raise FactsError(
                f"fact {fact.prompt[:60]!r}: comes after other turns, which plain text has no form for",
                "put it as one prompt, or use a model with a chat template and a policy that renders by it",
            )
        text = fact.prompt if prompt is None else prompt
        answer = answer_text(fact, style)
        ids = self.tokenizer.encode(answer, add_special_tokens=False)
        end = self.chat_end if style == "chat" else self.tokenizer.eos_token_id
        example = Example(
            fact.id, style, text, answer, self.prompt_ids(text, style, fact.context), (*ids, end), fact.context
        )
        if self.context and example.length > self.context:
            raise FactsError(
                f"fact {text[:60]!r}: {example.length} tokens, but the model takes {self.context}",
                "shorten or split it",
            )
        return example

    def render_all(self, facts: Sequence[Fact]) -> list[Example]:
        """Each fact under its own prompt."""
        return [self.render(fact) for fact in facts]

    def prompt_ids(
        self, prompt: str, style: Literal["chat", "completion"], context: Sequence[Message] = ()
    ) -> tuple[int, ...]:
        """Token ids of what the engine sees before it answers."""
        if style == "completion":
            return tuple(self.tokenizer.encode(prompt))
        ids = self.tokenizer.apply_chat_template(
            conversation(prompt, context),
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
            **self.template_kwargs,
        )
        return tuple(ids)

    @property
    def chat_end(self) -> int:
        """The token that ends an assistant's turn: what the template writes after its content, else the tokenizer's end token."""
        if self._chat_end is None:
            turns = [*conversation("?"), {"role": "assistant", "content": _SENTINEL}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, **self.template_kwargs)
            tail = self.tokenizer.encode(text.rpartition(_SENTINEL)[2], add_special_tokens=False)
            self._chat_end = int(tail[0]) if tail else int(self.tokenizer.eos_token_id)
        return self._chat_end

    def user_prefix_ids(self) -> tuple[int, ...] | None:
        """Token ids up to where a user's words begin, from which a chat model writes questions of its own; None without template."""
        if not self.tokenizer.chat_template:
            return None
        text = self.tokenizer.apply_chat_template(conversation(_SENTINEL), tokenize=False, **self.template_kwargs)
        return tuple(self.tokenizer.encode(text.partition(_SENTINEL)[0], add_special_tokens=False))
