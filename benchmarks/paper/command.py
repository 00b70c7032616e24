"""What both benchmarks share on the command line: model, sizes, recipe, where results go."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads would take the cores of others

from benchmarks.paper.cells import RECIPES, Measured, Recipe
from benchmarks.paper.summary import draw, figures, laws, tables
from benchmarks.recording import RESULTS, record

from memupdate.errors import MemupdateError
from memupdate.facts.render import Renderer
from memupdate.models.base import BaseModel, load_base
from memupdate.models.folder import ModelFolder, resolve_model


@dataclass(frozen=True)
class Loaded:
    """A base model, ready."""

    folder: ModelFolder
    base: BaseModel
    renderer: Renderer
    fingerprint: str


@dataclass(frozen=True)
class Sizes:
    """A sweep."""

    lengths: tuple[int, ...]
    ranks: tuple[int, ...]
    epochs: int
    min_steps: int


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that both have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default="atlas", help="a model folder or hub id; the embedded model if left out")
    found.add_argument("--quick", action="store_true", help="a few small cells, some minutes of one core")
    found.add_argument(
        "--paper-sizes", action="store_true", help="the paper's lengths, ranks and epochs; for a GPU and an 8B model"
    )
    found.add_argument("--data", type=Path, help="one of the paper's files, in place of a generated set")
    found.add_argument("--recipe", choices=sorted(RECIPES), default="paper", help="placement and hyper-parameters")
    found.add_argument("--methods", nargs="+", help="in place of the default objectives")
    found.add_argument("--lengths", nargs="+", type=int, help="target tokens")
    found.add_argument("--ranks", nargs="+", type=int)
    found.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the base model")
    found.add_argument("--threads", type=int, default=1, help="of the CPU")
    found.add_argument("--name", help="of the results, in place of one made of the options")
    found.add_argument("--folder", type=Path, default=RESULTS, help="where results and cells go")
    return found


def load(arguments: argparse.Namespace) -> Loaded:
    """The model. Raises ModelError."""
    import torch

    torch.set_num_threads(arguments.threads)
    folder = resolve_model(arguments.model)
    base = load_base(folder, dtype=arguments.dtype)
    context = int(folder.config.get("max_position_embeddings", 0))
    with tempfile.TemporaryDirectory() as cache:
        fingerprint = folder.fingerprint(Path(cache))
    return Loaded(folder, base, Renderer(base.tokenizer, context=context), fingerprint)


def run(main: Callable[[], object]) -> None:
    """Run a benchmark; what the user can mend is told in two lines."""
    try:
        main()
    except MemupdateError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        raise SystemExit(int(error.exit_code)) from None


def sizes_of(arguments: argparse.Namespace, *, default: Sizes, quick: Sizes, paper: Sizes) -> Sizes:
    """The sweep that is asked for."""
    chosen = paper if arguments.paper_sizes else quick if arguments.quick else default
    return Sizes(
        tuple(arguments.lengths or chosen.lengths),
        tuple(arguments.ranks or chosen.ranks),
        chosen.epochs,
        chosen.min_steps,
    )


def result_name(benchmark: str, arguments: argparse.Namespace) -> str:
    """`--name`, or one that tells other models, recipes, data and sizes apart."""
    if arguments.name:
        return str(arguments.name)
    parts = [benchmark]
    if arguments.model != "atlas":
        parts.append(Path(arguments.model).name.lower())
    if arguments.data:
        parts.append(arguments.data.stem.lower())
    if arguments.recipe != "paper":
        parts.append(arguments.recipe)
    parts += ["quick"] if arguments.quick else ["paper-sizes"] if arguments.paper_sizes else []
    return "-".join(parts)


def report(
    name: str, rows: Sequence[Measured], recipe: Recipe, *, kind: str, what: str, folder: Path
) -> dict[str, float | int | None]:
    """Write `<name>.json`, `.md` and `.svg`; returns the figures."""
    fitted = laws(rows, recipe)
    found = figures(rows, fitted, kind=kind)
    found["trained_s"] = round(sum(row.duration_s for row in rows), 1)
    draw(rows, fitted, recipe, folder / f"{name}.svg", kind=kind, what=what)
    table = f"![what each rank holds]({name}.svg)\n\n{tables(rows, fitted, what)}"
    record(
        name,
        found,
        table_markdown=table,
        details={"recipe": recipe.name, "cells_in": f"{name}-cells.json"},
        folder=folder,
    )
    print(table)
    return found
