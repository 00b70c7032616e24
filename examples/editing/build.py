"""Makes the samples of this folder: edits of what the embedded model knows, in the layouts of CounterFact (as ROME publishes it) and zsRE.

Each edit gives a subject that the model knows another object of the same relation. As in the originals, CounterFact asks by
statements to be completed and takes as neighbours other subjects with the old object; zsRE asks by questions. zsRE's portability
question asks for a fact about the new object. Run it from the repository's root: `python examples/editing/build.py`.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ATLAS = HERE.parent / "atlas"
sys.path.insert(0, str(ATLAS))

from world import RELATIONS  # noqa: E402  # beside the embedded model, not a package

EDITS = 24
RELATION = {relation.name: relation for relation in RELATIONS}
ONE_HOP = {
    "headquarters": ("In which country are the headquarters of {s}?", "country"),
    "birthplace": ("In which country was {s} born?", "country"),
    "employer": ("Where is the company of {s} based?", "headquarters"),
    "maker": ("Who leads the maker of the {s}?", "chief executive"),
}
"""Relation → a question about the object of its object, and the relation that answers it."""


def main() -> None:
    lines = (ATLAS / "world.jsonl").read_text(encoding="utf-8").splitlines()
    facts = [fact for fact in map(json.loads, lines) if fact["recalled"]]
    rng = random.Random("editing-samples")
    chosen = rng.sample(facts, EDITS)
    write("counterfact.json", [counterfact(i, fact, facts, rng) for i, fact in enumerate(chosen, start=1)])
    hopping = rng.sample([fact for fact in facts if fact["relation"] in ONE_HOP], EDITS)
    write("zsre.json", [zsre(i, fact, facts, rng) for i, fact in enumerate(hopping, start=1)])


def counterfact(number: int, fact: dict, facts: list[dict], rng: random.Random) -> dict:
    """One record as ROME has it; `target_new` is the object of another subject."""
    relation = RELATION[fact["relation"]]
    own, *others = (template.removesuffix("{o}").rstrip().replace("{s}", "{}") for template in relation.statements)
    alike = [f for f in facts if f["relation"] == fact["relation"] and f["subject"] != fact["subject"]]
    neighbours = sorted({f["subject"] for f in alike if f["target"] == fact["target"]})[:3]
    neighbours = neighbours or [rng.choice(alike)["subject"]]
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": own,
            "relation_id": fact["relation"],
            "target_new": {"str": new_target(fact, alike, rng)},
            "target_true": {"str": fact["target"]},
            "subject": fact["subject"],
        },
        "paraphrase_prompts": [other.replace("{}", fact["subject"]) for other in others],
        "neighborhood_prompts": [own.replace("{}", subject) for subject in neighbours],
    }


def zsre(number: int, fact: dict, facts: list[dict], rng: random.Random) -> dict:
    """One record as EasyEdit has it, with one locality and one portability question."""
    alike = [f for f in facts if f["relation"] == fact["relation"] and f["subject"] != fact["subject"]]
    question, then = ONE_HOP[fact["relation"]]
    known = {f["subject"]: f["target"] for f in facts if f["relation"] == then}
    new = new_target(fact, [f for f in alike if f["target"] in known], rng)
    near = rng.choice(alike)
    return {
        "subject": fact["subject"],
        "src": fact["prompt"],
        "pred": fact["target"],
        "alt": new,
        "rephrase": fact["held_out"] if fact["held_out"] != fact["prompt"] else fact["paraphrases"][0],
        "loc": f"nq question: {near['prompt']}",
        "loc_ans": near["target"],
        "portability": {"New Question": question.format(s=fact["subject"]), "New Answer": known[new]},
        "case_id": number,
    }


def new_target(fact: dict, alike: list[dict], rng: random.Random) -> str:
    return rng.choice(sorted({f["target"] for f in alike} - {fact["target"]}))


def write(name: str, records: list[dict]) -> None:
    (HERE / name).write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
