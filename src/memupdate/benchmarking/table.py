"""The field's table as rows of text, for the terminal and for Markdown alike. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from memupdate.benchmarking.report import BenchBatch, BenchReport
from memupdate.benchmarking.scores import Score

HEADER = (
    "measure",
    "edits",
    "asked",
    "forced tokens",
    "forced answers",
    "free contained",
    "free normalised",
    "free exact",
)
_COLUMNS = (
    "forced_tokens_share",
    "forced_answer_share",
    "generated_contained_share",
    "generated_normalised_share",
    "generated_exact_share",
)
BATCH_HEADER = ("add", "edits", "release", "rank", "proved", "probes unchanged", "harm (nats)", "took")
NOTE = (
    "%, means over edits. Forced: by teacher forcing, which shows the model the right answer so far and does not ask whether it stops; "
    "free: by greedy generation, contained in it, equal but for case and punctuation, equal to the character and then stopped. "
    "Specificity: the same answer as before the edits. Fluency: entropy of free text, bits."
)


def measure_cells(report: BenchReport) -> list[tuple[str, ...]]:
    """Rows of each measure before and after the edits, fluency last; as many cells as `HEADER`."""
    rows = []
    for row in report.measures:
        states = [("before", row.before)] if row.before else []
        for state, score in [*states, ("after", row.after)]:
            rows.append((row.measure, state, str(row.questions), *_percents(score)))
    fluency = report.fluency
    for state, bits in (("before", fluency.before), ("after", fluency.after)):
        rows.append(("fluency", state, str(fluency.texts), "–", "–", f"{bits:.2f} bits", "–", "–"))
    return rows


def batch_cells(report: BenchReport) -> list[tuple[str, ...]]:
    """One row for each `add`; as many cells as `BATCH_HEADER`."""
    return [(str(number), *_batch(batch)) for number, batch in enumerate(report.batches, start=1)]


def summary(report: BenchReport) -> str:
    """What was run, in one line."""
    each = "all at once" if report.edits_per_batch is None else f"{report.edits_per_batch} at a time"
    trained = "the policy's share of their wordings trained too" if report.augmented else "no other wording trained"
    left = f", {report.left_out} records left out" if report.left_out else ""
    return f"{report.edits} edits ({report.format}) of {report.file}{left}, {each}, {trained}; {report.model}, policy {report.policy}"


def verdicts(report: BenchReport) -> list[str]:
    """What the table leaves open: proofs against free answers, and what was refused."""
    lines = [
        f"{report.edits_proved} of {report.edits} edits proved; {report.proved_not_generated} of those were not generated word for word"
    ]
    for number, batch in enumerate(report.batches, start=1):
        lines += [f"add {number} was refused: {reason}" for reason in batch.refused]
    return [*lines, *report.messages]


def _percents(score: Score) -> list[str]:
    return [f"{100 * float(getattr(score, column)):.1f}" for column in _COLUMNS]


def _batch(batch: BenchBatch) -> Sequence[str]:
    return (
        str(batch.edits),
        batch.release or "refused",
        str(batch.rank or "–"),
        f"{batch.facts_proved} of {batch.facts_total}" if batch.facts_total else "–",
        "–" if batch.probes_unchanged_share is None else f"{100 * batch.probes_unchanged_share:.1f} %",
        "–" if batch.kl_nats is None else f"{batch.kl_nats:.4f}",
        f"{batch.duration_s:.0f} s",
    )
