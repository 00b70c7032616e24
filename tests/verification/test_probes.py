"""Which probes hold an update to account: those of the workspace and of the facts, without what a live fact means to change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memupdate.errors import FactsError
from memupdate.facts.model import Fact, Probe
from memupdate.operations.config import WorkspaceConfig
from memupdate.operations.session import Session
from memupdate.policies import load_policy

PROBES = [
    {"prompt": "Who leads Acme?", "target": "Wanda", "subject": "Acme", "relation": "chief executive"},
    {"prompt": "Where is Acme based?", "target": "Velarburg"},
    {"prompt": "When was Acme founded?", "target": "1991"},
]


def session(root: Path, probes: str = "probes.jsonl") -> Session:
    (root / "probes.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROBES), encoding="utf-8")
    config = WorkspaceConfig(schema_version=1, model="atlas", policy="atlas", collection="acme", probes=probes)
    return Session(root, config, load_policy("atlas"))


def prompts(facts: list[Fact]) -> list[str]:
    return [fact.prompt for fact in facts]


def test_all_probes_count_where_no_fact_touches_them(tmp_path: Path) -> None:
    live = [Fact(prompt="Who leads Bolt?", target="Iris")]
    assert prompts(session(tmp_path).probe_facts(live)) == [p["prompt"] for p in PROBES]
    assert session(tmp_path, probes="").probe_facts(live) == []


@pytest.mark.parametrize(
    ("fact", "gone"),
    [
        pytest.param(Fact(prompt="Where is Acme based?", target="Wilimouth"), 1, id="same prompt"),
        pytest.param(Fact(prompt=" where is  ACME based", target="Wilimouth"), 1, id="same prompt, written otherwise"),
        pytest.param(
            Fact(prompt="Where do they sit?", target="Wilimouth", paraphrases=("Where is Acme based?",)),
            1,
            id="a paraphrase",
        ),
        pytest.param(
            Fact(prompt="Acme's boss?", target="Iris", subject="Acme", relation="chief executive"),
            0,
            id="same subject and relation",
        ),
        pytest.param(Fact(prompt="Who leads Acme?", target="Iris"), 0, id="prompt of a probe known by its subject"),
        pytest.param(
            Fact(prompt="Where is Acme based?", target="Wilimouth", subject="Acme", relation="headquarters"),
            1,
            id="fact known by its subject",
        ),
    ],
)
def test_a_probe_that_a_live_fact_changes_is_left_out(tmp_path: Path, fact: Fact, gone: int) -> None:
    left = [p["prompt"] for number, p in enumerate(PROBES) if number != gone]
    assert prompts(session(tmp_path).probe_facts([fact])) == left


def test_facts_bring_probes_of_their_own(tmp_path: Path) -> None:
    fact = Fact(
        prompt="Who leads Bolt?",
        target="Iris",
        locality=(Probe("Who leads Comet?", "Ida"), Probe("Where is Bolt?"), Probe("Who leads Bolt?", "Otto")),
    )
    found = session(tmp_path).probe_facts([fact])
    assert prompts(found[len(PROBES) :]) == ["Who leads Comet?", "Where is Bolt?"]
    assert found[len(PROBES)].target == "Ida"


def test_a_broken_probes_file_is_named(tmp_path: Path) -> None:
    opened = session(tmp_path)
    (tmp_path / "probes.jsonl").write_text('{"prompt": "Who?"}\n', encoding="utf-8")
    with pytest.raises(FactsError) as caught:
        opened.probe_facts([])
    assert any("target" in line for line in caught.value.details)


def test_probes_in_a_workspace_are_the_facts_the_model_knows(tmp_path: Path, known: list[Fact]) -> None:
    """None of the embedded model's news contradicts what it knows by accident."""
    opened = session(tmp_path, probes="known.jsonl")
    (tmp_path / "known.jsonl").write_text(
        "".join(json.dumps({"prompt": f.prompt, "target": f.target}) + "\n" for f in known), encoding="utf-8"
    )
    assert prompts(opened.probe_facts([])) == prompts(known)
