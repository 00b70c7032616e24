"""A benchmark's report as Markdown, to stand beside a paper's table. Torch-free."""

from __future__ import annotations

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
from memupdate.reports.markdown import code, markdown_table


def markdown_report(report: BenchReport) -> str:
    """The whole report, ending in a newline."""
    parts = [
        f"# Edits of {code(report.file)}",
        code(summary(report)),
        markdown_table(HEADER, measure_cells(report), numbers=True),
        NOTE,
        markdown_table(BATCH_HEADER, batch_cells(report), numbers=True),
        "\n".join(f"- {code(line)}" for line in verdicts(report)),
        f"The file's digest is `{report.sha256}`; it took {report.duration_s:.0f} s.",
    ]
    return "\n\n".join(parts) + "\n"
