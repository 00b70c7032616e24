"""Facts in releases through the real `add`, then what a client gets of each release from vLLM.

Twenty collections `world-1` … `world-20` with a release of a hundred new facts each, two paraphrases of each trained beside its prompt;
`bare`, the facts of `world-1` again without any; and the same again in depth: four more releases of `world-1`, each on top of the last.
Invariant: what is measured is written down by release when it is known, so an interrupted study goes on after the last one.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.proof.worlds import WORLD_SEED, batches, world_facts, write_facts

from memupdate import Workspace
from memupdate.facts.model import Fact
from memupdate.facts.render import Example
from memupdate.layout import RELEASE_FILE
from memupdate.ledger.records import ReleaseRecord
from memupdate.operations.session import Session
from memupdate.serving.client import EngineClient
from memupdate.storage import write_text_atomic
from memupdate.verification.neighbours import SAME_RELATION, SAME_SUBJECT, is_guess
from memupdate.verification.served import generate_served, prove_served

WORLD, BARE = "world", "bare"


@dataclass(frozen=True)
class Sizes:
    """How much is stored."""

    batch: int
    """Facts a release."""
    lines: int
    """Collections with one release."""
    deep_releases: int
    """Further ones of the first collection."""
    calibration_ranks: tuple[int, ...]
    calibration_facts: tuple[int, ...]
    """Memories that the law is fitted to: each of the ranks with so many facts. By number and not by the clock, so that it is the
    same law on a busy machine."""


FULL = Sizes(batch=100, lines=20, deep_releases=4, calibration_ranks=(16, 64), calibration_facts=(40, 120))
QUICK = Sizes(batch=20, lines=2, deep_releases=1, calibration_ranks=(4, 32), calibration_facts=(10, 40))
Say = Callable[[str], None]


class Rows:
    """One JSON document a key in a folder: what is there is not measured again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The document `key`, measured where it is not there yet."""
        file = self.folder / f"{key}.json"
        if not file.is_file():
            write_text_atomic(file, json.dumps(measure(), indent=1, ensure_ascii=False))
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found


def open_workspace(work: Path, sizes: Sizes, say: Say) -> Workspace:
    """The study's workspace, calibrated; what a crash left in it is finished first."""
    root = work / "workspace"
    policy = Path(__file__).with_name("policy.toml")
    if not (root / "memupdate.toml").is_file():
        Workspace.init(root, model="atlas", policy=str(policy), collection=f"{WORLD}-1")
    workspace = Workspace(root)
    workspace.resume()
    if workspace.status().fit_id is None:
        say(f"calibrating: ranks {sizes.calibration_ranks} with {sizes.calibration_facts} facts")
        workspace.calibrate(ranks=sizes.calibration_ranks, sizes=sizes.calibration_facts)
    return workspace


@dataclass(frozen=True)
class Step:
    """One release of the study."""

    collection: str
    version: int
    facts: Sequence[Fact]

    @property
    def release(self) -> str:
        """Its name."""
        return f"{self.collection}@v{self.version}"


def steps_of(sizes: Sizes) -> tuple[list[Step], list[Step]]:
    """The releases in breadth, `bare` among them, and those in depth, in the order in which they are made."""
    facts = world_facts(sizes.batch * (FULL.lines + FULL.deep_releases), seed=WORLD_SEED)
    parts = list(batches(facts, sizes.batch))
    wide = [Step(f"{WORLD}-{number}", 1, part) for number, part in enumerate(parts[: sizes.lines], start=1)]
    further = parts[FULL.lines : FULL.lines + sizes.deep_releases]
    deep = [Step(f"{WORLD}-1", version, part) for version, part in enumerate(further, start=2)]
    return [*wide, Step(BARE, 1, parts[0])], deep


def store(workspace: Workspace, rows: Rows, steps: Sequence[Step], say: Say) -> None:
    """Add what is not added yet, nothing served. Raises ProofFailed or OverBudget where a batch cannot be stored."""
    for step in steps:
        path = rows.folder / f"{step.release}.jsonl"
        write_facts(path, step.facts, augmented=step.collection != BARE)
        add_release(workspace, rows, path, step.collection, step.release, say)


def add_release(workspace: Workspace, rows: Rows, path: Path, collection: str, release: str, say: Say) -> None:
    """`add` one file, once; its report is a row."""

    def add() -> dict[str, Any]:
        started, cpu = time.monotonic(), time.process_time()
        report = workspace.add(path, collection=collection, publish=False)
        row = {"release": release, "state": report.state, "add_s": time.monotonic() - started, "add_cpu_s": time.process_time() - cpu,
               "attempts": report.attempts, "epochs": report.epochs, "planned_rank": report.plan.rank if report.plan else None}  # fmt: skip
        say(f"{release}: rank {report.rank}, {report.facts_proved}/{report.facts_total} proved, probes {report.probes_unchanged_share}, "
            f"KL {report.kl_nats}, {row['add_s']:.0f} s")  # fmt: skip
        return row

    rows.get(f"add-{release}", add)


