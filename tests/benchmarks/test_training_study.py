"""The study of the trainer: its clock, its cells, its methods on a few facts of the embedded model, and what it makes of them."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from benchmarks.training import density, forgetting, gpu, objectives, summary, writing
from benchmarks.training.lab import Lab, Stopwatch, world_facts
from benchmarks.training.methods import CHANGES, Cell, write
from benchmarks.training.store import Row, Store, code_of_ours

from memupdate.progress import no_progress
from memupdate.training.memory import attach, detach
from memupdate.verification.inprocess import generate_greedy

TINY = {
    "model_type": "qwen3", "vocab_size": 2000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
ROW: Row = {
    "wall_s": 12.0, "cpu_s": 10.0, "epochs": 5, "steps": 20, "stopped": "proved", "cap_s": None, "proved": 16, "loss_nats": 0.1,
    "known_kept": 0.9, "probes": 10, "kl_nats": 0.02, "parameters": 1000, "target_tokens": 80,
}  # fmt: skip
FACTS = 3


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The study's own, with few anchors, as these take most of the time to sample."""
    lab = Lab.open(tmp_path_factory.mktemp("lab"), facts=8)
    guard = lab.session.policy.guard.model_copy(update={"anchors": 16, "holdout": 8, "anchor_tokens": 16})
    lab.session.policy = lab.session.policy.model_copy(update={"guard": guard})
    return lab


