"""Exact match of the three objectives at equal rank and equal steps, on PhoneBook-like entries and on a passage of random tokens.

Invariant: the cells are chosen by size alone; all objectives get each of them. SW is the curriculum over entries for PhoneBook and the
sliding window for a passage, as in the paper. Training and measuring are those of `benchmarks.paper`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

from benchmarks.paper.cells import PAPER, Cell, run_cell
from benchmarks.paper.data import QUESTION, Passage, ordinary_tokens, passage_example, phonebook, prefix_of, prose
from benchmarks.training.lab import Lab
from benchmarks.training.store import Row, Store, code_of_ours

from memupdate.facts.render import Example

STUDY = "objectives"
METHODS = {
    "phonebook": {"sft": "sft", "ot": "memft-ot", "sw": "memft-sw-curriculum"},
    "passage": {"sft": "sft", "ot": "memft-ot", "sw": "memft-sw-window"},
}
"""Kind of data → short name → objective."""


@dataclass(frozen=True)
class Sweep:
    """Lengths in target tokens, each at each rank."""

    phonebook: tuple[tuple[int, ...], tuple[int, ...]]
    passage: tuple[tuple[int, ...], tuple[int, ...]]
    steps: int


FULL = Sweep(phonebook=((300,), (2, 4)), passage=((150,), (1, 2)), steps=480)
QUICK = Sweep(phonebook=((50,), (1,)), passage=((30,), (1,)), steps=480)


def cells_of(sweep: Sweep, kind: str, method: str) -> list[Cell]:
    """All cells of one objective on one kind of data."""
    lengths, ranks = sweep.phonebook if kind == "phonebook" else sweep.passage
    return [Cell(method, rank, length, sweep.steps, _batch(kind, length), kind) for length in lengths for rank in ranks]


def run(lab: Lab, store: Store, sweep: Sweep) -> None:
    """Measure what is missing."""
    for kind, methods in METHODS.items():
        for method in methods.values():
            for cell in cells_of(sweep, kind, method):
                store.get_or(STUDY, asdict(cell), code_of_ours(), lambda cell=cell: _row(lab, cell))


def found(store: Store, sweep: Sweep, kind: str, short: str) -> list[Row]:
    """The rows of one objective; fewer than cells while the study is not done."""
    rows = [store.get(STUDY, asdict(cell), code_of_ours()) for cell in cells_of(sweep, kind, METHODS[kind][short])]
    return [row for row in rows if row is not None]


def _row(lab: Lab, cell: Cell) -> Row:
    session = lab.session
    measured = run_cell(session.base, session.folder, PAPER, cell, _examples(lab, cell))
    values = {name: value for name, value in asdict(measured).items() if name != "cell"}
    return {"length": cell.length, "rank": cell.rank, "exact_share": measured.exact_share, **values}


def _examples(lab: Lab, cell: Cell) -> Sequence[Example]:
    renderer = lab.session.renderer
    if cell.kind == "phonebook":
        return prefix_of(renderer.render_all(phonebook(cell.length // 2, seed=PAPER.seed)), cell.length)
    passage = Passage(QUESTION, prose(PAPER.seed))
    return [passage_example(renderer, passage, cell.length, noise=1.0, seed=PAPER.seed, ordinary=_ordinary(lab))]


@cache
def _ordinary_of(vocabulary: int, renderer: object) -> tuple[int, ...]:
    return tuple(ordinary_tokens(renderer, vocabulary))  # type: ignore[arg-type]


def _ordinary(lab: Lab) -> Sequence[int]:
    return _ordinary_of(int(lab.session.folder.config["vocab_size"]), lab.session.renderer)


def _batch(kind: str, length: int) -> int:
    """Entries a step: small sets want many small steps, as in `benchmarks.phonebook`."""
    if kind == "passage":
        return 1
    return 4 if length <= 300 else 8
