"""Is the planned rank the smallest that works, first time, on batches that the law has never seen?

    python -m benchmarks.budget [--quick] [--recalibrate] [--workers 2] [--runs FILE]

Forty held-out batches (five kinds, 30 to 2,000 target tokens) are planned by the law of the embedded model's calibration and trained at
the ranks around their border. Runs are kept in `--runs` as they are done: an interrupted study goes on, and a finished one is judged again
in a minute. A full study takes some hours of two cores; `--quick` takes the three smallest sizes.

The paper's law holds where capacity limits, and plans are made where it does not: in a calibration all or nearly all points are saturated
(`calibration_points_unsaturated`). So `law_r2` and `law_mape_holdout` are those of the sweep made for it, `python -m benchmarks.phonebook`,
and the law that plans are made on stands beside it as `residual_law_…`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.budget import evaluate
from benchmarks.budget.batches import TARGET_TOKENS, held_out_batches
from benchmarks.budget.truth import embedded_session, measure, read_runs
from benchmarks.recording import RESULTS, markdown_table, record

from memupdate.law.density import density_from
from memupdate.law.fit import LawFit, fit_laws
from memupdate.law.points import points_from_json
from memupdate.ledger.ledger import Ledger
from memupdate.operations.calibrating import ensure_laws
from memupdate.operations.session import Session
from memupdate.progress import no_progress

NUMBERS_ONLY = "_from_phonebook"
"""Figures of a law that has seen names with random digits only, judged on batches of the four other kinds."""
QUICK_SIZES = TARGET_TOKENS[:3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the three smallest sizes only")
    parser.add_argument("--recalibrate", action="store_true", help="make the calibration again first: ten minutes")
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side, one thread each")
    parser.add_argument("--runs", type=Path, default=RESULTS / "budget-runs.jsonl", help="where runs are kept")
    parser.add_argument(
        "--calibration", type=Path, default=RESULTS / "budget-calibration.json", help="points to plan by"
    )
    parser.add_argument("--judge", action="store_true", help="train nothing: judge the batches whose runs are there")
    arguments = parser.parse_args()
    if arguments.recalibrate:
        command = [sys.executable, "-m", "benchmarks.atlas_calibration", "--out", str(arguments.calibration)]
        subprocess.run(command, check=True)
    sizes = QUICK_SIZES if arguments.quick else TARGET_TOKENS
    if not arguments.judge:
        measure(arguments.runs, workers=arguments.workers, sizes=sizes)
    figures, details = judge(arguments.runs, arguments.calibration, sizes)
    name = "budget-quick" if arguments.quick else "budget"
    print(table(details["outcomes"]))
    print(json.dumps(figures, indent=2))
    record(name, figures, table_markdown=table(details["outcomes"]), details=details)


def judge(
    runs_file: Path, calibration_file: Path, sizes: tuple[int, ...]
) -> tuple[dict[str, float | int | None], dict[str, Any]]:
    """Figures and what they come from, for the batches whose border is measured."""
    runs, calibration = read_runs(runs_file), json.loads(calibration_file.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        session = embedded_session(Path(folder))
        batches = [
            batch
            for batch in held_out_batches(session.count_target_tokens)
            if int(batch.name.rsplit("-", 1)[1]) in sizes and evaluate.is_measured(batch.name, runs)
        ]
        with Ledger.open(session.layout.ledger) as ledger:
            shipped = ensure_laws(session, ledger, "budget", no_progress)[0].fit
            fits = {
                "": ten_minute_fit(session, calibration),
                "_shipped": shipped,
                NUMBERS_ONLY: numbers_fit(session, calibration),
            }
            judged = {
                f"{name}{how}": [
                    evaluate.outcome_of(batch, evaluate.plan_rank(session, ledger, fit, batch, measure=asks), runs)
                    for batch in batches
                    if name != NUMBERS_ONLY or batch.kind != "numbers"
                ]
                for name, fit in fits.items()
                for how, asks in (("", True), ("_torch_free", False))
            }
        many_s = evaluate.plan_many_facts_s(session.root)
    fit = fits[""]
    figures: dict[str, float | int | None] = {"plans": len(batches)}
    for name, outcomes in judged.items():
        figures[f"share_rank_sufficient{name}"] = _share(outcomes, "planned_rank_works")
        figures[f"share_within_one_step{name}"] = _share(outcomes, "within_one_step")
    figures |= {
        **paper_law_figures(),
        "calibration_points_unsaturated": fit.points - fit.points_saturated,
        "residual_law_r2": fit.loss.r2,
        "residual_law_mape_holdout": fit.loss.mape_unseen_cell,
        "calibration_s": calibration["duration_s"],
        "calibration_cells": len(calibration["points"]),
        "plan_100k_s": round(many_s, 2),
    }
    return figures, {name or "outcomes": evaluate.outcome_rows(outcomes) for name, outcomes in judged.items()}


def paper_law_figures() -> dict[str, float | int | None]:
    """Fit of the paper's law to the MemFT-OT cells of the PhoneBook sweep, the last one that was measured."""
    sweep = json.loads((RESULTS / "phonebook.json").read_text(encoding="utf-8"))["figures"]
    return {"law_r2": sweep["law_r2_ot"], "law_mape_holdout": sweep["law_mape_unseen_cell_ot"]}


def ten_minute_fit(session: Session, calibration: dict[str, Any]) -> LawFit:
    """The law of one calibration alone, as `calibrate` would have fitted it."""
    return fit_laws(
        points_from_json(json.dumps(calibration)),
        confidence=session.policy.budget.confidence,
        max_kl_nats=session.policy.guard.max_kl_nats,
        density=density_from(calibration.get("density")),
    )


def numbers_fit(session: Session, calibration: dict[str, Any]) -> LawFit:
    """The law of the calibration's PhoneBook-like cells alone: does it plan for facts of other kinds?"""
    numbers = [point for point in calibration["points"] if point["kind"] == "numbers"]
    return ten_minute_fit(session, {**calibration, "points": numbers})


def _share(outcomes: list[evaluate.Outcome], attribute: str) -> float:
    return round(sum(getattr(o, attribute) for o in outcomes) / len(outcomes), 4) if outcomes else math.nan


def table(outcomes: list[dict[str, Any]]) -> str:
    """One row per batch."""
    rows = [
        (o["batch"], o["facts"], o["target_tokens"], o["planned_rank"] or "none", o["needed_rank"] or "none",
         "yes" if o["planned_rank_works"] else "no", "yes" if o["within_one_step"] else "no")
        for o in outcomes
    ]  # fmt: skip
    header = (
        "batch",
        "facts",
        "target tokens",
        "planned rank",
        "smallest that works",
        "planned works",
        "within one step",
    )
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