def facts_of(workspace: Workspace, record: ReleaseRecord) -> tuple[list[Fact], set[str]]:
    """The live facts of a release, and the ids of those that it brought."""
    with workspace.reader() as ledger:
        live = ledger.live_facts(record.collection, as_of_version=record.version)
        before = ledger.live_facts(record.collection, as_of_version=record.version - 1) if record.version > 1 else []
    return live, {fact.id for fact in live} - {fact.id for fact in before}


def held_out(session: Session, facts: Sequence[Fact], phrasings: dict[str, tuple[str, ...]]) -> list[Example]:
    """Each fact under the phrasings that no release of the study trains."""
    return [session.renderer.render(fact, prompt) for fact in facts for prompt in phrasings[fact.key]]


def held_out_phrasings(session: Session, facts: Sequence[Fact]) -> dict[str, tuple[str, ...]]:
    """By fact's key: the paraphrases that the policy keeps apart."""
    return {fact.key: session.phrasings(fact)[1] for fact in facts}


def measure_in_process(
    workspace: Workspace, record: ReleaseRecord, phrasings: dict[str, tuple[str, ...]]
) -> dict[str, Any]:
    """What one release answers in this process under other phrasings, and what `add` measured of it."""
    from memupdate.models.scoring import score_examples
    from memupdate.training.memory import attach, detach, load_adapter

    session = workspace.session
    facts, _ = facts_of(workspace, record)
    asked = held_out(session, facts, phrasings)
    model = attach(session.base.model, load_adapter(session.layout.registry.release(record.name)))
    try:
        scores = score_examples(model, asked, session.base.device)
    finally:
        session.base.model = detach(model)
    papers = json.loads((session.layout.registry.release(record.name) / RELEASE_FILE).read_text(encoding="utf-8"))
    with workspace.reader() as ledger:
        counts, text = ledger.measure_counts(record.name, "in-process"), ledger.text_measure(record.name)
    assert text is not None  # the policy has a guard
    near = [count for count in counts if count.measure == "locality" and not is_guess(count.part)]
    return {
        "release": record.name,
        "rank": record.rank,
        "facts": len(facts),
        "proved": sum(fact["proved"] for fact in papers["facts"]),
        "smallest_probability": min(fact["min_probability"] for fact in papers["facts"]),
        "held_out": len(asked),
        "held_out_right": sum(s.greedy_ids == e.target_ids for s, e in zip(scores, asked, strict=True)),
        "probes_unchanged": papers["probes_unchanged_share"],
        "near_asked": sum(count.asked for count in near),
        "near_unchanged": sum(count.exact for count in near),
        "anchor_kl_nats": papers["kl_nats"],
        "kl_nats": text.kl_nats,
        "perplexity_ratio": text.perplexity_ratio,
        "measures": [asdict(count) for count in counts],
    }


def measure_served(
    workspace: Workspace, record: ReleaseRecord, url: str, phrasings: dict[str, tuple[str, ...]], *, whole: bool
) -> dict[str, Any]:
    """Prove and then generate on the engine: the facts that the release brought, or, `whole`, all that it holds."""
    session = workspace.session
    live, own = facts_of(workspace, record)
    facts = [fact for fact in live if whole or fact.id in own]
    examples = session.renderer.render_all(facts)
    started = time.monotonic()
    kwargs = session.policy.facts.chat_template_kwargs
    with EngineClient(url) as client:
        proofs = prove_served(client, record.name, examples, min_probability=session.policy.proof.min_probability)
        proved_s, started = time.monotonic() - started, time.monotonic()
        answers = generate_served(client, record.name, examples, template_kwargs=kwargs)
        generated_s = time.monotonic() - started
        asked = held_out(session, facts, phrasings) if whole else []
        others = generate_served(client, record.name, asked, template_kwargs=kwargs)
    with workspace.reader() as ledger:
        in_process = {p.fact for p in ledger.proofs(record.name, "in-process") if p.proved}
    good = [proof.proved or proof.fact_id in in_process for proof in proofs]
    missed = [
        {"prompt": a.example.prompt, "target": a.example.answer, "said": a.text}
        for a, proved in zip(answers, good, strict=True)
        if proved and not a.matches
    ]
    return {
        "release": record.name, "asked": len(facts), "proved_in_process": sum(f.id in in_process for f in facts),
        "proved_served": sum(p.proved for p in proofs), "generated": sum(a.matches for a in answers), "proved_not_generated": len(missed),
        "missed": missed, "named_right": sum(a.model == record.name for a in answers), "held_out": len(others),
        "held_out_generated": sum(a.matches for a in others), "prove_s": proved_s, "generate_s": generated_s,
        "smallest_probability": min(p.min_probability for p in proofs),
    }  # fmt: skip


