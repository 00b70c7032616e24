"""Calibrates the embedded base model and writes the points that ship with it.

    python -m benchmarks.atlas_calibration [--out examples/atlas/calibration.json]

Twenty cells (rank × facts), each trained by the atlas policy as `memupdate add` would; about 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

from memupdate import Workspace
from memupdate.law.points import points_to_json
from memupdate.progress import ProgressEvent
from memupdate.resources import resource_dir


def show(event: ProgressEvent) -> None:
    if event.stage == "calibrate":
        print(f"{event.done:.0f}/{event.total}  {event.message}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=resource_dir("atlas") / "calibration.json")
    arguments = parser.parse_args()
    arguments.out.unlink(missing_ok=True)  # shipped points would count as done
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Workspace.init(Path(folder) / "workspace", model="atlas", collection="calibration").calibrate(
            progress=show
        )
    about = {"command": "python -m benchmarks.atlas_calibration", "machine": platform.machine(), "policy": "atlas"}
    arguments.out.write_text(points_to_json(report.points, **about), encoding="utf-8")
    for p in report.points:
        print(
            f"rank {p.rank:3}  facts {p.facts:4}  tokens {p.target_tokens:5}  loss {p.loss_before_nats:.2f} → {p.loss_after_nats:.3f}  "
            f"proved {p.facts_proved:4}  KL {p.kl_nats:.4f}  epochs {p.epochs:3}  {p.duration_s:.0f} s"
        )
    print(f"{len(report.points)} cells in {time.monotonic() - started:.0f} s → {arguments.out}")


if __name__ == "__main__":
    main()
