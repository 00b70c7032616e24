"""Measuring a memory beyond verbatim recall: in other words and forms, around its facts, on general text, token by token.

What needs the base model alone is prepared first, then everything is asked of the memory attached to it. Invariant: the same memory,
facts and policy give the same questions, so that a resumed batch measures what it had measured. What must hold of it is in `gates`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memupdate.errors import UsageError
from memupdate.facts.model import Fact, prompt_key
from memupdate.facts.render import Example
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.measures import MeasureCount, MeasureRecord, TextRecord, TokenRecord
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent
from memupdate.verification.neighbours import (
    GUESSED,
    PROBE,
    Neighbour,
    is_guess,
    made_neighbours,
    nearness,
    sort_probe,
)
from memupdate.verification.questions import GIVEN, OTHER_WORDINGS, Answered, Question, fact_questions, rendered
from memupdate.verification.sampling import SampleRule, draw

if TYPE_CHECKING:
    from peft import PeftModel

    from memupdate.models.scoring import TargetScore
    from memupdate.verification.asking import TokenView
    from memupdate.verification.general_text import TextMeasure
    from memupdate.verification.inprocess import LocalityResult
    from memupdate.verification.served import Generated

WORST_FACTS = 20
"""Facts per release whose tokens are kept one by one."""
SURE = 0.9
"""Of the base model's answer to a made neighbour, its weakest token: under this it counts as a guess. All 730 facts that the embedded
model is shipped as knowing are answered more surely; of 74 answers that it invented about subjects it had never met, 4 were."""
ANCHORS = "held-out anchors"
_CORPUS_TOKENS = 32_768
"""Of a corpus, from its beginning."""
_WINDOW_TOKENS = 256


@dataclass(frozen=True)
class Share:
    """Answers that are word for word what was expected."""

    exact: int
    asked: int

    @property
    def value(self) -> float:
        """0 to 1; 1 where nothing was asked."""
        return self.exact / self.asked if self.asked else 1.0

    @property
    def if_asked(self) -> float | None:
        """None where nothing was asked."""
        return self.value if self.asked else None


@dataclass(frozen=True)
class Measured:
    """What one memory was measured to do."""

    answers: tuple[Answered, ...] = ()
    corpus: str = ""
    text: TextMeasure | None = None
    tokens: tuple[tuple[str, tuple[TokenView, ...]], ...] = ()
    """(fact's id, its target's tokens) of the least sure facts, least sure first."""
    asked_of: str = ""
    """Of which facts, and what that says."""

    @property
    def generality(self) -> Share:
        """Phrasings that were not trained on, in the form that the facts have."""
        return self._share(a for a in self.answers if a.question.part in OTHER_WORDINGS)

    @property
    def locality(self) -> Share:
        """Everything that the base model was sure of, or was given as a probe."""
        locality = (a for a in self.answers if a.question.measure == "locality")
        return self._share(a for a in locality if not is_guess(a.question.part))

    @property
    def perplexity_ratio(self) -> float | None:
        """Of general text, over the base model's; None where none was measured."""
        return self.text.perplexity_ratio if self.text else None

    @staticmethod
    def _share(answers: Iterator[Answered]) -> Share:
        judged = [a.judged == "exact" for a in answers]
        return Share(sum(judged), len(judged))


@dataclass(frozen=True)
class Prepared:
    """Questions with their expected answers, before a memory is attached."""

    questions: tuple[Question, ...]
    probes: int
    """The first so many questions are the probes that the policy's `min_probes_unchanged` is held against."""
    asked_of: str


def sample_rule(session: Session, wanted: str) -> SampleRule:
    """The policy's rule for `proof.measured_sample` or `proof.served_sample`, by name."""
    proof = session.policy.proof
    return SampleRule(getattr(proof, wanted), proof.confidence, proof.max_failing_share)


