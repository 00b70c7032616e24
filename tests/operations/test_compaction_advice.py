"""When a compaction is proposed, from ledgers filled by hand: nothing is trained here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from memupdate import Workspace
from memupdate.budget.planner import free_capacity
from memupdate.errors import OverBudget
from memupdate.facts.files import FactsFile, LocatedFact
from memupdate.facts.model import Fact
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.maintenance import Retraction
from memupdate.ledger.records import FactsDiff, ReleaseRecord
from memupdate.operations import compacting, planning
from memupdate.storage import text_sha256
from support import add_points_of_the_shipped_law, set_policy

LONG = " ".join(["nothing is known about this"] * 8)


def facts(count: int, target: str = "Bruges", start: int = 0) -> list[Fact]:
    return [Fact(f"Where is company {number}?", target) for number in range(start, start + count)]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Workspace]:
    def workspace(**lines: str) -> Workspace:
        root = Workspace.init(tmp_path / f"w{len(list(tmp_path.iterdir()))}", model="atlas", collection="acme").root
        set_policy(root / "policy.toml", lines)
        made = Workspace(root)
        add_points_of_the_shipped_law(made)
        return made

    return workspace


def release(ledger: Ledger, batch: int, rank: int) -> None:
    """Take a batch to `released` as operations do, with files that nobody looks at."""
    ledger.set_plan(batch, "{}")
    for state in ("planned", "trained", "verified"):
        ledger.transition(batch, state)  # type: ignore[arg-type]
    version = ledger.next_version("acme")
    name = f"acme@v{version}"
    with ledger.transaction():
        ledger.record_release(
            ReleaseRecord(
                name, "acme", version, batch, None, f"x/{name}", text_sha256(name), rank, "mlp-all", text_sha256("b")
            )
        )
        ledger.transition(batch, "released")


def add(ledger: Ledger, added: list[Fact], rank: int) -> None:
    located = tuple(LocatedFact(fact, line) for line, fact in enumerate(added, start=1))
    file = FactsFile("f.jsonl", text_sha256(str(added)), 1, "native", located)
    batch = ledger.receive_batch("acme", file, "{}", publish=False)
    assert batch is not None
    release(ledger, batch.id, rank)


def retract(ledger: Ledger, retracted: list[Fact], rank: int) -> None:
    pairs = [Retraction(fact, replace(fact, target=LONG)) for fact in retracted]
    release(ledger, ledger.receive_retraction("acme", pairs, "{}", publish=False).id, rank)


def test_no_proposal_without_a_reason_or_where_nothing_is_won(make: Callable[..., Workspace]) -> None:
    workspace = make(compaction__rank_limit="2", memory__min_rank="2")
    with workspace.writer("test") as ledger:
        fit = planning.current_fit(workspace.session, ledger)
        assert fit is not None
        assert compacting.advice(workspace.session, ledger, "acme") is None, "nothing was released"
        add(ledger, facts(2), rank=2)
        assert compacting.reasons_to_compact(workspace.session, ledger, "acme") == [
            "the memory has rank 2, the limit is 2"
        ]
        assert compacting.advice(workspace.session, ledger, "acme") is None, "the same facts at the same rank"
        add(ledger, facts(2, start=2), rank=64)
        line = compacting.advice(workspace.session, ledger, "acme")
    assert line is not None
    assert "the limit is 2" in line
    assert "(64 now)" in line
    assert line in workspace.status().messages


def test_before_growth_the_smaller_memory_is_proposed(make: Callable[..., Workspace]) -> None:
    """Hundreds of tokens of stand-ins make the memory grow; without them the new facts fit a smaller rank."""
    workspace = make(compaction__dead_share="1.0")
    session = workspace.session
    with workspace.writer("test") as ledger:
        add(ledger, facts(40), rank=1)
        retract(ledger, facts(8), rank=1)
        new, laws = FactsDiff(tuple(facts(2, start=100)), (), ()), planning.candidates(session, ledger, "acme")
        plan = planning.make_plan(laws, ledger, "acme", new, live_before=ledger.live_facts("acme"))
        assert plan.rank > plan.rank_before == 1
        line = compacting.advice(session, ledger, "acme", plan)
    assert line is not None
    assert "with the update after it" in line or f"not {plan.rank}" in line


def test_over_budget_names_compaction_where_stand_ins_take_the_room(make: Callable[..., Workspace]) -> None:
    workspace = make(memory__max_rank="4")
    session = workspace.session
    with workspace.writer("test") as ledger:
        fit = planning.current_fit(session, ledger)
        assert fit is not None
        room = free_capacity(fit, session.shape, 4, planning.limits(session))
        each = session.count_target_tokens(facts(1))
        add(ledger, facts(room // each - 20), rank=4)
        new = FactsDiff(tuple(facts(4, start=10_000)), (), ())

        def plan() -> None:
            laws = planning.candidates(session, ledger, "acme")
            planning.make_plan(laws, ledger, "acme", new, live_before=ledger.live_facts("acme"))

        plan()
        retract(ledger, facts(10), rank=4)
        with pytest.raises(OverBudget) as caught:
            plan()
        assert "`memupdate compact -c acme` makes room" in caught.value.hint
        assert "10 retracted facts" in caught.value.hint
        new = FactsDiff(tuple(facts(1000, start=10_000)), (), ())
        with pytest.raises(OverBudget) as caught:
            plan()
        assert "compact" not in caught.value.hint, "it would not help"
