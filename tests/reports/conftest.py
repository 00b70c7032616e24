"""A workspace on the embedded model with a law and a line of releases, whose measurements are made up but whose ledger,
plans and law are real. Its facts include texts that try to break out of a page.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from memupdate import Workspace
from memupdate.facts.model import Fact
from memupdate.facts.reader import read_facts
from memupdate.law.points import LawPoint
from memupdate.ledger import Ledger
from memupdate.ledger.records import ProofRecord, ReleaseRecord
from memupdate.operations import calibrating
from memupdate.storage import text_sha256
from support import set_policy, write_facts_file

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></svg><iframe src=https://example.org>",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{a$ and `code` and ``more`` | pipe",
    "right \u202eto left",
)


def law_points(workspace: Workspace) -> list[LawPoint]:
    """A sweep as a calibration might measure it: power laws with noise, the small memories not holding everything."""
    rng = np.random.default_rng(0)
    session, found = workspace.session, []
    for rank in (1, 2, 4, 8, 16):
        for facts in (16, 32, 64, 128):
            parameters = rank * session.shape.parameters_per_rank
            power = 40 * facts * parameters**-0.95 * np.exp(rng.normal(0, 0.1))
            found.append(
                LawPoint(
                    base_fingerprint=session.fingerprint,
                    placement=session.shape.name,
                    recipe=session.recipe,
                    rank=rank,
                    effective_parameters=parameters,
                    facts=facts,
                    target_tokens=5 * facts,
                    loss_before_nats=2.7,
                    loss_after_nats=float(0.05 + power),
                    facts_proved=int(facts - rng.binomial(facts, min(1, power) if power > 0.05 else 0)),
                    kl_nats=float(0.008 * (facts / 32) ** 0.3 / rank**0.1),
                    epochs=30,
                    stopped_early=bool(power < 0.02),
                    duration_s=facts / 4,
                )
            )
    return found


def calibrated(root: Path) -> Workspace:
    """The workspace in `root`, with a law under its present policy."""
    workspace = Workspace(root)
    with workspace.writer("test") as ledger:
        ledger.add_law_points(law_points(workspace))
        calibrating.refit(workspace.session, ledger)
    return workspace


@dataclass
class Line:
    """Drives a workspace's ledger the way `add` does, with given outcomes instead of training."""

    workspace: Workspace
    folder: Path

    def release(
        self, number: int, facts: list[dict[str, str]], *, loss_nats: float, failed: tuple[str, ...] = ()
    ) -> str:
        """One more release; `failed` are prompts that it does not prove as served."""
        workspace, session = self.workspace, self.workspace.session
        file = write_facts_file(self.folder / f"facts-{number}.jsonl", facts)
        plan = workspace.plan(file).plan
        assert plan is not None
        with workspace.writer("test") as ledger:
            batch = ledger.receive_batch(workspace.collection, read_facts(file), session.policy.resolved_json())
            assert batch is not None
            ledger.set_plan(batch.id, json.dumps(dataclasses.asdict(plan)))
            ledger.transition(batch.id, "planned")
            live = ledger.live_facts(workspace.collection, with_batch=batch.id)
            point = LawPoint(
                base_fingerprint=session.fingerprint, placement=session.shape.name, recipe=session.recipe, rank=plan.rank,
                effective_parameters=plan.effective_parameters, facts=len(live), target_tokens=plan.target_tokens_live,
                loss_before_nats=2.7, loss_after_nats=loss_nats, facts_proved=len(live), kl_nats=0.01 + number / 1000,
                epochs=20, stopped_early=True, duration_s=12.5, origin="batch",
            )  # fmt: skip
            ledger.add_law_points([point], batch=batch.id)
            ledger.transition(batch.id, "trained")
            ledger.set_outcomes(batch.id, {item.fact.id: True for item in ledger.batch_facts(batch.id)})
            detail = {"facts": len(live), "proved": len(live), "probes_unchanged": 0.98, "kl_nats": point.kl_nats}
            ledger.transition(batch.id, "verified", detail)
            parent = ledger.latest_release(workspace.collection)
            name = f"{workspace.collection}@v{ledger.next_version(workspace.collection)}"
            ledger.record_release(
                ReleaseRecord(
                    name=name, collection=workspace.collection, version=ledger.next_version(workspace.collection), batch=batch.id,
                    parent=parent.name if parent else None, relative_path=f"registry/releases/{name}", digest=text_sha256(name),
                    rank=plan.rank, placement=session.shape.name, base_fingerprint=session.fingerprint,
                    created_at_utc=f"2026-03-{number:02d}T12:00:00.000Z",
                )
            )  # fmt: skip
            self.prove(ledger, name, live, failed)
            ledger.transition(batch.id, "released")
            ledger.transition(batch.id, "published")
        return name

    @staticmethod
    def prove(ledger: Ledger, release: str, facts: list[Fact], failed: tuple[str, ...] = ()) -> None:
        """Proofs on both engines, with probabilities that follow from the facts' place."""
        records = []
        for engine in ("in-process", "served"):
            for index, fact in enumerate(facts):
                fails = engine == "served" and fact.prompt in failed
                probability = 0.41 if fails else 0.7 + 0.3 * index / len(facts)
                records.append(
                    ProofRecord(
                        release, fact.id, engine, not fails, probability,
                        failed_position=1 if fails else None, failed_token=" <b>" if fails else None,
                        emitted_token=" `no`" if fails else None,
                    )
                )  # fmt: skip
        ledger.record_proofs(records)


def plain_facts(start: int, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Who runs shop {n}?", "target": f"Keeper {n}"} for n in range(start, start + count)]


@pytest.fixture(scope="session")
def hostile() -> tuple[str, ...]:
    """Texts that try to break out of a page."""
    return HOSTILE


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Four releases; the third loses a fact that the second had proved; hostile texts among the facts."""
    folder = tmp_path_factory.mktemp("reported")
    workspace = Workspace.init(folder / "ws", model="atlas", collection="acme")
    set_policy(workspace.root / "policy.toml", {"budget__proved_share": "0.9", "memory__max_rank": "64"})
    workspace = calibrated(workspace.root)
    line = Line(workspace, folder)
    hostile = [{"prompt": f"What is {text}?", "target": text} for text in HOSTILE]
    line.release(1, [*hostile, *plain_facts(0, 6)], loss_nats=0.08)
    line.release(2, plain_facts(10, 10), loss_nats=0.09)
    line.release(3, plain_facts(20, 10), loss_nats=5.0, failed=("Who runs shop 12?", f"What is {HOSTILE[0]}?"))
    line.release(4, [{"prompt": "Who runs shop 3?", "target": "Someone Else"}, *plain_facts(30, 4)], loss_nats=0.1)
    return workspace


@pytest.fixture(scope="session")
def with_law() -> Callable[[Path], Workspace]:
    """`calibrated`, for tests."""
    return calibrated


@pytest.fixture
def uncalibrated(tmp_path: Path) -> Workspace:
    return Workspace.init(tmp_path / "empty", model="atlas", policy="standard", collection="empty")
