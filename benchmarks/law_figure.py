"""The README's picture of the memory law, drawn from the shipped calibration: `python -m benchmarks.law_figure`.

Writes `docs/law.svg`; nothing is measured here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memupdate.law.fit import fit_laws
from memupdate.law.points import points_from_json
from memupdate.reports.figures.law import draw_law

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=Path, default=ROOT / "examples" / "atlas" / "calibration.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "law.svg", help="an SVG or PNG file")
    arguments = parser.parse_args()
    points = points_from_json(arguments.points.read_text(encoding="utf-8"))
    fit = fit_laws(points)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw_law(fit, points, arguments.out, title=f"What a rank holds: {len(points)} memories of the embedded model")
    print(f"{arguments.out}: {len(points)} points, loss law R² {fit.loss.r2 or 0:.3f}, fit {fit.fit_id}")


if __name__ == "__main__":
    main()
