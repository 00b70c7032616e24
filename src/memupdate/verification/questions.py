"""What is asked of a release beyond its facts' own prompts: the questions of each measure, with the answers that are expected.

*Recall*: phrasings that were trained on. *Generality*: phrasings kept apart from training, templates that other facts of the relation
use, the other rendering (chat against completion), a system prompt. *Portability*: what the facts themselves ask. Locality is in
`neighbours`. Invariant: no question is the fact's own prompt in its own form, and none is asked twice of one fact. Torch-free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from memupdate.errors import MemupdateError
from memupdate.facts.model import Fact, Message, Rendering, contains_words, normalise
from memupdate.facts.render import Example, Renderer
from memupdate.ledger.measures import Judged, Measure

TRAINED = "trained phrasing"
HELD_OUT = "held-out phrasing"
TEMPLATE = "template of its relation"
RENDERING = "other rendering"
SYSTEM = "system prompt"
GIVEN = "given"

OTHER_WORDINGS = (HELD_OUT, TEMPLATE)
"""Parts of generality that a policy's bound is held against: other words for the same question, put in the same form."""

_TEMPLATES_PER_FACT = 2
"""Wordings borrowed from other facts of the relation."""
_HOLE = "\0"

Phrasings = Callable[[Fact], tuple[Sequence[str], Sequence[str]]]
"""A fact's further wordings: those trained on, those kept apart."""


@dataclass(frozen=True)
class Question:
    """One question and the answer expected."""

    measure: Measure
    part: str
    """Which wording, which neighbourhood."""
    fact_id: str | None
    """The fact that it is asked for; None for the workspace's probes."""
    example: Example
    """Its `target_ids` are the expected answer."""


@dataclass(frozen=True)
class Answered:
    """A question with what came out."""

    question: Question
    judged: Judged
    expected: str
    answer: str | None
    """None where it is what was expected."""
    min_probability: float
    """Of the expected answer's weakest token, 0 to 1."""


def judge_text(expected: str, answer: str, *, stopped: bool) -> Judged:
    """How a free answer matches: to the character and then stopped; normalised (`facts.model.normalise`: case, spaces, closing
    punctuation); contained as whole words in a longer or unfinished one; not at all."""
    if stopped and answer == expected:
        return "exact"
    wanted, said = normalise(expected), normalise(answer)
    if stopped and said == wanted:
        return "normalised"
    return "contained" if contains_words(said, wanted) else "other"


def fact_questions(
    renderer: Renderer, facts: Sequence[Fact], live: Sequence[Fact], phrasings: Phrasings, *, system_prompt: str
) -> list[Question]:
    """Recall, generality and portability of `facts`, in their order.

    Args:
        live: all facts of the release, whose templates are borrowed.
        system_prompt: what a client's system turn might say; "" asks none.
    """
    borrowed = templates_by_relation(live)
    questions: list[Question] = []
    for fact in facts:
        asked = {fact.wording_key(fact.prompt)}
        trained, held_out = phrasings(fact)
        for part, wordings in (
            (TRAINED, trained),
            (HELD_OUT, held_out),
            (TEMPLATE, _borrowed(fact, borrowed, (*trained, *held_out))),
        ):
            questions += _worded(renderer, fact, part, wordings, asked)
        questions += _other_forms(renderer, fact, system_prompt)
        questions += _portability(renderer, fact)
    return questions


def templates_by_relation(facts: Iterable[Fact]) -> Mapping[str, Sequence[str]]:
    """Normalised relation → wordings of its facts with a hole where the subject stands, each once."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for fact in facts:
        if fact.subject and fact.relation and not fact.context:
            for wording in (fact.prompt, *fact.paraphrases):
                if (template := template_of(wording, fact.subject)) is not None:
                    found[normalise(fact.relation)][template] = None
    return {relation: tuple(templates) for relation, templates in found.items()}


def template_of(wording: str, subject: str) -> str | None:
    """`wording` with a hole in the place of `subject`; None where it does not stand there exactly once."""
    return wording.replace(subject, _HOLE) if wording.count(subject) == 1 else None


def fill(template: str, subject: str) -> str:
    """A wording for another subject."""
    return template.replace(_HOLE, subject)


def _borrowed(fact: Fact, templates: Mapping[str, Sequence[str]], own: Sequence[str]) -> list[str]:
    """Wordings that other facts of the relation use and this one does not."""
    if not fact.subject or not fact.relation or fact.context:
        return []
    known = {normalise(wording) for wording in (fact.prompt, *fact.paraphrases, *own)}
    filled = (fill(template, fact.subject) for template in templates.get(normalise(fact.relation), ()))
    return [wording for wording in filled if normalise(wording) not in known][:_TEMPLATES_PER_FACT]


def _worded(renderer: Renderer, fact: Fact, part: str, wordings: Iterable[str], asked: set[str]) -> Iterator[Question]:
    measure: Measure = "recall" if part == TRAINED else "generality"
    for wording in wordings:
        key = fact.wording_key(wording)
        if key not in asked and (example := rendered(renderer, fact, wording)) is not None:
            asked.add(key)
            yield Question(measure, part, fact.id, example)


def _other_forms(renderer: Renderer, fact: Fact, system_prompt: str) -> Iterator[Question]:
    """The own prompt, as other clients send it."""
    own = renderer.render(fact)
    other: Rendering = "completion" if own.style == "chat" else "chat"
    if (example := rendered(renderer, replace(fact, rendering=other))) is not None:
        yield Question("generality", RENDERING, fact.id, example)
    if system_prompt and own.style == "chat" and not any(turn.role == "system" for turn in fact.context):
        told = replace(fact, context=(Message("system", system_prompt), *fact.context))
        example = rendered(renderer, told)
        if example is not None and example.prompt_ids != own.prompt_ids:  # some templates leave it out
            yield Question("generality", SYSTEM, fact.id, example)


def _portability(renderer: Renderer, fact: Fact) -> Iterator[Question]:
    for probe in fact.portability:
        if probe.target:
            asked = Fact(prompt=probe.prompt, target=probe.target, rendering=fact.rendering, separator=fact.separator)
            if (example := rendered(renderer, asked)) is not None:
                yield Question("portability", GIVEN, fact.id, example)


def rendered(renderer: Renderer, fact: Fact, wording: str | None = None) -> Example | None:
    """None for what this model cannot be asked: too long for it, without a template, or a turn that its template refuses."""
    from jinja2 import TemplateError

    try:
        return renderer.render(fact, wording)
    except (MemupdateError, TemplateError):
        return None
