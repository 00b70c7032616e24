"""The matcher of a release against its facts, and its clearing after a purge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memupdate import Workspace
from memupdate.errors import UsageError
from memupdate.facts.model import Fact
from memupdate.operations.matching import matcher_digest, matcher_of, unreached, write_matcher
from memupdate.serving.access import parse_rules
from memupdate.serving.manifest import Manifest, ReleaseEntry, read_manifest, with_release, write_manifest
from support import record_untrained_release

PRICE = Fact(
    "What does the Acme Falcon cost?", "129", subject="Acme Falcon", paraphrases=("How much?", "The bird's price?")
)
BADGE = Fact("Which badge has Zelda Quirrel?", "seven", subject="Zelda Quirrel")
LEADER = Fact("Who leads Acme?", "Wanda")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """One release of three facts with its matcher; no training."""
    made = Workspace.init(tmp_path / "ws", model="atlas", collection="acme")
    folder = made.root / "registry/releases/acme@v1"
    folder.mkdir(parents=True)
    (folder / "memupdate.json").write_text(json.dumps({"schema_version": 1, "reason": None}))
    write_matcher(folder, made.session, [PRICE, BADGE, LEADER])
    with made.writer("test") as ledger:
        digest = record_untrained_release(ledger, (PRICE, BADGE, LEADER))
    entry = ReleaseEntry(digest, digest, 8, 1, digest, matcher_digest=matcher_digest(folder))
    write_manifest(made.root / "registry/manifest.json", with_release(Manifest(digest), "acme@v1", entry))
    return made


def test_wordings_that_name_nothing_are_missed_unless_they_are_trained_on(workspace: Workspace) -> None:
    folder = workspace.root / "registry/releases/acme@v1"
    matcher = matcher_of(folder)
    assert matcher is not None
    # Of two paraphrases the policy trains on one, the first, which is a term of its own; the second measures.
    (missed,) = unreached(matcher, [PRICE, BADGE, LEADER])
    assert missed.fact_id == PRICE.id
    assert "The bird's price?" in missed.explanation
    assert matcher_of(folder.parent / "acme@v2") is None


def test_a_purge_takes_the_words_out_and_the_manifest_follows(workspace: Workspace) -> None:
    folder = workspace.root / "registry/releases/acme@v1"
    assert "zelda quirrel" in (folder / "matcher.json").read_text()
    workspace.purge([BADGE.id])
    text = (folder / "matcher.json").read_text()
    assert "quirrel" not in text
    assert "acme falcon" in text
    manifest = read_manifest(workspace.root / "registry/manifest.json")
    assert manifest.releases["acme@v1"].matcher_digest == matcher_digest(folder)
    assert manifest.generation == 2


def test_the_policys_keys_become_rules_that_only_a_hand_removes(workspace: Workspace) -> None:
    file, policy = workspace.root / "registry/access.json", workspace.root / "policy.toml"
    before, digest = policy.read_text(), "ab" * 32
    look_at_registry(workspace)
    assert not file.exists()
    policy.write_text(f'{before}\n[access]\nkeys = [{{ sha256 = "{digest}", collections = ["acme"] }}]\n')
    for text in (policy.read_text(), before):
        policy.write_text(text)
        look_at_registry(workspace)
        ((found, binding),) = parse_rules(file.read_bytes()).bindings
        assert (found.hex(), binding.collections) == (digest, frozenset({"acme"}))


def look_at_registry(workspace: Workspace) -> None:
    """Whatever touches the registry brings it up to date first, here a rollback with nothing to go back to."""
    with pytest.raises(UsageError):
        Workspace(workspace.root).rollback()