def prepare(session: Session, facts: Sequence[Fact], stand_ins: Collection[str], progress: Progress) -> Prepared:
    """What to ask about `facts`, with the base model's own answers where those must stay.

    Args:
        facts: live facts.
        stand_ins: ids of those that only stand in for retracted ones: nobody wants to hear them in other words.
    """
    told = [fact for fact in facts if fact.id not in stand_ins]
    rule, seed = sample_rule(session, "measured_sample"), session.policy.training.seed
    chosen = draw(told, rule.size(len(told)), seed=seed)
    probes = probe_questions(session, facts, progress)
    near = _neighbour_questions(session, made_neighbours(chosen, facts, session.probe_facts([]), seed=seed), progress)
    own = fact_questions(
        session.renderer, chosen, told, session.phrasings, system_prompt=session.policy.proof.system_prompt
    )
    return Prepared((*probes, *near, *own), len(probes), rule.statement(len(chosen), len(told)))


def probe_questions(session: Session, facts: Sequence[Fact], progress: Progress) -> list[Question]:
    """The policy's probes with the base model's own answers: what `min_probes_unchanged` is held against."""
    from memupdate.verification.inprocess import baseline_answers

    probes = list({prompt_key(probe.prompt): probe for probe in session.probe_facts(list(facts))}.values())
    examples = baseline_answers(session.base, session.renderer, probes, _cache(session), progress)
    owners = {probe.prompt: fact.id for fact in facts for probe in fact.locality}
    near = nearness(facts)
    questions = []
    for probe, example in zip(probes, examples, strict=True):
        owner = owners.get(probe.prompt)
        part = GIVEN if owner else sort_probe(probe, near) or PROBE
        questions.append(Question("locality", part, owner, example))
    return questions


def _neighbour_questions(session: Session, near: Sequence[Neighbour], progress: Progress) -> list[Question]:
    """Neighbours with the base model's answers, told apart by whether it was sure of them."""
    from memupdate.models.scoring import score_examples
    from memupdate.verification.inprocess import baseline_answers

    base = session.base
    fitting = [n for n in near if rendered(session.renderer, n.asked) is not None]
    examples = baseline_answers(base, session.renderer, [n.asked for n in fitting], _cache(session), progress)
    scores = score_examples(base.model, examples, base.device)
    return [
        Question("locality", n.part + ("" if s.min_probability >= SURE else GUESSED), n.fact_id, example)
        for n, example, s in zip(fitting, examples, scores, strict=True)
    ]


def _cache(session: Session) -> Path:
    # What another base model answered, or the same one at another dtype, is no baseline.
    return session.layout.cache / f"answers-{session.fingerprint[7:23]}-{session.policy.training.dtype}"


def measure(
    session: Session,
    model: PeftModel,
    prepared: Prepared,
    recall: Sequence[tuple[Example, TargetScore]],
    progress: Progress,
) -> tuple[Measured, LocalityResult]:
    """Ask the attached memory.

    Args:
        recall: facts under their own prompts with what the memory gave for them: the least sure are looked at token by token.

    Returns:
        What was measured, and the share of unchanged probes.
    """
    from memupdate.verification.asking import ask, look_at_tokens

    base = session.base
    progress(ProgressEvent("measure", 0, len(prepared.questions), "other words, neighbours, general text"))
    answers = ask(base, model, prepared.questions, progress)
    worst = [example for example, _ in sorted(recall, key=lambda pair: pair[1].min_probability)[:WORST_FACTS]]
    tokens = tuple((e.fact_id, views) for e, views in zip(worst, look_at_tokens(base, model, worst), strict=True))
    corpus, text = _general_text(session, model, progress)
    measured = Measured(tuple(answers), corpus, text, tokens, prepared.asked_of)
    progress(ProgressEvent("measure", len(answers), len(answers), _sentence(measured)))
    return measured, locality_result(answers[: prepared.probes])


