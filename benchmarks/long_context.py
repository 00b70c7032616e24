"""The paper's long-context test: one long passage by heart, under more and more random tokens.

    python -m benchmarks.long_context [--quick] [--model PATH] [--data FILE] [--noise 0 1] [--paper-sizes] [--recipe ours]

SFT, MemFT-OT and MemFT-SW with a sliding window, at each rank and length, at equal steps: final loss, the share of the passage that greedy
decoding emits before its first mistake, and the memory law with its R². SFT runs at every share of noise, the others on random tokens
only, as in the paper. Cells are kept in `benchmarks/results/<name>-cells.json` as they are done: an interrupted run goes on. The default
sizes fit the embedded model and its context of 512 tokens; `--paper-sizes` wants an 8B model and a GPU. `--data` takes a file of the
paper's, such as random.jsonl, as it is; of several passages in it the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.paper.cells import RECIPES, Cell, Store, run_cells
from benchmarks.paper.command import Loaded, Sizes, load, parser, report, result_name, run, sizes_of
from benchmarks.paper.data import QUESTION, Passage, ordinary_tokens, passage_example, prose, read_passages

from memupdate.facts.render import Example
from memupdate.storage import file_sha256

METHODS = ("sft", "memft-ot", "memft-sw-window")
DEFAULT = Sizes((50, 100, 200, 400), (1, 2, 4, 8), epochs=480, min_steps=480)
QUICK = Sizes((50, 100), (1, 2), epochs=480, min_steps=480)
PAPER = Sizes(
    (50, 100, 200, 500, 1000, 2000, 3000, 4000, 5000, 6000, 7000),
    (1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32, 48, 64, 128, 256, 512),
    epochs=2000,
    min_steps=480,
)
GIVEN = "as given"
"""Kind of a passage from a file: its noise is its own."""


def main(argv: Sequence[str] | None = None) -> dict[str, float | int | None]:
    options = parser(__doc__)
    options.add_argument(
        "--noise", nargs="+", type=float, default=[0.0, 1.0], help="shares of random tokens; not with --data"
    )
    arguments = options.parse_args(argv)
    sizes, recipe = sizes_of(arguments, default=DEFAULT, quick=QUICK, paper=PAPER), RECIPES[arguments.recipe]
    loaded, name = load(arguments), result_name("long-context", arguments)
    kinds = [GIVEN] if arguments.data else [_kind(noise) for noise in sorted(arguments.noise, reverse=True)]
    methods = arguments.methods or METHODS
    cells = [
        Cell(method, rank, length, sizes.epochs, 1, kind)
        for kind in kinds
        for method in methods
        if method == "sft" or kind == kinds[0]
        for length in sizes.lengths
        for rank in sizes.ranks
    ]
    passage = read_passages(arguments.data)[0] if arguments.data else Passage(QUESTION, prose(recipe.seed))
    ordinary = ordinary_tokens(loaded.renderer, int(loaded.folder.config["vocab_size"]))
    data = file_sha256(arguments.data) if arguments.data else "generated"
    store = Store.open(arguments.folder / f"{name}-cells.json", asdict(recipe), loaded.fingerprint, data)
    rows = run_cells(
        loaded.base, loaded.folder, recipe, cells, lambda cell: [_example(loaded, passage, cell, ordinary)], store
    )
    return report(name, rows, recipe, kind=kinds[0], what="prefix", folder=arguments.folder)


def _kind(noise: float) -> str:
    """As the paper names them: r0 has no random token, r100 nothing else."""
    return f"r{round(100 * noise)}"


def _example(loaded: Loaded, passage: Passage, cell: Cell, ordinary: Sequence[int]) -> Example:
    noise = 0.0 if cell.kind == GIVEN else int(cell.kind.removeprefix("r")) / 100
    return passage_example(loaded.renderer, passage, cell.length, noise=noise, seed=cell.repeat, ordinary=ordinary)


if __name__ == "__main__":
    run(main)
