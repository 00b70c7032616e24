"""Our trainer against TRL and the paper's procedure: time, harm, forgetting, objectives, density; and an 8B shape where a GPU is.

    python -m benchmarks.training [--quick] [--parts writing forgetting objectives density gpu] [--work DIR]

The embedded model, one thread, out of the way of others. Cells are kept as JSON lines in `--work`: an interrupted study goes on, and a
finished one is only summed up again. TRL comes with the extra `bench`. The full study takes about an hour of one core, `--quick` a few
minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads would take the cores of others
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from benchmarks.recording import RESULTS, record
from benchmarks.training import density, forgetting, gpu, objectives, summary, writing
from benchmarks.training.lab import Lab
from benchmarks.training.store import Store

PARTS = ("writing", "forgetting", "objectives", "density", "gpu")


def main(argv: Sequence[str] | None = None) -> summary.Figures:
    arguments = _arguments(argv)
    _be_quiet(arguments.nice)
    plan = summary.QUICK if arguments.quick else summary.FULL
    name = "training-quick" if arguments.quick else "training"
    store = Store.open(arguments.work / f"{name}-cells.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab.open(Path(folder), facts=plan.sizes[-1].facts)
        for part in arguments.parts:
            _run(part, lab, store, plan, arguments.sizes, arguments.folder)
    found = summary.figures(store, plan)
    summary.draw(store, plan, arguments.folder / f"{name}.svg")
    table = summary.tables(store, plan, f"{name}.svg")
    cells = os.path.relpath(store.path, arguments.folder)
    record(name, found, table_markdown=table, details={"cells_in": cells}, folder=arguments.folder)
    print(table)
    print(json.dumps(found, indent=2))
    return found


def _run(part: str, lab: Lab, store: Store, plan: summary.Plan, sizes: Sequence[int] | None, folder: Path) -> None:
    if part == "writing":
        chosen = [size for size in plan.sizes if not sizes or size.facts in sizes]
        writing.run(lab, store, chosen)
    elif part == "forgetting":
        forgetting.run(lab, store, plan.batches)
    elif part == "objectives":
        objectives.run(lab, store, plan.sweep)
    elif part == "density":
        density.run(lab, store, plan.ladders)
    elif rows := gpu.run(store, plan.load):
        gpu.report(rows, folder)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same study of a few facts")
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=PARTS, help="only these; none: only sum up what is measured"
    )
    parser.add_argument("--sizes", nargs="+", type=int, help="of the part writing, only these numbers of facts")
    parser.add_argument("--nice", type=int, default=10, help="0 where the core is yours")
    parser.add_argument("--work", type=Path, default=RESULTS, help="where cells are kept")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go")
    return parser.parse_args(argv)


def _be_quiet(nice: int) -> None:
    """One thread, out of the way of others, without the libraries' own lines."""
    import torch
    from transformers.utils import logging

    os.nice(nice)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(trl|transformers|peft|accelerate|torch)")


if __name__ == "__main__":
    main()
