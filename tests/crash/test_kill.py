"""`kill -9` of real `add` and `resume` processes at every transition and anywhere between: nothing lost, nothing twice.

An episode begins with `add`, is killed, goes on with `resume`, is killed again, and so on, until it is left in peace. What it then
holds is compared with an undisturbed run: every row of the ledger but for times, every adapter and slice by its digest.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import killing
from killing import Stage
from memupdate.ledger.ledger import Ledger

STATES = ("received", "planned", "trained", "verified", "released")
BATCH = 2
ENDURANCE_KILLS = 220


@dataclass(frozen=True)
class Moment:
    """When to kill, as it looks from outside."""

    name: str
    has_come: Callable[[Path], bool]


def state_is(state: str) -> Moment:
    return Moment(state, lambda root: killing.state_of(root, BATCH) == state)


def there_is(pattern: str) -> Moment:
    """A file or folder that is there for an instant only: between writing and renaming, or before its row."""
    return Moment(pattern, lambda root: any(root.glob(pattern)))


TRANSITIONS = [state_is(state) for state in STATES]
FILES = [there_is(f"slices/.{BATCH}.*"), there_is(f"slices/{BATCH}"), there_is("registry/releases/.acme@v2.*")]
FILES += [there_is("registry/releases/acme@v2"), there_is("cache/.anchors*"), there_is("registry/.manifest*")]


def at_random(chance: random.Random, stage: Stage) -> Moment:
    end = time.monotonic() + chance.uniform(0, 1.1 * stage.run_s)
    return Moment("random", lambda _root: time.monotonic() >= end)


@dataclass
class Figures:
    """What an endurance run saw."""

    kills: int = 0
    episodes: int = 0
    states: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    longest_row: int = 0


def episode(stage: Stage, root: Path, moments: Iterator[Moment], kills: int, figures: Figures) -> None:
    """Kill `kills` processes of one update, let the next one end, and compare."""
    row, before = 0, figures.kills
    while True:
        begun = killing.state_of(root, BATCH) is not None
        command = stage.commands.start(root, *(["resume"] if begun else ["add", str(stage.second)]))
        if row == kills:
            break
        moment = next(moments)
        command.wait_until(lambda moment=moment: moment.has_come(root))
        if (code := command.kill()) != -9:
            assert code == 0, command.said  # it was faster
            break
        row += 1
        figures.kills += 1
        figures.states[killing.state_of(root, BATCH) or "nothing"] += 1
        figures.moments[moment.name] += 1
    assert command.wait() == 0, command.said
    figures.episodes += 1
    figures.longest_row = max(figures.longest_row, figures.kills - before)
    check(stage, root)


def check(stage: Stage, root: Path) -> None:
    settled = stage.commands.run(root, "resume")  # also after a last kill that came when all was done
    assert settled.wait() == 0, settled.said
    assert killing.differences(killing.content(root), stage.after) == []
    assert killing.leftovers(root) == []
    with Ledger.open(root / "ledger.db", readonly=True) as ledger:
        assert ledger.verify() == []
        assert ledger.batch(BATCH).state == "released"
        assert all(proof.proved for proof in ledger.proofs("acme@v2"))


@pytest.mark.parametrize("moment", [*TRANSITIONS, *FILES], ids=lambda moment: moment.name)
def test_killed_at_a_transition_or_among_its_files(stage: Stage, copy: Callable[[], Path], moment: Moment) -> None:
    root = copy()
    if moment.name.startswith("cache/"):
        shutil.rmtree(root / "cache")
    figures = Figures()
    episode(stage, root, iter([moment]), 1, figures)
    if moment in TRANSITIONS:
        assert figures.kills == 1


def test_killed_several_times_in_a_row_at_random_moments(stage: Stage, copy: Callable[[], Path]) -> None:
    chance, figures = random.Random(9), Figures()

    def moments() -> Iterator[Moment]:
        while True:
            yield at_random(chance, stage)

    while figures.kills < 15:  # with one at each of the five transitions, twenty at least
        episode(stage, copy(), moments(), 3, figures)
    assert figures.longest_row >= 2


@pytest.mark.endurance
@pytest.mark.timeout(7200)
def test_two_hundred_kills(stage: Stage, copy: Callable[[], Path]) -> None:
    """In every episode one to five kills in a row: at a transition, among the files, or at a random moment."""
    chance, figures = random.Random(2026), Figures()
    began = time.monotonic()
    pool = [*TRANSITIONS, *FILES]

    def moments() -> Iterator[Moment]:
        while True:
            yield at_random(chance, stage) if chance.random() < 0.5 else chance.choice(pool)

    while figures.kills < ENDURANCE_KILLS:
        root = copy()
        if chance.random() < 0.15:
            shutil.rmtree(root / "cache")
        episode(stage, root, moments(), chance.randint(1, 5), figures)
        shutil.rmtree(root)
    report = {**vars(figures), "states": dict(figures.states), "moments": dict(figures.moments)}
    print(json.dumps({**report, "duration_s": round(time.monotonic() - began)}, ensure_ascii=False))
    assert set(STATES) <= set(figures.states)


@pytest.mark.parametrize("delay_s", [0.02, 0.1, 0.3])
def test_killed_during_the_first_init(stage: Stage, tmp_path: Path, delay_s: float) -> None:
    root, policy = tmp_path / "new", stage.folder / "policy.toml"
    arguments = ("init", str(root), "--model", str(stage.model), "--policy", str(policy), "--collection", "acme")
    command = stage.commands.start(root, *arguments)
    command.wait_until(lambda: root.exists())
    time.sleep(delay_s)
    command.kill()
    again = stage.commands.run(root, *arguments)
    if again.wait() != 0:  # all was done before the kill
        assert "is a workspace already" in again.said
    peace = tmp_path / "peace"
    done = stage.commands.run(peace, "init", str(peace), *arguments[2:])
    assert done.wait() == 0, done.said
    assert killing.differences(killing.content(root), killing.content(peace)) == []
    assert [path.name for path in root.glob(".*")] == []


def test_killed_during_calibration(stage: Stage, copy: Callable[[], Path]) -> None:
    """Two more cells: what was measured before the kill is not measured again, and the law is that of an undisturbed run."""
    arguments = ("calibrate", "--ranks", "6", "--sizes", "2,4")
    peace, root = copy(), copy()
    done = stage.commands.run(peace, *arguments)
    assert done.wait() == 0, done.said
    points = killing.count(root, "law_points")
    command = stage.commands.start(root, *arguments)
    command.wait_until(lambda: killing.count(root, "law_points") == points + 1)
    command.kill()
    done = stage.commands.run(root, *arguments)
    assert done.wait() == 0, done.said
    assert killing.differences(killing.content(root), killing.content(peace)) == []


@pytest.mark.parametrize("moved", [False, True], ids=["before the alias moves", "after it"])
def test_killed_while_an_alias_moves(stage: Stage, copy: Callable[[], Path], moved: bool) -> None:
    """The alias points at the one release or the other; done again, it says the same as in one go, and goes back."""
    peace, root = without_served_proof(copy()), without_served_proof(copy())
    for workspace in (peace, root):
        for arguments in (("add", str(stage.second)), ("publish", "acme@v1")):
            done = stage.commands.run(workspace, *arguments)
            assert done.wait() == 0, done.said
    done = stage.commands.run(peace, "publish", "acme@v2")
    assert done.wait() == 0, done.said

    def alias() -> str:
        papers = json.loads((root / "registry" / "manifest.json").read_text(encoding="utf-8"))
        return str(papers["aliases"]["acme"]["release"])

    command = stage.commands.start(root, "publish", "acme@v2")
    command.wait_until(lambda: alias() == "acme@v2" if moved else command.pid == killing.holder_of(root))
    command.kill()
    assert alias() in ("acme@v1", "acme@v2")
    if killing.state_of(root, BATCH) != "published":
        done = stage.commands.run(root, "publish", "acme@v2")
        assert done.wait() == 0, done.said
    assert killing.differences(killing.content(root), killing.content(peace)) == []
    back = stage.commands.run(root, "rollback")
    assert back.wait() == 0, back.said
    assert alias() == "acme@v1"


def without_served_proof(root: Path) -> Path:
    """Under a policy that moves aliases without an engine."""
    policy = root / "policy.toml"
    policy.write_text(policy.read_text("utf-8").replace("[proof]\n", "[proof]\nserved = false\n"), encoding="utf-8")
    return root


def test_a_release_that_no_batch_waits_for_is_in_the_manifest_again(stage: Stage, copy: Callable[[], Path]) -> None:
    """Killed between its row and the manifest, with `--no-publish`: nothing is unfinished, and `resume` mends it all the same."""
    root = copy()
    manifest = (root / "registry" / "manifest.json").read_text(encoding="utf-8")
    done = stage.commands.run(root, "add", "--no-publish", str(stage.second))
    assert done.wait() == 0, done.said
    whole = killing.content(root)
    (root / "registry" / "manifest.json").write_text(manifest, encoding="utf-8")
    assert stage.commands.run(root, "resume").wait() == 0
    assert killing.differences(killing.content(root), whole) == []


def test_what_resume_says(stage: Stage, copy: Callable[[], Path]) -> None:
    root = copy()
    command = stage.commands.start(root, "add", str(stage.second))
    command.wait_until(lambda: killing.state_of(root, BATCH) == "planned")
    command.kill()
    refused = stage.commands.run(root, "add", str(stage.second))
    assert refused.wait() == 2
    assert "memupdate resume" in refused.said
    resumed = stage.commands.run(root, "resume")
    (line,) = [line for line in resumed.said.splitlines() if line.startswith("│ 2 ")]
    assert [cell.strip() for cell in line.split("│")[1:6]] == ["2", "acme", "released", "acme@v2", "3 of 3"]
    again = stage.commands.run(root, "resume", "--json")
    (row,) = json.loads(again.said)["rows"]
    assert (row["release"], row["state"]) == ("acme@v2", "released"), "acme@v1, which waits too, is carried by it"
