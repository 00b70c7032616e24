"""A benchmark's report as Markdown, to stand beside a paper's table. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from memupdate.benchmarking.report import BenchReport
from memupdate.benchmarking.table import (
    BATCH_HEADER,
    HEADER,
    NOTE,
    batch_cells,
    measure_cells,
    summary,
    verdicts,
)
from memupdate.reports.markdown import code


def markdown_report(report: BenchReport) -> str:
    """The whole report, ending in a newline."""
    parts = [
        f"# Edits of {code(report.file)}",
        code(summary(report)),
        _table(HEADER, measure_cells(report)),
        NOTE,
        _table(BATCH_HEADER, batch_cells(report)),
        "\n".join(f"- {code(line)}" for line in verdicts(report)),
        f"The file's digest is `{report.sha256}`; it took {report.duration_s:.0f} s.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