def test_the_clock_leaves_out_what_is_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"wall": 10.0, "cpu": 3.0}
    monkeypatch.setattr(time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(time, "process_time", lambda: now["cpu"])
    watch = Stopwatch()
    now.update(wall=11.0, cpu=3.5)
    with watch.paused():
        now.update(wall=15.0, cpu=6.5)
    assert (watch.wall_s, watch.cpu_s) == (1.0, 0.5)
    now.update(wall=15.25, cpu=6.75)
    assert (watch.wall_s, watch.cpu_s) == (1.25, 0.75)


def test_facts_are_distinct_new_to_the_model_and_the_same_every_time(lab: Lab) -> None:
    facts = world_facts(300, seed=5)
    assert len({fact.key for fact in facts}) == 300
    assert facts == world_facts(300, seed=5)
    known = {fact.key for fact in lab.session.workspace_probes}
    assert known
    assert not known & {fact.key for fact in facts}


def test_a_cell_is_found_again_under_the_same_code_only(tmp_path: Path) -> None:
    path, cell = tmp_path / "cells.jsonl", asdict(Cell("ours", 8, 2))
    first = Store.open(path).get_or("writing", cell, "v1", lambda: {"seconds": 1.5})
    again = Store.open(path)
    assert again.get_or("writing", cell, "v1", lambda: pytest.fail("measured twice")) == first
    assert again.get("writing", cell, "v2") is None
    assert again.get("density", cell, "v1") is None
    assert again.get("writing", cell | {"rank": 3}, "v1") is None


@pytest.mark.parametrize("method", ["ours", "paper-sft", "trl"])
def test_what_a_method_calls_proved_is_what_greedy_decoding_emits(lab: Lab, method: str) -> None:
    if method == "trl":
        pytest.importorskip("trl")
    cell = Cell(method, FACTS, 4, rate=3e-3 if method == "trl" else None)
    written = write(lab, cell, cap_s=60)
    assert written.stopped == "proved"
    assert written.memory.rank == 4
    assert written.cpu_s > 0
    assert written.steps >= written.epochs > 0
    assert lab.prove(written.memory, FACTS).proved == FACTS
    base, examples = lab.session.base, lab.examples(FACTS)
    model = attach(base.model, written.memory)
    try:
        answers = generate_greedy(base, model, [e.prompt_ids for e in examples], 16, no_progress)
    finally:
        base.model = detach(model)
    assert [tuple(answer) for answer in answers] == [e.target_ids for e in examples]


def test_a_changed_part_of_the_policy_is_a_cell_of_its_own() -> None:
    plain, changed = Cell("ours", 8, 2), Cell("ours", 8, 2, change="SFT")
    assert writing._key(plain) != writing._key(changed)
    assert set(CHANGES) <= {cell.change for cell in writing.cells_of(writing.FULL[0], 1e-3)}


def test_a_baseline_stops_at_its_cap(lab: Lab) -> None:
    written = write(lab, Cell("paper-sft", 8, 1, "mlp-one"), cap_s=0.2)
    assert written.stopped == "cap"
    assert 0.2 < written.cpu_s < 5


@pytest.mark.parametrize("method", ["ours", "trl"])
def test_a_shape_with_random_weights_is_timed(method: str) -> None:
    if method == "trl":
        pytest.importorskip("trl")
    row = gpu.measure(TINY, method, gpu.Load(facts=gpu.BATCH, epochs=2), torch.device("cpu"))
    assert row["tokens_per_s"] == pytest.approx(gpu.BATCH * (gpu.PROMPT + gpu.TARGET) / row["epoch_s"], rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_the_gpu_part_says_that_it_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run(Store.open(tmp_path / "cells.jsonl"), gpu.QUICK) == {}
    assert capsys.readouterr().out == gpu.NO_GPU + "\n"


def test_figures_are_none_until_they_are_measured(tmp_path: Path) -> None:
    figures = summary.figures(Store.open(tmp_path / "cells.jsonl"), summary.FULL)
    wanted = "time_ratio_trl_64 time_ratio_trl_256 time_ratio_trl_1024 time_ratio_paper_256 guard_cost_ratio bits_per_parameter known_kept"
    wanted += " known_kept_without_guard older_proved_after_20 exact_match_sft exact_match_ot exact_match_sw"
    assert set(wanted.split()) <= set(figures)
    assert set(figures.values()) == {None}


def test_figures_and_tables_of_measured_cells(tmp_path: Path) -> None:
    store, plan = Store.open(tmp_path / "cells.jsonl"), summary.QUICK
    (size,) = plan.sizes

    def keep(cell: Cell, **changed: object) -> None:
        store.get_or(writing.STUDY, writing._key(cell), writing.code_of(cell), lambda: {**ROW, **changed})

    keep(Cell("ours", size.facts, size.rank))
    for rate, seconds in zip(writing.TUNING, (40.0, 20.0, 30.0, 50.0), strict=True):
        keep(Cell("trl", size.facts, size.rank, rate=rate), cpu_s=seconds)
    keep(Cell("trl", size.facts, size.rank), cpu_s=200.0, proved=4, stopped="cap", cap_s=200.0)
    keep(Cell("ours", size.facts, size.rank, guard=writing.POLICY_GUARD), cpu_s=15.0)
    row = {"ranks": [1], "complete": 1, **{name: [1] for name in forgetting._COLUMNS}}
    line = forgetting.Line("memupdate", 1, 6, forgetting.KEPT)
    store.get_or(forgetting.STUDY, asdict(line), code_of_ours(), lambda: row)
    figures = summary.figures(store, replace(plan, batches=(1, 6)))
    assert writing.best_rate(store, size) == writing.TUNING[1]
    assert figures["time_ratio_trl_16"] == 0.5
    assert figures["time_ratio_trl_docs_rate_16"] == 0.05
    assert figures["trl_docs_rate_proved_share_16"] == 0.25
    assert figures["guard_cost_ratio"] == 1.5
    assert figures["known_kept"] == 1
    table = summary.tables(store, plan, "picture.svg")
    assert "16 facts, rank 4: trl docs | 200.0 | 12.0 | 5 | 20 | 4 of 16 | cap of 200 s |" in table
    summary.draw(store, plan, tmp_path / "picture.svg")
    assert "TRL, tuned rate" in (tmp_path / "picture.svg").read_text(encoding="utf-8")


def test_a_line_of_batches_uses_each_fact_once_and_forgets_without_replay(lab: Lab) -> None:
    line = forgetting.Line("no replay", 2, 2, forgetting.KEPT)
    batches = forgetting.batches_of(line)
    assert len({fact.key for batch in batches for fact in batch}) == 4
    row = forgetting._contrast(lab.session, line, [2, 2])
    assert row["facts"] == [2, 4]
    assert row["older"] == [0, 2]
    assert row["proved"][0] == 2
    assert row["proved"][1] == row["older_proved"][1] + 2


def test_the_density_of_a_rank_counts_only_where_every_fact_is_proved(tmp_path: Path) -> None:
    store, ladder = Store.open(tmp_path / "cells.jsonl"), density.Ladder(4, "mlp-one", (1, 2))
    for rank, proved in ((1, 3), (2, 4)):
        store.get_or(
            density.STUDY,
            density._cell(ladder, rank),
            code_of_ours(),
            lambda p=proved, r=rank: {"proved": p, "rank": r},
        )
    assert (density.found(store, ladder) or {})["rank"] == 2


def test_every_objective_gets_the_same_cells() -> None:
    for kind, methods in objectives.METHODS.items():
        cells = [objectives.cells_of(objectives.FULL, kind, method) for method in methods.values()]
        assert all(
            [replace(cell, method="") for cell in own] == [replace(cell, method="") for cell in cells[0]]
            for own in cells
        )
