"""Fluency against scipy's entropy; means over edits; how strict the columns are against each other; the table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from memupdate.benchmarking.fluency import mean_entropy, n_gram_entropy
from memupdate.benchmarking.markdown import markdown_report
from memupdate.benchmarking.questions import KINDS, BenchQuestion, bench_questions
from memupdate.benchmarking.report import BenchBatch, BenchReport, Fluency
from memupdate.benchmarking.scores import Outcome, measure_rows, score
from memupdate.benchmarking.table import HEADER, batch_cells, measure_cells, verdicts
from memupdate.facts.model import Fact, Probe
from memupdate.facts.reader import read_facts
from memupdate.facts.render import Example, Renderer

WORDS = st.lists(st.sampled_from(["the", "mayor", "of", "Fenburg", "is", "."]), max_size=40)
JUDGED = st.sampled_from(["exact", "normalised", "contained", "other"])
SHARES = st.sampled_from([0.0, 0.5, 1.0])
OUTCOMES = st.builds(Outcome, tokens_right=SHARES, judged=JUDGED, proved=st.booleans(), answer=st.just("x"))


def question(fact: str, kind: str = "efficacy") -> BenchQuestion:
    return BenchQuestion(kind, fact, Example(fact, "chat", "?", "!", (1,), (2, 3)))  # type: ignore[arg-type]


@given(WORDS)
def test_entropy_is_scipys(words: list[str]) -> None:
    grams = {n: Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in (2, 3)}
    bits = {n: float(entropy(list(counts.values()), base=2)) if counts else 0.0 for n, counts in grams.items()}
    assert n_gram_entropy(" ".join(words)) == pytest.approx((2 / 3 * bits[2] + 4 / 3 * bits[3]) / 2, abs=1e-9)


def test_a_text_that_repeats_itself_has_less_entropy() -> None:
    varied = " ".join(f"w{i}" for i in range(50))
    assert n_gram_entropy("again and again " * 20) < 2 < 5 < n_gram_entropy(varied)
    assert mean_entropy([varied, "one"]) == n_gram_entropy(varied) / 2
    assert mean_entropy([]) == 0


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), OUTCOMES), min_size=1, max_size=12))
def test_a_stricter_column_never_shows_more(found: list[tuple[str, Outcome]]) -> None:
    result = score([(question(fact), outcome) for fact, outcome in found])
    assert 0 <= result.generated_exact_share <= result.generated_normalised_share
    assert result.generated_normalised_share <= result.generated_contained_share <= 1
    assert result.forced_answer_share <= result.forced_tokens_share


def test_means_are_over_edits_not_over_questions() -> None:
    right, wrong = Outcome(1.0, "exact", True, "x"), Outcome(0.5, "other", False, "y")
    edits = [question("a"), question("a"), question("a"), question("b")]
    result = score(list(zip(edits, [right, right, right, wrong], strict=True)))
    assert result.generated_exact_share == 0.5
    assert result.forced_tokens_share == 0.75
    near = question("a", "specificity")
    rows = measure_rows(KINDS, [(edit, wrong) for edit in edits], [(one, right) for one in (*edits, near)])
    assert [(row.measure, row.questions, row.edits) for row in rows] == [("efficacy", 4, 2), ("specificity", 1, 1)]
    assert rows[0].before is not None
    assert rows[0].before.generated_exact_share == 0
    assert rows[1].before is None


def test_every_kind_of_question_is_asked_but_for_what_an_edit_changes(atlas_renderer: Renderer) -> None:
    edit = Fact(
        prompt="Who leads Acme?", target="Ida", paraphrases=("Who runs Acme?",), portability=(Probe("Who?", "Ida"), Probe("Why?")),
        locality=(Probe("Who leads Bolt?", "Bob"), Probe("Where is Acme?"), Probe("who runs acme")),
    )  # fmt: skip
    found = bench_questions(atlas_renderer, [edit], lambda fact: fact.paraphrases)
    assert [(q.kind, q.example.prompt) for q in found] == [
        ("efficacy", "Who leads Acme?"),
        ("generalization", "Who runs Acme?"),
        ("specificity", "Who leads Bolt?"),
        ("specificity", "Where is Acme?"),
        ("portability", "Who?"),
    ]
    assert [q.stated_tokens > 0 for q in found if q.kind == "specificity"] == [True, False]


def test_the_table_has_a_cell_for_every_column_and_markdown_holds_hostile_names() -> None:
    outcome = Outcome(1.0, "exact", True, "x")
    edit, near = (question("a"), outcome), (question("a", "specificity"), outcome)
    rows = measure_rows(KINDS, [edit], [edit, near])
    batches = (
        BenchBatch(1, "bench@v1", 4, 1, 1, 0.99, 0.01, (), 3.0),
        BenchBatch(2, None, 0, 0, 0, None, None, ("too much | harm",), 1.0),
    )
    report = BenchReport(
        file="a|b`c`.json", format="zsre", sha256="sha256:0", model="atlas", policy="atlas", edits=3, left_out=1, edits_per_batch=1,
        augmented=False, batches=batches, measures=rows, fluency=Fluency(1, 100, 5.0, 4.5), edits_proved=1, proved_not_generated=0,
        workspace=None, duration_s=4.0, messages=("a message",),
    )  # fmt: skip
    cells = measure_cells(report)
    assert [(row[0], row[1]) for row in cells] == [
        ("efficacy", "before"), ("efficacy", "after"), ("specificity", "after"), ("fluency", "before"), ("fluency", "after"),
    ]  # fmt: skip
    assert {len(row) for row in cells} == {len(HEADER)}
    assert cells[1][3:] == ("100.0",) * 5
    assert batch_cells(report)[1][2:5] == ("refused", "–", "–")
    assert "add 2 was refused: too much | harm" in verdicts(report)
    assert not report.is_released
    tables = [line for line in markdown_report(report).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {len(HEADER) + 1}
    assert "a|b" not in markdown_report(report)


SAMPLES = {
    "counterfact-flat": {"efficacy", "generalization", "specificity"},
    "dyknow": {"efficacy", "generalization"},
    "hallueditbench": {"efficacy", "generalization", "specificity", "portability"},
    "knowedit": {"efficacy", "generalization", "specificity", "portability"},
    "zsre": {"efficacy", "generalization", "specificity"},
}
"""Formats and what their files ask."""


@pytest.mark.parametrize("format", SAMPLES)
def test_every_fact_of_a_published_file_becomes_questions(
    format: str, repo_root: Path, atlas_renderer: Renderer
) -> None:
    folder = repo_root / ("examples" if format == "knowedit" else "tests/data/facts")
    (file,) = folder.glob(f"{format}.*")
    source = read_facts(file, skip_invalid=True)
    facts = [located.fact for located in source.facts]
    found = bench_questions(atlas_renderer, facts, lambda fact: fact.paraphrases)
    assert source.format == format
    assert {q.kind for q in found} == SAMPLES[format]
    assert [q.fact_id for q in found if q.kind == "efficacy"] == [fact.id for fact in facts]
