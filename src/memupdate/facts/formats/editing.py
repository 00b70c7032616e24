"""Data sets of knowledge editing: CounterFact in both layouts, zsRE, KnowEdit, HalluEditBench.

Invariant: the target is always the *new* value, never the one that the data set calls true. What these records say besides is passed
over, since each data set has its own extras; docs/formats.md lists which fields become what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from memupdate.facts.fields import Fields
from memupdate.facts.formats.base import answer_of, checked, paraphrases_of, probe
from memupdate.facts.model import Fact, Probe

_NQ = "nq question: "
"""How MEND marks locality prompts from Natural Questions; no client writes it."""
_HOPS = range(2, 7)


class CounterFactFormat:
    """CounterFact as its authors (ROME) publish it: `requested_rewrite` with a template, and lists of prompts."""

    name = "counterfact"
    summary = "requested_rewrite + paraphrase_prompts + neighborhood_prompts: CounterFact as ROME publishes it"

    def detect(self, record: Any) -> bool:
        """See `RecordFormat`."""
        return isinstance(record, Mapping) and "requested_rewrite" in record

    def parse(self, record: Any) -> tuple[Fact, ...]:
        """See `RecordFormat`. Neighbours keep the old target: they are asked about other subjects of which it is true."""
        fields = Fields(record)
        rewrite = fields.record("requested_rewrite")
        template, subject = rewrite.text("prompt"), rewrite.text("subject")
        target, true = (_stated(rewrite, name) for name in ("target_new", "target_true"))
        if template and template.count("{}") != 1:
            rewrite.note("prompt", "must hold {} once, where the subject goes")
        if target is None:
            rewrite.note("target_new", "missing, or no text")
        fields.take_problems("requested_rewrite", rewrite)
        prompt = template.replace("{}", subject)
        fact = Fact(
            prompt=prompt,
            target=target or "",
            subject=subject,
            relation=rewrite.optional_text("relation_id"),
            paraphrases=paraphrases_of(prompt, fields.texts("paraphrase_prompts", distinct=False)),
            locality=_probes((text, true) for text in fields.texts("neighborhood_prompts", distinct=False)),
            rendering="completion",
            external_id=fields.optional_id("case_id"),
        )
        return checked(fields, fact)


class FlatCounterFactFormat:
    """CounterFact in the flattened layout of EasyEdit: one prompt of each kind."""

    name = "counterfact-flat"
    summary = "prompt + target_new, rephrase_prompt, locality_prompt: CounterFact in EasyEdit's layout"

    def detect(self, record: Any) -> bool:
        """See `RecordFormat`."""
        return isinstance(record, Mapping) and "prompt" in record and "target_new" in record

    def parse(self, record: Any) -> tuple[Fact, ...]:
        """See `RecordFormat`."""
        fields = Fields(record)
        prompt = fields.text("prompt")
        fact = Fact(
            prompt=prompt,
            target=fields.text("target_new"),
            subject=fields.optional_text("subject"),
            relation=fields.optional_text("relation_id"),
            paraphrases=paraphrases_of(prompt, [fields.optional_text("rephrase_prompt")]),
            locality=_probes([(record.get("locality_prompt"), record.get("locality_ground_truth"))]),
            rendering="completion",
            external_id=fields.optional_id("case_id"),
        )
        return checked(fields, fact)


class ZsreFormat:
    """zsRE as MEND and EasyEdit have it: a question, its new answer `alt`, another wording, an unrelated question."""

    name = "zsre"
    summary = "src + alt, rephrase, loc + loc_ans: zsRE as MEND and EasyEdit have it"

    def detect(self, record: Any) -> bool:
        """See `RecordFormat`."""
        return isinstance(record, Mapping) and "src" in record and "alt" in record

    def parse(self, record: Any) -> tuple[Fact, ...]:
        """See `RecordFormat`."""
        fields = Fields(record)
        prompt = fields.text("src")
        loc = fields.optional_text("loc")
        portability = fields.record("portability")
        fact = Fact(
            prompt=prompt,
            target=fields.text("alt"),
            subject=fields.optional_text("subject"),
            paraphrases=paraphrases_of(prompt, [fields.optional_text("rephrase")]),
            locality=_probes([(loc.removeprefix(_NQ) if loc else None, record.get("loc_ans"))]),
            portability=_probes([(portability.value("New Question"), portability.value("New Answer"))]),
            external_id=fields.optional_id("case_id"),
        )
        return checked(fields, fact)


class KnowEditFormat:
    """KnowEdit, and the requests of EasyEdit: `portability` and `locality` are objects of lists by kind."""

    name = "knowedit"
    summary = "prompt + target_new, with portability or locality by kind: KnowEdit and EasyEdit's requests"

    def detect(self, record: Any) -> bool:
        """See `RecordFormat`."""
        return (
            isinstance(record, Mapping)
            and "prompt" in record
            and "target_new" in record
            and ("portability" in record or "locality" in record or "rephrase" in record)
        )

    def parse(self, record: Any) -> tuple[Fact, ...]:
        """See `RecordFormat`."""
        fields = Fields(record)
        prompt = fields.text("prompt")
        target = answer_of(record.get("target_new"))
        if target is None:
            fields.note("target_new", "missing, or no text")
        others = [record.get("rephrase"), record.get("rephrase_prompt")]
        flat = [text for other in others for text in (other if isinstance(other, list) else [other])]
        fact = Fact(
            prompt=prompt,
            target=target or "",
            subject=fields.optional_text("subject"),
            relation=fields.optional_text("relation"),
            paraphrases=paraphrases_of(prompt, flat),
            locality=_probes(_by_kind(fields, "locality")),
            portability=_probes(_by_kind(fields, "portability")),
            rendering="completion",
            external_id=fields.optional_id("case_id"),
        )
        return checked(fields, fact)


class HalluEditFormat:
    """HalluEditBench: `object` is the right answer to `question`; `question_2hop` and so on follow from it."""

    name = "hallueditbench"
    summary = "question + object, paraphrased_question, locality_question, question_Nhop + answer_Nhop: HalluEditBench"

    def detect(self, record: Any) -> bool:
        """See `RecordFormat`."""
        return isinstance(record, Mapping) and "question" in record and "object" in record

    def parse(self, record: Any) -> tuple[Fact, ...]:
        """See `RecordFormat`. What the tested model said, and the questions to choose or say yes or no to, are passed over."""
        fields = Fields(record)
        prompt = fields.text("question")
        topic = fields.optional_text("topic")
        fact = Fact(
            prompt=prompt,
            target=fields.text("object"),
            subject=fields.optional_text("subject"),
            relation=fields.optional_text("relation"),
            paraphrases=paraphrases_of(prompt, [fields.optional_text("paraphrased_question")]),
            locality=_probes([(record.get("locality_question"), None)]),
            portability=_probes((record.get(f"question_{n}hop"), record.get(f"answer_{n}hop")) for n in _HOPS),
            tags=(topic,) if topic else (),
        )
        return checked(fields, fact)


def _stated(rewrite: Fields, name: str) -> str | None:
    """`{"str": …}` or a plain text."""
    value = rewrite.value(name)
    return answer_of(value.get("str") if isinstance(value, Mapping) else value)


def _probes(pairs: Any) -> tuple[Probe, ...]:
    """Those pairs that ask something, each once."""
    found = (probe(prompt, target) for prompt, target in pairs)
    return tuple(dict.fromkeys(one for one in found if one is not None))


def _by_kind(fields: Fields, name: str) -> Iterator[tuple[Any, Any]]:
    """(prompt, answer) of `{"kind": [{"prompt": …, "ground_truth": …}, …]}`, also where a kind has one object, or lists in it."""
    kinds = fields.value(name)
    if not isinstance(kinds, Mapping):
        if kinds:
            fields.note(name, "must be an object of lists of prompts")
        return
    for items in kinds.values():
        for item in items if isinstance(items, list) else [items]:
            if not isinstance(item, Mapping):
                continue
            prompts, answers = item.get("prompt"), item.get("ground_truth")
            if isinstance(prompts, list):
                answers = answers if isinstance(answers, list) else [answers] * len(prompts)
                yield from zip(prompts, answers, strict=False)
            else:
                yield prompts, answers
