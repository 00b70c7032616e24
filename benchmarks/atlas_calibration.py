"""Calibrates the embedded base model and writes the points that ship with it.

    python -m benchmarks.atlas_calibration [--placement NAME] [--minutes 10] [--out FILE] [--workspace DIR]

`memupdate calibrate` by the atlas policy: cells chosen for what they tell about plans, two processes of one thread. The policy's own
placement goes to `examples/atlas/calibration.json`, another to a file of its own beside it. `--workspace` keeps the workspace, so that
an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from memupdate import Workspace
from memupdate.budget.placement import PLACEMENTS
from memupdate.law.points import points_to_json
from memupdate.progress import ProgressEvent
from memupdate.resources import resource_dir

OWN = "mlp-all"
"""The atlas policy's placement."""


def show(event: ProgressEvent) -> None:
    if event.stage == "calibrate":
        print(event.message, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--placement", choices=PLACEMENTS, default=OWN)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workspace", type=Path)
    arguments = parser.parse_args()
    placement = arguments.placement
    file = "calibration.json" if placement == OWN else f"calibration-{placement}.json"
    out = arguments.out or resource_dir("atlas") / file
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.workspace or Path(folder) / "workspace"
        if not root.exists():
            model = Path(folder) / "atlas"
            # Without the points that ship with it, which would count as done.
            shutil.copytree(resource_dir("atlas"), model, ignore=shutil.ignore_patterns("calibration*.json"))
            Workspace.init(root, model=str(model), policy="atlas", collection="calibration")
        report = Workspace(root).calibrate(minutes=arguments.minutes, placements=[placement], progress=show)
    density = report.fit.density
    about = {
        "command": "python -m benchmarks.atlas_calibration" + ("" if placement == OWN else f" --placement {placement}"),
        "machine": platform.machine(),
        "policy": "atlas",
        "cost": report.messages,
        "duration_s": round(report.duration_s, 1),
        "density": None if density is None else asdict(density),
    }
    points = [point for point in report.points if point.origin != "batch"]
    out.write_text(points_to_json(points, **about), encoding="utf-8")
    for p in points:
        print(
            f"{p.kind:8} rank {p.rank:3}  facts {p.facts:4}  tokens {p.target_tokens:5}  loss {p.loss_before_nats:.2f} → "
            f"{p.loss_after_nats:.3f}  proved {p.facts_proved:4}  KL {p.kl_nats:.4f}  epochs {p.epochs:3}  {p.duration_s:.0f} s"
        )
    print("\n".join([*report.messages, f"{len(points)} points → {out}"]))


if __name__ == "__main__":
    main()