def locality_result(probes: Sequence[Answered]) -> LocalityResult:
    """How many probes are answered as the base model answers them."""
    from memupdate.verification.inprocess import LocalityResult

    changed = tuple(a.question.example.prompt for a in probes if a.judged != "exact")
    return LocalityResult(len(probes), len(probes) - len(changed), changed)


def _sentence(measured: Measured) -> str:
    parts = [f"{measured.generality.value:.1%} of untrained phrasings answered"] if measured.generality.asked else []
    parts += [f"{measured.locality.value:.1%} of what must stay unchanged"] if measured.locality.asked else []
    parts += [f"perplexity × {measured.text.perplexity_ratio:.4f}"] if measured.text else []
    return ", ".join(parts) or "nothing to ask"


def _general_text(session: Session, model: PeftModel, progress: Progress) -> tuple[str, TextMeasure | None]:
    """The corpus by name and what the memory does to it; nothing without corpus and guard."""
    from memupdate.verification.general_text import measure_text, windows

    if session.policy.proof.corpus:
        text, tokenizer = corpus_text(session), session.tokenizer
        ids = tokenizer.encode(text, add_special_tokens=False)[:_CORPUS_TOKENS]
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        sequences = [begin + window for window in windows(ids, _WINDOW_TOKENS)]
        return session.policy.proof.corpus, measure_text(model, sequences, session.base.device)
    holdout = session.guard(progress).holdout
    if holdout is None:
        return "", None
    return ANCHORS, measure_text(model, holdout.ids.tolist(), session.base.device)


def corpus_text(session: Session) -> str:
    """The policy's corpus, "" for none. Raises UsageError where it cannot be read."""
    if not (name := session.policy.proof.corpus):
        return ""
    file = session.root / name
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file}: cannot be read as text ({type(error).__name__})",
            "proof.corpus in the policy names a UTF-8 text file of the workspace",
        ) from error


def generality_of(counts: Sequence[MeasureCount]) -> float | None:
    """`Measured.generality` from the ledger's counts of one release; None where nothing was asked."""
    return _share_of([c for c in counts if c.part in OTHER_WORDINGS])


def locality_of(counts: Sequence[MeasureCount]) -> float | None:
    """`Measured.locality` from the ledger's counts of one release; None where nothing was asked."""
    return _share_of([c for c in counts if c.measure == "locality" and not is_guess(c.part)])


def _share_of(counts: Sequence[MeasureCount]) -> float | None:
    return Share(sum(c.exact for c in counts), sum(c.asked for c in counts)).if_asked


def record_measured(ledger: Ledger, release: str, measured: Measured) -> None:
    """Store what was measured in this process."""
    text = measured.text
    texts = (
        [TextRecord(release, measured.corpus, text.tokens, text.perplexity_base, text.perplexity, text.kl_nats)]
        if text
        else []
    )
    tokens = [
        TokenRecord(release, fact, position, v.token, v.probability, v.best_token, v.best_probability)
        for fact, views in measured.tokens
        for position, v in enumerate(views)
    ]
    ledger.record_measures(release, [_record(release, answer) for answer in measured.answers], texts, tokens)


def _record(release: str, answered: Answered) -> MeasureRecord:
    question = answered.question
    return MeasureRecord(
        release=release, engine="in-process", measure=question.measure, part=question.part, fact=question.fact_id,
        style=question.example.style, prompt=question.example.prompt, expected=answered.expected, answer=answered.answer,
        judged=answered.judged, min_probability=answered.min_probability,
    )  # fmt: skip


def generated_records(release: str, answers: Sequence[Generated]) -> list[MeasureRecord]:
    """Free answers of a serving engine, as ledger rows."""
    from memupdate.verification.served import GENERATED

    return [
        MeasureRecord(
            release=release, engine="served", measure="recall", part=GENERATED, fact=a.example.fact_id, style=a.example.style,
            prompt=a.example.prompt, expected=a.example.answer, answer=None if a.matches else a.text, judged=a.judged,
            min_probability=None,
        )
        for a in answers
    ]  # fmt: skip
