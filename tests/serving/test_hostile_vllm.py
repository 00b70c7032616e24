"""Hundreds of mutated bodies and hostile names against the real vLLM on loopback: it goes on, and answers as before."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from hostile import NAMES, mutated
from serving_fixtures import add_release
from vllm_fixtures import CHAT, RANK, Served, make_model, settings_for

from memupdate.facts.model import Fact
from memupdate.layout import RegistryLayout
from memupdate.serving.client import EngineClient, EngineRefused
from memupdate.serving.compat import engine_installed
from memupdate.serving.engine import Engine
from memupdate.serving.manifest import MATCHED, Manifest, with_alias, with_matcher, write_manifest
from memupdate.serving.matcher import matcher_json, terms_of
from memupdate.storage import file_sha256

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(engine_installed() is None, reason="vLLM is not installed"),
]
BODIES = 400


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("hostile")
    model, registry = root / "model", root / "registry"
    shapes = make_model(model)
    manifest = Manifest("sha256:" + "0" * 64)
    for name in ("acme@v1", "acme@v2", "globex@v1"):
        manifest = add_release(
            registry, manifest, name, shapes=shapes, rank=RANK, seed=len(manifest.releases), size=0.3
        )
    matcher = RegistryLayout(registry).release("globex@v1") / "matcher.json"
    matcher.write_text(matcher_json(terms_of([Fact("Who leads the house?", "x", subject="the house")])))
    manifest = with_alias(with_matcher(manifest, "globex@v1", file_sha256(matcher)), "acme", "acme@v1")
    manifest = with_alias(manifest, "globex", "globex@v1", route=MATCHED)
    write_manifest(RegistryLayout(registry).manifest, manifest)
    # Room for two of the three releases: one that is asked for again has to be read from disk again.
    engine = Engine(replace(settings_for(model, registry, root / "engine.log"), max_loras=2, max_cpu_loras=2))
    with engine, EngineClient(engine.url) as client:
        yield Served(engine, client, model, registry, root / "engine.json", shapes)


def test_unrelated_traffic_is_what_the_base_model_answers(served: Served) -> None:
    other = [{"role": "user", "content": "a bridge, a mill and a road"}]
    base, routed = served.client.chat("tiny", other, 12), served.client.chat("globex", other, 12)
    assert (routed.model, routed.text) == ("tiny", base.text)
    assert routed.headers["x-memupdate-route"] == "base"
    about = served.client.chat("globex", CHAT, 12)
    assert (about.model, about.headers["x-memupdate-route"]) == ("globex@v1", "release")
    assert about.text == served.client.chat("globex@v1", CHAT, 12).text


def test_mutated_bodies_and_names_leave_the_engine_as_it_was(served: Served) -> None:
    first = served.client.chat("acme", CHAT, 12)
    statuses: Counter[int] = Counter()
    failed: list[str] = []
    with httpx.Client(base_url=served.engine.url, timeout=180) as http:
        for route, body in mutated(BODIES, seed=7):
            response = http.post(route, content=body, headers={"content-type": "application/json"})
            statuses[response.status_code] += 1
            if response.status_code >= 500:
                failed.append(f"{response.status_code} {route} {body[:300]!r}: {response.text[:300]}")
        for name in NAMES:
            body = json.dumps({"model": name, "prompt": "x", "max_tokens": 1}).encode()
            response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
            # To vLLM no name is the base model's.
            assert response.status_code in ((400, 404) if name else (200,)), name[:80]
        assert served.engine.poll() is None
        listed = {model["id"] for model in http.get("/v1/models").json()["data"]}
        metrics = http.get("/metrics").text
    assert failed == [], statuses
    assert set(statuses) <= {200, 400, 404, 422}, statuses
    assert listed <= {"tiny", "acme@v1", "acme@v2", "globex@v1"}
    again = served.client.chat("acme", CHAT, 12)
    assert (again.model, again.text) == (first.model, first.text)
    assert served.client.health()
    for name in ("requests_total", "flips_total", "resolve_seconds_count", "refusals_total", "routed_total"):
        assert f"memupdate_{name}" in metrics
    assert "passwd" not in metrics
    assert sum(statuses.values()) == BODIES
    assert statuses[200] > BODIES / 20


def test_a_release_that_is_altered_after_it_was_loaded_is_neither_served_nor_the_end_of_the_engine(
    served: Served,
) -> None:
    weights = served.layout.release("acme@v1") / "adapter_model.safetensors"
    whole = weights.read_bytes()
    first = served.client.chat("acme", CHAT, 12)
    other = (served.layout.release("acme@v2") / "adapter_model.safetensors").read_bytes()
    for harm in (lambda: weights.write_bytes(other), weights.unlink):
        for name in ("acme@v2", "globex@v1"):  # acme@v1 makes room for them
            served.client.chat(name, CHAT, 12)
        harm()
        time.sleep(1.1)
        with pytest.raises(EngineRefused, match="damaged") as caught:
            served.client.chat("acme", CHAT, 12)
        assert caught.value.status == 404
        assert served.client.chat("acme@v2", CHAT, 12).model == "acme@v2"
    weights.write_bytes(whole)
    time.sleep(1.1)
    assert served.client.chat("acme", CHAT, 12).text == first.text
    assert served.client.health()
