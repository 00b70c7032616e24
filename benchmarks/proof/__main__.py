"""What is a good proof worth? Facts in twenty releases, real facts that change, and what proving costs; all answers from a real vLLM.

    python -m benchmarks.proof [--quick] [--work DIR] [--only releases endoflife speed]

**releases**: 2,000 facts of a world of the embedded model's kind, 100 a release, two releases in each of ten collections, stored by
`Workspace.add` under `benchmarks/proof/policy.toml`; then, on vLLM, each release's new facts and all of the last ones' are proved and
generated freely. **endoflife**: versions and ends of support as they were in 2024, superseded by those of 2025. **speed**: 10,000
questions proved and generated. Parts and releases that are in `--work` already are not measured again: an interrupted study goes on.
The full study takes about an hour of one core, most of it training; `--quick` about five minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.proof import endoflife, releases, speed
from benchmarks.proof.releases import FULL, QUICK, Rows
from benchmarks.recording import markdown_table, record

PARTS = ("releases", "endoflife", "speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small releases; writes proof-quick.json")
    parser.add_argument(
        "--work", type=Path, help="workspace and what was measured; by default a folder for temporary files"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure now; others are taken from --work"
    )
    arguments = parser.parse_args()
    name = "proof-quick" if arguments.quick else "proof"
    work: Path = arguments.work or Path(tempfile.gettempdir()) / f"memupdate-{name}"
    figures, details = study(work, quick=arguments.quick, parts=arguments.only)
    table = tables(figures, details)
    print(table)
    print(json.dumps(figures, indent=2))
    record(name, figures, table_markdown=table, details=details)


def study(work: Path, *, quick: bool, parts: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure `parts`; of the others, what `work` has."""
    sizes = QUICK if quick else FULL
    rows = Rows(work / "rows")
    workspace = releases.open_workspace(work, sizes, say)
    figures, details = dict[str, Any](), dict[str, Any]()
    if "releases" in parts or (rows.folder / "releases.json").is_file():
        found = rows.get("releases", lambda: releases.figures_of(workspace, rows, sizes, say))
        figures |= found["figures"]
        details |= {"inside": found["inside"], "served": found["served"]}
    if "endoflife" in parts or (rows.folder / "endoflife.json").is_file():
        details["endoflife"] = endoflife.figures_of(workspace, rows, quick=quick, say=say)
        figures |= endoflife.figures(details["endoflife"])
    if "speed" in parts or (rows.folder / "speed.json").is_file():
        details["speed"] = speed.figures_of(workspace, rows, quick=quick, say=say)
        figures |= speed.figures(details["speed"])
    return figures, details


GOALS = {
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