def measure(
    workspace: Workspace, rows: Rows, steps: Sequence[Step], say: Say
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Make the releases and measure them where that is not done yet: by release, in this process and on vLLM."""
    store(workspace, rows, steps, say)
    with workspace.reader() as ledger:
        records = [ledger.release(step.release) for step in steps]
    phrasings = held_out_phrasings(workspace.session, [fact for step in steps for fact in step.facts])
    inside = {
        r.name: rows.get(f"inside-{r.name}", lambda r=r: measure_in_process(workspace, r, phrasings)) for r in records
    }
    return inside, serve(workspace, rows, records, phrasings, say)


def serve(
    workspace: Workspace, rows: Rows, records: Sequence[ReleaseRecord], phrasings: dict[str, tuple[str, ...]], say: Say
) -> dict[str, dict[str, Any]]:
    """Every release on a real vLLM: all facts of a first or last one, of those in between what they brought."""
    last = {record.collection: record.name for record in records}

    def measured(url: str) -> dict[str, dict[str, Any]]:
        found = {}
        for record in records:
            whole = record.version == 1 or last[record.collection] == record.name
            found[record.name] = rows.get(
                f"served-{record.name}", lambda r=record, w=whole: measure_served(workspace, r, url, phrasings, whole=w)
            )
            say(f"{record.name} on vLLM: {found[record.name]['generated']} of {found[record.name]['asked']} generated")
        return found

    if all((rows.folder / f"served-{record.name}.json").is_file() for record in records):
        return measured("")
    with workspace.engine() as url:
        return measured(url)


def breadth_figures(inside: dict[str, dict[str, Any]], served: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the releases in breadth."""
    world = [row for name, row in inside.items() if name.startswith(WORLD)]
    asked = [served[row["release"]] for row in world]
    bare, twin = inside[f"{BARE}@v1"], inside[f"{WORLD}-1@v1"]
    return {
        "facts": sum(row["facts"] for row in world),
        "releases": len(world),
        "generated": sum(row["generated"] for row in asked),
        "proved_not_generated": sum(row["proved_not_generated"] for row in served.values()),
        "proved_share": _share(world, "proved", "facts"),
        "generality": _share(world, "held_out_right", "held_out"),
        "generality_served": _share(asked, "held_out_generated", "held_out"),
        "generality_without_augmentation": _share([bare], "held_out_right", "held_out"),
        "generality_of_the_same_facts": _share([twin], "held_out_right", "held_out"),
        "facts_without_augmentation": bare["facts"],
        **_harm(world),
        "smallest_probability": round(min(row["smallest_probability"] for row in served.values()), 4),
    }


def depth_figures(inside: dict[str, dict[str, Any]], served: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the releases on top of each other; shares are of the last one, harm is the worst."""
    last = list(inside.values())[-1]
    figures = {
        "facts": last["facts"],
        "releases": len(inside),
        "proved_not_generated": sum(row["proved_not_generated"] for row in served.values()),
        "generality": _share([last], "held_out_right", "held_out"),
        **_harm(list(inside.values())),
    }
    return {f"depth_{name}": value for name, value in figures.items()}


def _harm(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the worst release, and over all answers by neighbourhood."""
    return {
        "locality": round(min(row["near_unchanged"] / row["near_asked"] for row in rows), 4),
        "locality_probes": round(min(row["probes_unchanged"] for row in rows), 4),
        "locality_same_relation": _neighbourhood(rows, SAME_RELATION),
        "locality_same_subject": _neighbourhood(rows, SAME_SUBJECT),
        "perplexity_ratio": round(max(row["perplexity_ratio"] for row in rows), 4),
        "perplexity_ratio_mean": round(statistics.fmean(row["perplexity_ratio"] for row in rows), 4),
        "rank": max(row["rank"] for row in rows),
    }


def _neighbourhood(rows: Sequence[dict[str, Any]], part: str) -> float:
    return _share([count for row in rows for count in row["measures"] if count["part"] == part], "exact", "asked")


def _share(rows: Sequence[dict[str, Any]], part: str, whole: str) -> float:
    return round(sum(row[part] for row in rows) / max(1, sum(row[whole] for row in rows)), 4)
