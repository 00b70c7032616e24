"""Two placements on the embedded model, measured, planned, trained, kept and changed for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from memupdate import Workspace
from memupdate.budget.choice import plan_cheapest
from memupdate.budget.placement import PLACEMENTS
from memupdate.budget.plan import PlanRequest
from memupdate.budget.planner import free_capacity
from memupdate.errors import EngineError, PolicyError
from memupdate.law.density import BaseLoss
from memupdate.law.errors import LawError
from memupdate.layout import ADAPTER_WEIGHTS_FILE
from memupdate.operations import planning
from memupdate.operations.replicas import Replica, refuse_small_engines
from memupdate.operations.serving import engine_settings
from memupdate.resources import resource_dir
from support import news, set_policy, write_facts_file

MLP = {"gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """`auto`, with a small calibration of two placements of its own; a small guard and few probes, for time's sake."""
    folder = tmp_path_factory.mktemp("placements")
    known = (resource_dir("atlas") / "known.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    probes = folder / "known.jsonl"
    probes.write_text("\n".join(known) + "\n", encoding="utf-8")
    root = Workspace.init(folder / "acme", model="atlas", collection="acme", probes=probes).root
    small = {"guard__anchors": "64", "guard__holdout": "16", "budget__all_proved": "0.05"}
    set_policy(root / "policy.toml", {"memory__placement": '"auto"', **small})
    made = Workspace(root)
    report = made.calibrate(ranks=[1, 4], sizes=[2, 5], placements=["mlp-one", "mlp-all"])
    assert [found.fit.placement for found in (report, *report.others)] == ["mlp-one", "mlp-all"]
    assert all(found.cells_run == 4 for found in (report, *report.others))
    assert len(report.to_dict()["others"]) == 1
    return made


def file_of(workspace: Workspace, first: int, last: int) -> Path:
    return write_facts_file(workspace.root / f"facts-{first}.jsonl", news(1)[first:last])


def under(workspace: Workspace, placement: str) -> Workspace:
    """The workspace with its policy's placement changed; weights are shared, as no test is about loading."""
    set_policy(workspace.root / "policy.toml", {"memory__placement": f'"{placement}"'})
    changed = Workspace(workspace.root)
    changed.session.parts["base"] = workspace.session.base
    return changed


def adapted(workspace: Workspace, release: str) -> set[tuple[str, str]]:
    """(layer, module) of every matrix in the release's adapter."""
    file = workspace.session.layout.registry.release(release) / ADAPTER_WEIGHTS_FILE
    with safe_open(file, framework="np") as tensors:
        parts = [name.split(".") for name in tensors.keys()]  # noqa: SIM118
    return {(part[part.index("layers") + 1], part[-3]) for part in parts}


def test_the_placements_of_a_session_share_all_that_is_loaded(workspace: Workspace) -> None:
    session = workspace.session
    one, other = (session.with_placement(name) for name in ("mlp-one", "all-linear"))
    assert one.tokenizer is other.tokenizer is session.tokenizer
    assert other.base is session.base is one.base
    assert one.base_losses is session.base_losses
    assert (one.recipe, one.fingerprint) == (session.recipe, session.fingerprint)
    assert len({placed.shape.matrices for placed in session.placements()}) == len(PLACEMENTS)
    with pytest.raises(PolicyError, match="'auto' is not a placement"):
        _ = session.shape


def test_an_empty_memory_takes_the_cheapest_and_every_later_batch_keeps_it(workspace: Workspace) -> None:
    first = workspace.add(file_of(workspace, 0, 3))
    assert first.plan is not None
    assert first.release == "acme@v1"
    chosen = first.plan.placement
    assert chosen in ("mlp-one", "mlp-all")
    (told,) = (reason for reason in first.plan.reasons if "the cheapest of" in reason)
    assert told.startswith(f"placement {chosen}, the cheapest of mlp-all, mlp-one: ")
    layers = {layer for layer, _ in adapted(workspace, "acme@v1")}
    assert len(layers) == (1 if chosen == "mlp-one" else workspace.session.folder.config["num_hidden_layers"])
    with workspace.reader() as ledger:
        assert ledger.release("acme@v1").placement == chosen
        (point,) = [
            p for p in planning.points_of(workspace.session.with_placement(chosen), ledger) if p.origin == "batch"
        ]
    shape = workspace.session.with_placement(chosen).shape
    assert point.effective_parameters == point.rank * shape.parameters_per_rank

    other = next(name for name in ("mlp-one", "mlp-all") if name != chosen)
    fixed = under(workspace, other)
    second = fixed.add(file_of(fixed, 3, 5))
    assert second.plan is not None
    assert second.facts_proved == second.facts_total == 5
    assert second.plan.placement == chosen
    (kept,) = (reason for reason in second.plan.reasons if f"the memory is {chosen} and stays so" in reason)
    assert f"memory.placement = {other} holds from the next compaction on" in kept
    assert adapted(fixed, "acme@v2") == adapted(fixed, "acme@v1")

    compacted = fixed.compact()
    assert compacted.plan is not None
    assert compacted.plan.placement == other
    assert compacted.facts_proved == compacted.facts_total == 5
    assert {layer for layer, _ in adapted(fixed, "acme@v3")} != layers
    assert [row.placement for row in fixed.releases()] == [other, chosen, chosen]
    assert fixed.verify("acme@v1").passed, "a release is proved under its own placement, whatever the policy says now"
    report = fixed.report()
    assert {row.placement for row in report.placements} == {"mlp-one", "mlp-all"}
    assert [capacity.placement for capacity in report.collections] == [other]
    under(workspace, "auto")


def test_a_memory_whose_placement_has_no_law_is_refused_with_the_command_that_makes_one(workspace: Workspace) -> None:
    missing = under(workspace, "all-linear")
    with pytest.raises(LawError, match="of another placement") as refused:
        missing.plan(file_of(workspace, 5, 6), collection="fresh")
    assert "memupdate calibrate --placement all-linear" in refused.value.hint
    under(workspace, "auto")


def test_the_engine_has_slots_wherever_a_release_or_the_next_plan_may_adapt(workspace: Workspace) -> None:
    def modules(of: Workspace) -> set[str]:
        with of.reader() as ledger:
            return set(engine_settings(of.session, ledger, host="127.0.0.1", port=0).lora_target_modules)

    assert modules(under(workspace, "auto")) == MLP, "no law, so no plan, would adapt attention"
    every = under(workspace, "all-linear")
    assert modules(every) == MLP | ATTENTION
    under(workspace, "auto")

    with workspace.reader() as ledger:
        release = replace(ledger.release("acme@v1"), placement="all-linear")
    with pytest.raises(EngineError, match=r"adapts k_proj, o_proj, q_proj, v_proj \(all-linear\)") as refused:
        refuse_small_engines(workspace.session, release, [Replica("http://127.0.0.1:1", 64, tuple(sorted(MLP)))])
    assert "restart `memupdate serve`" in refused.value.hint
    refuse_small_engines(
        workspace.session, release, [Replica("http://127.0.0.1:1", 64, tuple(MLP | ATTENTION)), Replica("x")]
    )


def test_a_memory_that_has_outgrown_its_placement_is_told_of_one_with_room(workspace: Workspace) -> None:
    session = under(workspace, "auto").session
    with workspace.reader() as ledger:
        limits = replace(planning.limits(session), max_rank=4)
        found = []
        for placed in (session.with_placement("mlp-one"), session.with_placement("mlp-all")):
            fit = planning.current_fit(placed, ledger)
            assert fit is not None
            room = free_capacity(fit, placed.shape, 4, limits, base_loss=BaseLoss(3.0, 0.0))
            found.append((room, placed.shape, fit))
        # Of so few points either placement may seem the larger one.
        (least, small, small_fit), (most, large, large_fit) = sorted(found, key=lambda each: each[0])
        assert 0 < least < most
        full = PlanRequest("acme", 1, 0, 0, 1, 1, (least + most) // 2, 4, small, small_fit, limits, BaseLoss(3.0, 0.0))
        hint = planning._room_elsewhere(session, ledger, [full])
    assert f'set memory.placement = "{large.name}" and run `memupdate compact -c acme`' in hint
    asked = replace(full, rank_before=0, placement=large, fit=large_fit)
    assert f"rank {plan_cheapest([asked]).rank} would hold them there" in hint


def test_an_unknown_placement_is_refused_before_anything_is_written(make_workspace: Callable[..., Workspace]) -> None:
    with pytest.raises(PolicyError, match="'attention' is not a placement"):
        make_workspace().calibrate(placements=["mlp-one", "attention"], minutes=1)


def test_points_that_ship_with_the_model_are_fitted_when_a_policy_first_asks_for_them(
    make_workspace: Callable[..., Workspace], tmp_path: Path
) -> None:
    workspace = make_workspace()
    with workspace.reader() as ledger:
        shipped = planning.points_of(workspace.session, ledger)
    assert shipped
    with workspace.writer("test") as ledger:
        ledger.add_law_points(replace(point, placement="mlp-one") for point in shipped)
    auto = under(workspace, "auto")
    with auto.reader() as ledger:
        assert [found.fit.placement for found in planning.candidates(auto.session, ledger, "acme")] == ["mlp-all"]
        assert [placed.shape.name for placed in planning.unfitted(auto.session, ledger, "acme")][:1] == ["mlp-one"]
    planned = auto.plan(write_facts_file(tmp_path / "facts.jsonl", news(1)[:4]))
    assert planned.plan is not None
    assert any("the cheapest of mlp-all, mlp-one" in reason for reason in planned.plan.reasons)
    (missing,) = (reason for reason in planned.plan.reasons if reason.startswith("not compared, as no law is fitted"))
    assert missing.endswith("all-linear (`memupdate calibrate --placement mlp-last --placement all-linear`)")
    with auto.reader() as ledger:
        fits = {found.fit.placement: found.fit for found in planning.candidates(auto.session, ledger, "acme")}
    assert fits["mlp-one"].density == fits["mlp-all"].density is not None, "what tokens cost is the base model's"
    assert json.loads(fits["mlp-one"].to_json())["points"] == len(shipped)
