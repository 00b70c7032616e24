"""Tables say what the dataclasses say; the picture is drawn, repeatable and reads its points."""

import io
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from memupdate.budget.plan import Limits, PlacementShape, PlanRequest
from memupdate.budget.planner import plan_update
from memupdate.law.fit import fit_laws
from memupdate.law.points import LawPoint, points_to_json
from memupdate.reports.figures.law import chosen_ranks, draw_law
from memupdate.reports.tables import human_bytes, human_duration, law_table, plan_table, points_table

PLACEMENT = PlacementShape("mlp-all", (("model.layers.0.mlp.gate_proj", 960, 1920),))


def points(harm=True):
    rng = np.random.default_rng(0)
    found = []
    for rank in (1, 2, 4, 8, 16):
        for facts in (32, 64, 128):
            power = 60 * facts * (rank * 2880) ** -1.2 * np.exp(rng.normal(0, 0.1))
            found.append(
                LawPoint(
                    "sha256:a", "mlp-all", "sha256:r", rank, rank * 2880, facts, 5 * facts, 5.9, float(0.05 + power),
                    int(rng.binomial(facts, 1 / (1 + 3 * power))), 0.01 / rank if harm else None, 30,
                    bool(power < 0.02), float(facts / 8),
                )
            )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def fit():
    return fit_laws(points(), bootstrap=40)


def text(renderable):
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_plan_table_has_every_figure(fit):
    request = PlanRequest("acme", 48, 2, 3, 120, 240, 600, 8, PLACEMENT, fit, Limits(8, 512, 0.9, 0.03))
    plan = plan_update(request)
    shown = text(plan_table(plan))
    for part in (
        "Plan for acme", "48 new, 2 superseding, 3 stored already; 120 live", "240 new, 600 live", "mlp-all",
        f"8 → {plan.rank} (limit 512)" if plan.rank != 8 else "8 → 8", f"{plan.effective_parameters:,}",
        f"{plan.predicted_loss_nats.mid:.3g} (", "KL ", f"{plan.bits_per_parameter:.3f} (bounds: 2 knowledge, 3.6 mem",
        human_bytes(plan.adapter_bytes), human_duration(plan.expected_duration_s.mid), "Why",
    ):  # fmt: skip
        assert part in shown
    squeezed = re.sub(r"[\s│]+", " ", shown)
    assert all(re.sub(r"\s+", " ", reason) in squeezed for reason in plan.reasons)


def test_law_table_shows_parameters_fit_and_range(fit):
    shown = text(law_table(fit))
    for part in (
        "ΔL = C·r^α·ℓ^(−β) + b",
        "α = ",
        "γ = ",
        "y0 = ",
        "proved = σ(a − s·x)",
        "R² ",
        "160 to 640",
        fit.fit_id,
    ):
        assert part in shown
    assert "not fitted" not in shown


def test_law_table_says_what_was_not_fitted():
    full = [point for point in points(harm=False) if point.rank >= 8]
    assert "not fitted" in text(law_table(fit_laws(full, bootstrap=40)))


def test_points_table_marks_early_stops():
    shown = text(points_table(points()))
    assert "* stopped when every token had cleared the margin" in shown
    assert "2,880" in shown


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (184_320, "180 KiB"), (5 << 30, "5 GiB")]
)
def test_human_bytes(count, shown):
    assert human_bytes(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.44, "0.4 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (11_400, "3 h 10 min")],
)
def test_human_duration(seconds, shown):
    assert human_duration(seconds) == shown


def test_the_picture_is_an_svg_that_repeats_byte_for_byte(fit, tmp_path):
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    draw_law(fit, points(), first, title="What a rank holds")
    draw_law(fit, points(), second, title="What a rank holds")
    assert first.read_bytes() == second.read_bytes()
    root = ElementTree.fromstring(first.read_text())
    assert root.tag.endswith("svg")
    assert "dc:date" not in first.read_text()


def test_the_picture_as_png(fit, tmp_path):
    path = tmp_path / "law.png"
    draw_law(fit, points(), path, title="What a rank holds")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_at_most_five_ranks_get_a_curve_ends_included():
    base = points()[0]
    many = [LawPoint(**{**base.__dict__, "rank": rank}) for rank in range(1, 13)]
    ranks = chosen_ranks(many)
    assert len(ranks) == 5
    assert (ranks[0], ranks[-1]) == (1, 12)
    assert chosen_ranks(points()) == [1, 2, 4, 8, 16]


def test_the_benchmark_draws_from_a_calibration_document(tmp_path):
    calibration, out = tmp_path / "calibration.json", tmp_path / "docs" / "law.svg"
    calibration.write_text(points_to_json(points(), about="synthetic"), encoding="utf-8")
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "benchmarks.law_figure", "--points", str(calibration), "--out", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "15 points" in done.stdout
    assert out.read_text().startswith("<?xml")
