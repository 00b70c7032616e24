"""Time to every fact proved, and what is left of the base model's own facts: every method at every size.

Invariant: in a size all methods get the same facts, rank and placement. A baseline runs until its proof, its own epochs or a stated
multiple of our time, and the row says which. Time is processor time of one thread, which is wall time on a free core; wall time is kept
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.training.lab import Lab
from benchmarks.training.methods import CHANGES, Cell, write
from benchmarks.training.store import Row, Store, code_of_baselines, code_of_ours

STUDY = "writing"
TUNING = (1e-3, 2e-3, 4e-3, 8e-3)
"""Rates of TRL that are tried at the smallest size; the one that proves first is used."""
TUNING_LARGER = (1e-3, 4e-3)
"""The same at larger sizes, which may want a lower one than the smallest."""

TUNING_ELSEWHERE = (4e-3, 8e-3, 1.6e-2)
"""The same under other placements at the smallest size."""


@dataclass(frozen=True)
class Size:
    """One number of facts."""

    facts: int
    rank: int
    cap: float
    """A baseline gets so many times our time at least."""
    guards: tuple[float, ...] = ()
    """Guard weights without the policy's harm budget, for the frontier."""
    papers: tuple[tuple[str, str], ...] = ()
    """Methods and placements of the paper's procedure."""
    changes: tuple[str, ...] = ()
    """Parts of our policy that are changed one at a time."""
    docs_rate: bool = True
    """Whether TRL runs at its documentation's rate too."""
    elsewhere: tuple[tuple[str, int], ...] = ()
    """Other placements, and the rank there: ours and TRL, at the best of TRL's rates."""
    rates: tuple[float, ...] = TUNING_LARGER
    """Of TRL."""
    rates_elsewhere: tuple[float, ...] = TUNING_LARGER


PAPER_RUNS = (("paper-memft-ot", "mlp-all"), ("paper-memft-ot", "mlp-one"))
"""The placement of all others, and the paper's own."""
FULL = (
    Size(
        64,
        4,
        12,
        guards=(5.0, 80.0),
        papers=PAPER_RUNS,
        changes=tuple(CHANGES),
        elsewhere=(("mlp-one", 16), ("mlp-last", 16)),
        rates=TUNING,
        rates_elsewhere=TUNING_ELSEWHERE,
    ),
    Size(
        256,
        8,
        10,
        guards=(5.0, 80.0),
        papers=PAPER_RUNS[:1],
        docs_rate=False,
        elsewhere=(("mlp-one", 32), ("mlp-last", 32)),
    ),
    Size(1024, 32, 3, docs_rate=False),
)
QUICK = (Size(16, 4, 6, guards=(80.0,), papers=PAPER_RUNS[:1], changes=("SFT",), rates=TUNING),)
POLICY_GUARD = 20.0


def run(lab: Lab, store: Store, sizes: Sequence[Size]) -> None:
    """Measure what is missing. TRL's rate is tuned at each size."""
    for size in sizes:
        ours, rate = _measure(lab, store, Cell("ours", size.facts, size.rank), 0.0), _tuned_rate(lab, store, size)
        for cell in cells_of(size, rate)[1:]:
            _measure(lab, store, cell, size.cap * ours["cpu_s"])
        for placement, rank in size.elsewhere:
            for cell in cells_elsewhere(size, placement, rank):
                _measure(lab, store, cell, size.cap * ours["cpu_s"])


def cells_of(size: Size, rate: float) -> list[Cell]:
    """All cells of a size, ours without a guard first."""
    ours = Cell("ours", size.facts, size.rank)
    cells = [ours, Cell("trl", size.facts, size.rank, rate=rate), replace(ours, guard=POLICY_GUARD)]
    if size.docs_rate:
        cells.append(Cell("trl", size.facts, size.rank))
    cells += [replace(ours, guard=weight, leash=False) for weight in size.guards]
    cells += [
        replace(ours, placement=placement) for placement in sorted({p for _, p in size.papers} - {ours.placement})
    ]
    cells += [replace(ours, change=change) for change in size.changes]
    return cells + [Cell(method, size.facts, size.rank, placement) for method, placement in size.papers]


def cells_elsewhere(size: Size, placement: str, rank: int) -> list[Cell]:
    """Ours without and with the guard, and TRL at every rate, under another placement."""
    there = Cell("ours", size.facts, rank, placement)
    trials = [Cell("trl", size.facts, rank, placement, rate=rate) for rate in size.rates_elsewhere]
    return [there, replace(there, guard=POLICY_GUARD), *trials]


def _tuned_rate(lab: Lab, store: Store, size: Size) -> float:
    ours = _measure(lab, store, Cell("ours", size.facts, size.rank), 0.0)
    for cell in _trials(size):
        _measure(lab, store, cell, size.cap * ours["cpu_s"])
    rate = best_rate(store, size)
    assert rate is not None  # all trials are measured
    return rate


def best_rate(store: Store, size: Size) -> float | None:
    """The rate of those tried with which TRL proves a size first, or most of it; None while one is not measured."""
    best = best_of(store, _trials(size))
    return best.rate if best else None


def best_of(store: Store, cells: Sequence[Cell]) -> Cell | None:
    """The cell that proves every fact first, or most of them; None while one is not measured."""
    measured = [(row["proved"], -row["cpu_s"], n) for n, cell in enumerate(cells) if (row := found(store, cell))]
    return cells[max(measured)[2]] if len(measured) == len(cells) else None


def _trials(size: Size) -> list[Cell]:
    return [Cell("trl", size.facts, size.rank, rate=rate) for rate in size.rates]


def code_of(cell: Cell) -> str:
    """What a cell's figures depend on besides itself."""
    return code_of_ours() if cell.method == "ours" else code_of_baselines()


def found(store: Store, cell: Cell) -> Row | None:
    """A cell's row, if it is measured."""
    return store.get(STUDY, _key(cell), code_of(cell))


def _measure(lab: Lab, store: Store, cell: Cell, cap_s: float) -> Row:
    return store.get_or(STUDY, _key(cell), code_of(cell), lambda: _row(lab, cell, cap_s))


def _row(lab: Lab, cell: Cell, cap_s: float) -> Row:
    written = write(lab, cell, cap_s=cap_s)
    proof = lab.prove(written.memory, cell.facts)
    return {
        "wall_s": round(written.wall_s, 3), "cpu_s": round(written.cpu_s, 3), "epochs": written.epochs, "steps": written.steps,
        "stopped": written.stopped, "cap_s": round(cap_s, 1) if cell.method != "ours" else None, "proved": proof.proved,
        "loss_nats": proof.loss_nats, "known_kept": proof.locality.share, "probes": proof.locality.probes, "kl_nats": proof.kl_nats,
        "parameters": written.memory.parameters, "target_tokens": sum(len(e.target_ids) for e in lab.examples(cell.facts)),
    }  # fmt: skip


def _key(cell: Cell) -> dict[str, object]:
    """A cell in the store."""
    return {name: value for name, value in asdict(cell).items() if value != ""}
