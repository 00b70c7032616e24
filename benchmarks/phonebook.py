"""The paper's PhoneBook: names and random numbers, learnt by each objective at each rank and length, at equal steps.

    python -m benchmarks.phonebook [--quick] [--model PATH] [--data FILE] [--paper-sizes] [--recipe ours]

Exact match by greedy decoding, final loss, and the memory law per method with its R². Cells are kept in
`benchmarks/results/<name>-cells.json` as they are done: an interrupted run goes on, a finished one is only reported again. The default
sizes fit the embedded model (a quarter of an hour of one core); `--paper-sizes` wants an 8B model and a GPU. `--data` takes a file of the
paper's, such as PB4000.jsonl of its Llama or Qwen set, and writes its first entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.paper.cells import RECIPES, Cell, Store, run_cells
from benchmarks.paper.command import Sizes, load, parser, report, result_name, run, sizes_of
from benchmarks.paper.data import phonebook, prefix_of, read_phonebook

from memupdate.facts.render import Example
from memupdate.storage import file_sha256

METHODS = ("sft", "memft-ot", "memft-sw-curriculum", "memft-ot-full")
DEFAULT = Sizes((100, 200, 400, 800), (1, 2, 4, 8), epochs=60, min_steps=480)
QUICK = Sizes((100, 200), (1, 2), epochs=60, min_steps=480)
PAPER = Sizes((1000, 2000, 4000, 8000, 12000, 16000, 24000, 32000), (1, 2, 4, 8, 16, 32, 64), epochs=200, min_steps=480)
"""The paper's repository gives the curriculum up to four times these epochs; here every method has the same steps."""


def batch_size(length: int) -> int:
    """Entries a step: small sets want many small steps; from 1,000 tokens on as the paper trains Qwen."""
    return 16 if length >= 32_000 else 8 if length >= 8_000 else 4 if length >= 1_000 or length <= 200 else 8


def main(argv: Sequence[str] | None = None) -> dict[str, float | int | None]:
    arguments = parser(__doc__).parse_args(argv)
    sizes, recipe = sizes_of(arguments, default=DEFAULT, quick=QUICK, paper=PAPER), RECIPES[arguments.recipe]
    loaded, name = load(arguments), result_name("phonebook", arguments)
    facts = read_phonebook(arguments.data) if arguments.data else phonebook(max(sizes.lengths) // 2, seed=recipe.seed)
    pool = loaded.renderer.render_all(facts)
    cells = [
        _cell(method, rank, length, sizes, prefix_of(pool, length))
        for method in arguments.methods or METHODS
        for length in sizes.lengths
        for rank in sizes.ranks
    ]
    data = file_sha256(arguments.data) if arguments.data else "generated"
    store = Store.open(arguments.folder / f"{name}-cells.json", asdict(recipe), loaded.fingerprint, data)
    rows = run_cells(loaded.base, loaded.folder, recipe, cells, lambda cell: prefix_of(pool, cell.length), store)
    return report(name, rows, recipe, kind="", what="exact", folder=arguments.folder)


def _cell(method: str, rank: int, length: int, sizes: Sizes, examples: Sequence[Example]) -> Cell:
    size = batch_size(length)
    steps = max(sizes.min_steps, sizes.epochs * math.ceil(len(examples) / size))
    return Cell(method, rank, length, steps, size)


if __name__ == "__main__":
    run(main)
