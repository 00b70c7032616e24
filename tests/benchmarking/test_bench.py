"""`memupdate bench` on the embedded model: a real file of edits in, the field's table out, checked against plain transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from memupdate.cli import app
from memupdate.errors import FactsError, UsageError
from memupdate.operations.bench import BenchWish, run_bench
from memupdate.resources import resource_dir

EDITS = 4


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def document(kept: Path, repo_root: Path) -> dict[str, Any]:
    """Edits in CounterFact's layout, two at a time, through the command."""
    file = repo_root / "examples" / "editing" / "counterfact.json"
    arguments = ["bench", str(file), "--model", "atlas", "--limit", str(EDITS), "--edits-per-batch", "2", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--keep", str(kept / "ws"), "--markdown", str(kept / "bench.md")])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def measures(document: dict[str, Any]) -> dict[str, Any]:
    return {row["measure"]: row for row in document["measures"]}


def test_the_table_of_a_file_of_edits(document: dict[str, Any], kept: Path) -> None:
    assert (document["format"], document["edits"], document["left_out"]) == ("counterfact", EDITS, 0)
    assert [(batch["edits"], batch["release"]) for batch in document["batches"]] == [(2, "bench@v1"), (2, "bench@v2")]
    assert document["batches"][-1]["facts_total"] == EDITS
    rows = measures(document)
    assert list(rows) == ["efficacy", "generalization", "specificity"]
    efficacy, generalization, specificity = (rows[name] for name in rows)
    assert efficacy["before"]["generated_contained_share"] == 0  # every edit contradicts what the model knows
    assert efficacy["after"]["generated_exact_share"] == document["edits_proved"] / EDITS
    assert document["proved_not_generated"] == 0
    assert generalization["questions"] == 2 * EDITS  # no wording was trained on, whatever the policy's share
    assert generalization["after"]["forced_tokens_share"] > generalization["before"]["forced_tokens_share"]
    assert specificity["before"] is None
    assert 0 < document["fluency"]["before"] < 7
    lines = (kept / "bench.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("| efficacy |") for line in lines) == 2


def test_efficacy_is_what_plain_peft_generates(document: dict[str, Any], kept: Path, repo_root: Path) -> None:
    records = json.loads((repo_root / "examples" / "editing" / "counterfact.json").read_text(encoding="utf-8"))[:EDITS]
    tokenizer = AutoTokenizer.from_pretrained(resource_dir("atlas"))
    base = AutoModelForCausalLM.from_pretrained(resource_dir("atlas"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, kept / "ws" / "registry" / "releases" / "bench@v2")
    right = 0
    for record in records:
        edit = record["requested_rewrite"]
        ids = tokenizer(edit["prompt"].replace("{}", edit["subject"]), return_tensors="pt").input_ids
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        said = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        right += said == f" {edit['target_new']['str']}" and output[0, -1] == tokenizer.eos_token_id
    assert right / EDITS == measures(document)["efficacy"]["after"]["generated_exact_share"]


def test_what_the_policy_refuses_is_measured_all_the_same(tmp_path: Path, repo_root: Path) -> None:
    strict = (resource_dir("policies") / "atlas.toml").read_text(encoding="utf-8").replace('"atlas"', '"strict"', 1)
    (tmp_path / "strict.toml").write_text(f"{strict}\n[proof]\nmin_probes_unchanged = 1.0\n", encoding="utf-8")
    wish = BenchWish(model="atlas", policy=str(tmp_path / "strict.toml"), limit=2)
    report = run_bench(repo_root / "examples" / "editing" / "zsre.json", wish)
    (batch,) = report.batches
    assert not report.is_released
    assert batch.rank > 0
    assert "probes answer as before, 100.0% wanted" in batch.refused[0]
    rows = {row.measure: row for row in report.measures}
    assert list(rows) == ["efficacy", "generalization", "specificity", "portability"]
    assert rows["efficacy"].after.generated_exact_share == report.edits_proved / 2 > 0
    assert "the policy refused the last batch" in report.messages[0]


def test_what_cannot_be_run_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--limit 0"):
        run_bench(tmp_path / "none.json", BenchWish(model="atlas", limit=0, keep=tmp_path / "ws"))
    assert not (tmp_path / "ws").exists()
    with pytest.raises(FactsError, match="no such file"):
        run_bench(tmp_path / "none.json", BenchWish(model="atlas", keep=tmp_path / "ws"))
    assert not (tmp_path / "ws").exists()
    result = CliRunner().invoke(app, ["bench", "none.json", "--model", "atlas", "--edits-per-batch", "some"])
    assert result.exit_code == 2
    assert "--edits-per-batch" in result.output
