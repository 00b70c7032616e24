"""Figures, tables and the picture, from cells that follow a known law; and both commands from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmarks.paper import cells
from benchmarks.paper.cells import PAPER, Cell, Measured
from benchmarks.paper.command import Sizes
from benchmarks.paper.summary import draw, figures, laws, tables

from benchmarks import long_context, phonebook
from memupdate.law.memory_law import MemoryLaw
from memupdate.training import loop


def made_by_a_law(method: str, kind: str, exact: int) -> list[Measured]:
    """ΔL = 6·r^0.5·ℓ^(−0.4) + 0.2, of a base loss of 8 nats that no cell comes near."""
    return [
        Measured(
            Cell(method, rank, length, 480, 4, kind), 10, length, 900 * rank, 8.0,
            8.0 - (6 * rank**0.5 * length**-0.4 + 0.2), exact, 0.5, 0.75, False, 480, 60, 2.0,
        )
        for rank in (1, 2, 4, 8) for length in (100, 200, 400, 800)
    ]  # fmt: skip


def test_a_law_is_found_again_and_shares_are_means() -> None:
    rows = made_by_a_law("sft", "r100", 4) + made_by_a_law("memft-ot", "r100", 7) + made_by_a_law("sft", "r0", 9)
    fitted = laws(rows, PAPER)
    law = fitted["r100", "sft"]
    assert isinstance(law, MemoryLaw)
    assert (law.alpha.mid, law.beta.mid) == pytest.approx((0.5, 0.4), abs=0.02)
    found = figures(rows, fitted, kind="r100")
    assert (found["exact_match_sft"], found["exact_match_ot"]) == (0.4, 0.7)
    assert found["prefix_share_sft"] == 0.5
    assert found["law_r2_sft"] == pytest.approx(1.0, abs=1e-3)
    assert found["law_r2_sft_r0"] == pytest.approx(1.0, abs=1e-3)
    assert found["cells"] == 48
    text = tables(rows, fitted, "exact")
    assert text.count("| sft, rank 1 | 40.0 | 40.0 | 40.0 | 40.0 |") == 1
    assert "| sft r0 |" in text


def test_what_cannot_be_fitted_says_why() -> None:
    rows = made_by_a_law("sft", "", 10)[:3]
    fitted = laws(rows, PAPER)
    assert figures(rows, fitted, kind="")["law_r2_sft"] is None
    assert "unsaturated points" in tables(rows, fitted, "exact")


def test_the_picture_is_an_svg_with_a_line_per_method(tmp_path: Path) -> None:
    rows = made_by_a_law("sft", "", 4) + made_by_a_law("memft-sw-window", "", 7)
    draw(rows, laws(rows, PAPER), PAPER, tmp_path / "picture.svg", kind="", what="prefix")
    text = "".join(ElementTree.parse(tmp_path / "picture.svg").getroot().itertext())
    assert "memft-sw-window" in text
    assert "rank 8" in text


@pytest.fixture
def _threads_as_before() -> Iterator[None]:
    """The commands set the number of threads, and other tests compare bit for bit."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("benchmark", [phonebook, long_context])
def test_a_command_writes_its_results_and_goes_on_where_it_was(
    benchmark: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    monkeypatch.setattr(benchmark, "QUICK", Sizes((22,), (1, 2), epochs=3, min_steps=6))
    options = ["--quick", "--folder", str(tmp_path), "--methods", "sft", "memft-ot", "--dtype", "float32"]
    figures = benchmark.main(options)  # type: ignore[attr-defined]
    name = {phonebook: "phonebook-quick", long_context: "long-context-quick"}[benchmark]  # type: ignore[index]
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["figures"] == figures
    assert figures["final_loss_nats_sft"] > 0
    assert "sft, rank 2" in (tmp_path / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.svg").is_file()
    before = (tmp_path / f"{name}-cells.json").read_bytes()

    def no_training(*_: object) -> Measured:
        raise AssertionError("a cell that is done was trained again")

    monkeypatch.setattr(cells, "run_cell", no_training)
    assert benchmark.main(options) == figures  # type: ignore[attr-defined]
    assert (tmp_path / f"{name}-cells.json").read_bytes() == before


def test_what_the_user_can_mend_is_told_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text('{"query": "Jane Doe:", "target": "2025550123"}\n')
    command = [
        sys.executable,
        "-m",
        "benchmarks.long_context",
        "--quick",
        "--data",
        str(file),
        "--folder",
        str(tmp_path),
    ]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        f"error: {file}:1: not a passage ('question')",
        'hint: each line is {"question": …, "matching": …}',
    ]
