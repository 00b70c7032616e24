"""What is a good proof worth? Facts in twenty releases, real facts that change, and what proving costs; all answers from a real vLLM.

    python -m benchmarks.proof [--quick] [--work DIR] [--only breadth depth endoflife speed] [--lines N]

**breadth**: 2,000 facts of a world of the embedded model's kind, 100 in each of twenty collections, stored by `Workspace.add` under
`benchmarks/proof/policy.toml`; then, on vLLM, all of them are proved and generated freely. **depth**: four more releases of the first
collection, 100 facts each, on top of each other. **endoflife**: versions and ends of support as they were in 2024, superseded by those of
2025. **speed**: 10,000 questions proved and generated. What `--work` has already is not measured again: an interrupted study goes on, and
`--lines 5` first and 20 later is the same as 20 at once. Parts that are not asked for stay in the results as they were recorded, each with
the commit that it was measured at. The full study takes about forty minutes of one quiet core; `--quick` about six.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.proof import endoflife, releases, speed
from benchmarks.proof.releases import FULL, QUICK, Rows, Sizes
from benchmarks.recording import commit, markdown_table, record, recorded

PARTS = ("breadth", "depth", "endoflife", "speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small releases; writes proof-quick.json")
    parser.add_argument("--work", type=Path, help="workspace and what was measured; by default a temporary folder")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)")
    parser.add_argument("--lines", type=int, help="collections in breadth (default: 20)")
    arguments = parser.parse_args()
    name = "proof-quick" if arguments.quick else "proof"
    sizes = QUICK if arguments.quick else FULL
    if arguments.lines:
        sizes = replace(sizes, lines=min(arguments.lines, FULL.lines))
    work: Path = arguments.work or Path(tempfile.gettempdir()) / f"memupdate-{name}"
    figures, details = study(work, sizes, quick=arguments.quick, parts=arguments.only)
    before = recorded(name)
    commits = before.get("details", {}).get("commits", {}) | dict.fromkeys(arguments.only, commit())
    figures = before.get("figures", {}) | figures
    details = before.get("details", {}) | {part: found for part, found in details.items() if found}
    table = tables(figures, details)
    print(table)
    record(name, figures, table_markdown=table, details=details | {"commits": commits})


def study(
    work: Path, sizes: Sizes, *, quick: bool, parts: Sequence[str]
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Measure `parts`, in this order: figures, and the rows behind them."""
    rows = Rows(work / "rows")
    wide, deep = releases.steps_of(sizes)
    figures, inside, served, details = dict[str, Any](), dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for part, steps, figures_of in (
        ("breadth", wide, releases.breadth_figures),
        ("depth", [*wide[:1], *deep], releases.depth_figures),
    ):
        if part in parts:
            here, there = releases.measure(releases.open_workspace(work, sizes, say), rows, steps, say)
            figures |= figures_of(here, there)
            inside, served = inside | here, served | there
    if "endoflife" in parts:
        details["endoflife"] = endoflife.figures_of(work, rows, quick=quick, say=say)
        figures |= endoflife.figures(details["endoflife"])
    if "speed" in parts:
        details["speed"] = speed.figures_of(work, rows, quick=quick, say=say)
        figures |= speed.figures(details["speed"])
    return figures, {"inside": list(inside.values()), "served": list(served.values()), **details}


GOALS = {
    "facts": "≥ 2000",
    "releases": "20",
    "proved_not_generated": "0",
    "generality": "≥ 0.9",
    "locality": "≥ 0.98",
    "perplexity_ratio": "≤ 1.01",
    "endoflife_new": "≥ 0.99",
    "endoflife_old_absent": "≥ 0.99",
    "proof_speedup": "≥ 10",
}


def tables(figures: dict[str, Any], details: dict[str, Any]) -> str:
    """Figures against goals, then one row per release."""
    text = markdown_table(("figure", "measured", "goal"), [(k, v, GOALS.get(k, "")) for k, v in figures.items()])
    served = {row["release"]: row for row in details.get("served", [])}
    lines = [_line(row, served[row["release"]]) for row in details.get("inside", [])]
    header = (
        "release",
        "rank",
        "proved",
        "generated on vLLM",
        "held-out phrasings",
        "must stay: unchanged",
        "KL, nats",
        "perplexity ratio",
    )
    return text + ("\n" + markdown_table(header, lines) if lines else "")


def _line(row: dict[str, Any], served: dict[str, Any]) -> tuple[object, ...]:
    return (
        row["release"],
        row["rank"],
        f"{row['proved']} of {row['facts']}",
        f"{served['generated']} of {served['asked']}",
        f"{row['held_out_right'] / row['held_out']:.1%}",
        f"{row['near_unchanged'] / row['near_asked']:.1%}",
        f"{row['kl_nats']:.4f}",
        f"{row['perplexity_ratio']:.4f}",
    )


def say(line: str) -> None:
    """Progress, beside the results."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
