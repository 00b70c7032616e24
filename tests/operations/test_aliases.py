"""The manifest made from the ledger."""

from __future__ import annotations

from pathlib import Path

from memupdate import Workspace
from memupdate.facts.model import Fact
from memupdate.operations.aliases import sync_manifest
from support import record_untrained_release


def test_a_manifest_that_is_made_anew_has_the_ids_that_engines_know(tmp_path: Path) -> None:
    """They keep weights by these ids: one that went to another release would be answered with the first one's weights."""
    workspace = Workspace.init(tmp_path / "ws", model="atlas", collection="acme")
    told = [("zeta", 1), ("acme", 1), ("zeta", 2)]  # not in the order in which the ledger lists releases
    with workspace.writer("test") as ledger:
        for number, (collection, version) in enumerate(told):
            record_untrained_release(ledger, [Fact(f"What is {number}?", "it")], version, collection=collection)
            folder = workspace.layout.registry.release(f"{collection}@v{version}")
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text("{}")
            grown = sync_manifest(workspace.session, ledger)
        workspace.layout.registry.manifest.unlink()
        anew = sync_manifest(workspace.session, ledger)
    ids = {name: entry.lora_int_id for name, entry in grown.releases.items()}
    assert ids == {"zeta@v1": 1, "acme@v1": 2, "zeta@v2": 3}
    assert {name: entry.lora_int_id for name, entry in anew.releases.items()} == ids
