"""Training that does not fit is refused before facts are taken, with what to change; `plan` tells the need without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memupdate import Workspace
from memupdate.budget.placement import resolve_placement
from memupdate.budget.training_memory import TrainingLoad, estimate_memory, mending
from memupdate.errors import ExitCode, ModelError, UsageError
from memupdate.models.folder import resolve_model
from memupdate.operations import room

FACTS = [
    {"prompt": f"Who keeps lighthouse {n}?", "target": name} for n, name in enumerate(("Una Marlow", "Piet Oswin"))
]
QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
LOAD = TrainingLoad(
    batch_size=16, longest_tokens=64, longest_target_tokens=16, anchors_per_step=8, anchor_tokens=64, train_basis=False,
    dtype="bfloat16", cached_tokens=100_000, cache_limit_bytes=2**29, on_gpu=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace, made once: it takes seconds."""
    return Workspace.init(tmp_path_factory.mktemp("made") / "ws", model="atlas", collection="acme").root


@pytest.fixture
def workspace(tmp_path: Path, made: Path) -> Workspace:
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    shutil.copytree(made, tmp_path / "ws")
    return Workspace(tmp_path / "ws")


def set_policy(workspace: Workspace, lines: str) -> Workspace:
    file = workspace.root / "policy.toml"
    file.write_text(file.read_text() + f"\n[resources]\n{lines}\n")
    return Workspace(workspace.root)


def test_what_does_not_fit_leaves_no_trace(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda: 2**20)
    with pytest.raises(UsageError) as caught:
        workspace.add(tmp_path / "facts.jsonl", publish=False)
    error = caught.value
    assert error.exit_code == ExitCode.BAD_INPUT
    assert "beside the base model, and 1 MiB are free" in error.message
    assert any(line.startswith("activations ") for line in error.details)
    with workspace.reader() as ledger:
        assert ledger.batches() == []
        assert ledger.live_facts("acme") == []


