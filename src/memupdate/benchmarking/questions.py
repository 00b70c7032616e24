"""What a benchmark asks of a model before and after an edit: the field's four measures as rendered questions.

*Efficacy*: the edit's own prompt. *Generalization*: its wordings that were not trained on. *Specificity*: questions about other things,
whose expected answer is whatever the unedited model says. *Portability*: questions whose answers follow from the edit. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from memupdate.facts.model import Fact, Probe, prompt_key
from memupdate.facts.render import Example, Renderer
from memupdate.verification.questions import rendered

Kind = Literal["efficacy", "generalization", "specificity", "portability"]
KINDS: tuple[Kind, ...] = ("efficacy", "generalization", "specificity", "portability")


@dataclass(frozen=True)
class BenchQuestion:
    """One question for one edit."""

    kind: Kind
    fact_id: str
    example: Example
    """`target_ids` are the expected answer, its end token last; of specificity they are known once the unedited model has answered."""
    stated_tokens: int = 0
    """Of specificity: how long the data set's own answer is, without its end token; answers are compared so far. 0: to the end."""
    is_cut: bool = False
    """The expected answer would go on, so that it has no end token."""


def bench_questions(
    renderer: Renderer, facts: Sequence[Fact], held_out: Callable[[Fact], Sequence[str]]
) -> list[BenchQuestion]:
    """All questions of `facts`, by fact. What the model cannot be asked (too long, a turn that its template refuses) is left out.

    Args:
        renderer: of the model and policy.
        facts: the edits.
        held_out: wordings of a fact that are not trained on.
    """
    changed = {key for fact in facts for key in (fact.key, *map(prompt_key, (fact.prompt, *fact.paraphrases)))}
    questions = []
    for fact in facts:
        asked: list[tuple[Kind, Fact, str | None]] = [("efficacy", fact, None)]
        asked += [("generalization", fact, wording) for wording in held_out(fact)]
        asked += [("specificity", probe, None) for probe in _others(fact, fact.locality, changed)]
        asked += [("portability", probe, None) for probe in _others(fact, fact.portability, set()) if probe.target]
        for kind, question, wording in asked:
            if (example := rendered(renderer, question, wording)) is not None:
                is_stated = kind == "specificity" and question.target
                stated = len(example.target_ids) - 1 if is_stated else 0
                questions.append(BenchQuestion(kind, fact.id, example, stated))
    return questions


def _others(fact: Fact, probes: Sequence[Probe], changed: set[str]) -> Iterator[Fact]:
    """Probes as facts to be rendered in the fact's own form, but for those that an edit means to change."""
    for probe in probes:
        if prompt_key(probe.prompt) not in changed:
            yield Fact(
                prompt=probe.prompt, target=probe.target or "", rendering=fact.rendering, separator=fact.separator
            )
