"""Part two: real facts that change. Versions and ends of support of 2024 are stored, those of 2025 supersede them, vLLM is asked.

The facts are those of examples/endoflife, in a workspace of their own under the policy that the embedded model comes with.
Invariant: an answer counts as given where it is the new value word for word, under the fact's own prompt; the old one as absent where
no phrasing of the fact, trained or not, brings it back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.proof.releases import Rows, Say, add_release, facts_of
from benchmarks.recording import ROOT

from memupdate import Workspace
from memupdate.facts.model import Fact
from memupdate.facts.reader import read_facts
from memupdate.serving.client import EngineClient
from memupdate.verification.served import generate_served

COLLECTION = "endoflife"
FILES = ("2024-01-01.jsonl", "2025-01-01.jsonl")
QUICK_FACTS = 16


def figures_of(work: Path, rows: Rows, *, quick: bool, say: Say) -> dict[str, Any]:
    """Store both dates, ask the last release."""
    root = work / COLLECTION
    if not (root / "memupdate.toml").is_file():
        Workspace.init(root, model="atlas", collection=COLLECTION)
    workspace = Workspace(root)
    workspace.resume()
    for number, name in enumerate(FILES, start=1):
        lines = (ROOT / "examples" / "endoflife" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        path = rows.folder / f"endoflife-{number}.jsonl"
        path.write_text("".join(lines[:QUICK_FACTS] if quick else lines), encoding="utf-8")
        add_release(workspace, rows, path, COLLECTION, f"{COLLECTION}@v{number}", say)
    return rows.get("endoflife", lambda: _ask(workspace, rows))


def _ask(workspace: Workspace, rows: Rows) -> dict[str, Any]:
    old = {f.fact.key: f.fact for f in read_facts(rows.folder / "endoflife-1.jsonl").facts}
    with workspace.reader() as ledger:
        record = ledger.release(f"{COLLECTION}@v2")
    live, _ = facts_of(workspace, record)
    changed = [fact for fact in live if old[fact.key].target != fact.target]
    phrasings = [(fact, prompt) for fact in changed for prompt in (fact.prompt, *fact.paraphrases)]
    session = workspace.session
    kwargs = session.policy.facts.chat_template_kwargs
    asked = [session.renderer.render(fact, prompt) for fact, prompt in phrasings]
    with workspace.engine() as url, EngineClient(url) as client:
        own = generate_served(client, record.name, session.renderer.render_all(live), template_kwargs=kwargs)
        every = generate_served(client, record.name, asked, template_kwargs=kwargs)
    given = {a.example.fact_id for a in own if a.matches}
    back = {fact.id for (fact, _), answer in zip(phrasings, every, strict=True) if _says(answer.text, old[fact.key])}
    return {
        "release": record.name, "rank": record.rank, "facts": len(live), "changed": len(changed),
        "new_given": sum(fact.id in given for fact in changed), "old_absent": sum(fact.id not in back for fact in changed),
        "unchanged_given": len(given - {fact.id for fact in changed}), "phrasings": len(every),
        "phrasings_new_given": sum(a.matches for a in every),
        "not_given": [{"prompt": a.example.prompt, "target": a.example.answer, "said": a.text} for a in own if not a.matches],
        "came_back": [{"prompt": fact.prompt, "old": old[fact.key].target, "new": fact.target} for fact in changed if fact.id in back],
    }  # fmt: skip


def _says(text: str, fact: Fact) -> bool:
    return text.strip() == fact.target


def figures(row: dict[str, Any]) -> dict[str, float | int]:
    """What the results file names."""
    return {
        "endoflife_changed": row["changed"],
        "endoflife_new": round(row["new_given"] / row["changed"], 4),
        "endoflife_old_absent": round(row["old_absent"] / row["changed"], 4),
        "endoflife_unchanged_given": round(row["unchanged_given"] / (row["facts"] - row["changed"]), 4),
        "endoflife_rank": row["rank"],
    }