def test_plan_tells_the_need_and_what_is_free(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> str:
        return next(line for line in workspace.plan(tmp_path / "facts.jsonl").messages if "of memory" in line)

    line = told()
    assert line.startswith("training takes about 4")
    assert "weights 14 MiB" in line
    assert line.endswith("are free")
    monkeypatch.setattr(room, "free_bytes", lambda: 2**28)
    assert told().endswith("256 MiB are free: `add` will refuse, and say what to change")
    monkeypatch.setattr(room, "free_bytes", lambda: None)
    assert "free" not in told()


def test_planning_loads_no_torch(workspace: Workspace, tmp_path: Path) -> None:
    code = (
        "import sys; from memupdate import Workspace; from pathlib import Path; "
        f"Workspace({str(workspace.root)!r}).plan(Path({str(tmp_path / 'facts.jsonl')!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("checkpointing", "free", "expected"),
    [("auto", None, False), ("auto", 2**40, False), ("always", 2**40, True), ("auto", "between", True)],
)
def test_checkpointing_by_policy_and_by_need(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, checkpointing: str, free: Any, expected: bool
) -> None:
    session = set_policy(workspace, f'checkpointing = "{checkpointing}"\nmemory_share = 1.0').session
    examples = session.training_examples(session.workspace_probes[:8])
    if free == "between":
        needs = []
        for recompute in (False, True):
            lengths = [(e.length, len(e.target_ids)) for e in examples]
            load = replace(room._load(session, lengths, on_gpu=False), recompute=recompute)
            needs.append(estimate_memory(session.folder.config, session.shape, 4, load).beside_weights)
        assert needs[1] < needs[0]
        free = sum(needs) // 2
    monkeypatch.setattr(room, "free_bytes", lambda: free)
    assert room.means_for(session, 4, examples).recompute == expected


def test_bounds_of_the_cache_are_the_policys(workspace: Workspace) -> None:
    session = set_policy(workspace, "cache_memory_mib = 3\ncache_file_mib = 5").session
    bounds = room.means_for(session, 4, session.training_examples(session.workspace_probes[:2])).cache
    assert (bounds.memory_bytes, bounds.file_bytes, bounds.folder) == (3 * 2**20, 5 * 2**20, session.layout.cache)


def test_what_is_free_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    monkeypatch.setattr(room, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    assert room.free_bytes() == 1000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert room.free_bytes() == 1000 * 1024
    for name, text in (("max", "600000\n"), ("current", "300000\n"), ("stat", "anon 1\ninactive_file 50000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert room.free_bytes() == 350000
    monkeypatch.setattr(room, "_MEMINFO", tmp_path / "missing")
    assert room.free_bytes() is None


def test_weights_of_the_embedded_model_to_the_byte() -> None:
    folder = resolve_model("atlas")
    load = replace(LOAD, dtype="bfloat16")
    estimate = estimate_memory(folder.config, resolve_placement("mlp-all", folder.config), 4, load)
    size = sum(file.stat().st_size for file in folder.weight_files)
    assert estimate.weights <= size <= estimate.weights + 10_000  # the file's header


def test_an_8b_model_by_parts() -> None:
    """Qwen3-8B has 8.19 billion numbers."""
    shape = resolve_placement("mlp-all", QWEN3_8B)
    estimate = estimate_memory(QWEN3_8B, shape, 16, LOAD)
    assert estimate.weights == pytest.approx(2 * 8.19e9, rel=0.002)
    small = estimate_memory(QWEN3_8B, shape, 16, replace(LOAD, quantization="4bit"))
    assert small.weights < 0.45 * estimate.weights
    assert estimate_memory(QWEN3_8B, shape, 16, replace(LOAD, recompute=True)).activations < 0.1 * estimate.activations
    assert estimate_memory(QWEN3_8B, shape, 16, replace(LOAD, train_basis=True)).adapter > estimate.adapter
    one = estimate_memory(QWEN3_8B, resolve_placement("mlp-one", QWEN3_8B), 16, LOAD)
    assert one.activations == pytest.approx(estimate.activations * 15 / 36)  # layer 21 of 36 and what is above


def test_what_to_change_is_enough_and_nothing_else() -> None:
    shape = resolve_placement("mlp-all", QWEN3_8B)
    need = estimate_memory(QWEN3_8B, shape, 16, LOAD)
    assert mending(QWEN3_8B, shape, 16, LOAD, need.total) != []
    lines = mending(QWEN3_8B, shape, 16, LOAD, need.total - need.activations // 3)
    assert 'resources.checkpointing = "always", which runs each layer twice' in lines
    assert "training.batch_size = 8 in the policy" in lines
    assert mending(QWEN3_8B, shape, 16, LOAD, need.weights // 8) == []


def test_weights_shared_out_among_gpus() -> None:
    """Each holds a share of the layers, one whole layer at a time, and the embeddings."""
    shape = resolve_placement("mlp-all", QWEN3_8B)
    load = replace(LOAD, on_gpu=True)
    need, of_four = (estimate_memory(QWEN3_8B, shape, 16, replace(load, shards=n)) for n in (1, 4))
    layers = 2 * 36 * 192.9e6  # Qwen3-8B: 4096 · (4096 · 2 + 1024 · 2 + 12288 · 3) numbers a layer
    assert need.weights - of_four.weights == pytest.approx(layers * (1 - 1 / 4 - 1 / 36), rel=0.01)
    lines = mending(QWEN3_8B, shape, 16, load, need.total - need.weights // 2)
    assert any(line.startswith('resources.sharding = "fsdp"') and "--num_processes 4" in line for line in lines)
    on_cpu = replace(LOAD, on_gpu=False)
    assert not any("fsdp" in line for line in mending(QWEN3_8B, shape, 16, on_cpu, need.total - need.weights // 2))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_weights_need_their_library(workspace: Workspace, bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    session = set_policy(workspace, f'quantization = "{bits}"').session
    assert session.recipe != workspace.session.recipe  # a law of its own
    with pytest.raises(ModelError, match="needs bitsandbytes, which is not installed"):
        _ = session.base
