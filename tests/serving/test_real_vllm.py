"""The real vLLM process with both plug-ins, on a tiny random Llama: resolve, flip, roll back, refuse, score, stop.

One engine serves all tests of this file; a start takes about a minute on two cores.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from serving_fixtures import add_release, entry_for, write_adapter
from vllm_fixtures import CHAT, RANK, TEXTS, Served, make_model, settings_for

from memupdate.errors import EngineError
from memupdate.layout import RegistryLayout
from memupdate.operations.doctor_served import Expected, examine_served
from memupdate.serving.access import Binding, rules_json
from memupdate.serving.client import EngineClient, EngineRefused
from memupdate.serving.compat import engine_installed
from memupdate.serving.engine import Engine
from memupdate.serving.engine_record import running_engine
from memupdate.serving.manifest import (
    Manifest,
    with_alias,
    with_release,
    with_retired,
    write_manifest,
)
from memupdate.serving.supervisor import RestartBounds, Supervisor

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(engine_installed() is None, reason="vLLM is not installed"),
]

ADMIN_TOKEN = "let me in"


def session_of(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    model, registry, record = root / "model", root / "registry", root / "engine.json"
    shapes = make_model(model)
    manifest = Manifest("sha256:" + "0" * 64)
    for version in (1, 2):
        manifest = add_release(registry, manifest, f"acme@v{version}", shapes=shapes, rank=RANK, seed=version, size=0.3)
    write_manifest(RegistryLayout(registry).manifest, with_alias(manifest, "acme", "acme@v1"))
    patch = pytest.MonkeyPatch()
    patch.setenv("MEMUPDATE_ADMIN_TOKEN", ADMIN_TOKEN)
    settings = replace(settings_for(model, registry, root / "logs" / "engine.log"), drain_s=20)
    engine = Engine(settings, record=record)
    told: list[str] = []
    stopped = threading.Event()
    supervisor = Supervisor(engine, RestartBounds(), told.append)
    thread = threading.Thread(target=supervisor.run, args=(stopped,))
    thread.start()

    def stop() -> None:
        stopped.set()
        thread.join()

    try:
        assert wait_until(lambda: supervisor.ready.is_set() or not thread.is_alive(), 450)
        with EngineClient(engine.url) as client:
            yield Served(engine, client, model, registry, record, shapes, told, stop)
    finally:
        stop()
        patch.undo()


def test_alias_follows_the_manifest_from_one_request_to_the_next(served: Served) -> None:
    assert served.client.models() == ("tiny",)
    base = served.client.chat("tiny", CHAT, 12)
    assert base.model == "tiny"
    assert "x-memupdate-release" not in base.headers

    first = served.client.chat("acme", CHAT, 12)
    assert first.model == "acme@v1"
    assert first.headers["x-memupdate-release"] == "acme@v1"
    assert first.headers["x-memupdate-alias"] == "acme"

    served.point("acme", "acme@v2")
    second = served.client.chat("acme", CHAT, 12)
    assert second.model == "acme@v2"

    manifest = served.manifest()
    previous = manifest.aliases["acme"].previous
    assert previous == "acme@v1"
    served.write(with_alias(manifest, "acme", previous))
    back = served.client.chat("acme", CHAT, 12)
    assert (back.model, back.text) == ("acme@v1", first.text)
    assert len({base.text, first.text, second.text}) == 3
    assert served.client.complete("acme@v2", "the old mill", 4).model == "acme@v2"


def test_a_connection_that_was_idle_is_still_good(served: Served) -> None:
    """vLLM by itself ends it after 5 s, just when a client may be about to use it again."""
    address = urlsplit(served.engine.url)
    connection = HTTPConnection(str(address.hostname), address.port, timeout=30)
    connection.connect()
    sock = connection.sock
    for idle_s in (0, 7):
        time.sleep(idle_s)
        connection.request("GET", "/v1/models")
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (200, True)
        assert connection.sock is sock, "the same connection all along"
    connection.close()


def test_streams_name_the_release_and_arrive_in_pieces(served: Served) -> None:
    body = {"model": "acme", "messages": CHAT, "max_tokens": 8, "temperature": 0, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{served.engine.url}/v1/chat/completions", json=body, timeout=120) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    assert response.headers["x-memupdate-alias"] == "acme"
    assert len(lines) > 3
    assert all('"model":"acme@v1"' in line for line in lines)


@pytest.mark.parametrize(
    ("route", "asked", "length"),
    [
        ("/v1/completions", {"prompt": "the old mill"}, "max_tokens"),
        ("/v1/responses", {"input": "the old mill"}, "max_output_tokens"),
    ],
)
def test_the_other_routes_name_the_release_too(served: Served, route: str, asked: dict[str, str], length: str) -> None:
    body = {"model": "acme", **asked, length: 6, "temperature": 0}
    answer = httpx.post(served.engine.url + route, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "acme@v1"
    assert (answer.headers["x-memupdate-release"], answer.headers["x-memupdate-alias"]) == ("acme@v1", "acme")
    with httpx.stream("POST", served.engine.url + route, json={**body, "stream": True}, timeout=120) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    assert response.headers["x-memupdate-release"] == "acme@v1"
    assert len(lines) > 2
    named = [line for line in lines if '"model":' in line]
    assert named
    assert all('"model":"acme@v1"' in line for line in named)


@pytest.mark.parametrize(
    "name", ["acme@v99", "nobody", "../acme@v1", "acme@v1/../acme@v2", "acme@v1\x00", "ＡＣＭＥ@v1"]
)
def test_names_that_are_no_release_are_a_clean_404(served: Served, name: str) -> None:
    with pytest.raises(EngineRefused) as caught:
        served.client.complete(name, "the old mill", 2)
    assert caught.value.status == 404
    assert served.client.health()


def test_a_corrupt_release_is_refused_and_the_rest_goes_on(served: Served) -> None:
    folder = write_adapter(served.layout.release("acme@v3"), shapes=served.shapes, rank=RANK, seed=3)
    manifest = served.manifest()
    served.write(with_release(manifest, "acme@v3", entry_for(folder, 3, base=manifest.base_fingerprint)))
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 0xFF
    weights.write_bytes(bytes(content))
    for _ in range(2):
        with pytest.raises(EngineRefused) as caught:
            served.client.complete("acme@v3", "the old mill", 2)
        assert caught.value.status == 404
    assert "has digest" in served.engine.settings.log_path.read_text()
    assert served.client.complete("acme@v1", "the old mill", 2).model == "acme@v1"


def test_a_retired_release_is_a_404_even_when_it_is_loaded(served: Served) -> None:
    manifest = served.manifest()
    manifest = add_release(served.registry, manifest, "acme@v4", shapes=served.shapes, rank=RANK, seed=4)
    served.write(manifest)
    assert served.client.complete("acme@v4", "the old mill", 2).model == "acme@v4"
    served.write(with_retired(served.manifest(), "acme@v4"))
    with pytest.raises(EngineRefused) as caught:
        served.client.complete("acme@v4", "the old mill", 2)
    assert caught.value.status == 404


def test_admin_routes_need_the_token(served: Served) -> None:
    routes = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/invocations", "/pause", "/ping"]
    body = {"lora_name": "evil", "lora_path": str(served.layout.release("acme@v1"))}
    with httpx.Client(base_url=served.engine.url, timeout=60) as http:
        assert [http.post(route, json=body).status_code for route in routes] == [403] * len(routes)
        assert http.delete("/adapters/acme@v1").status_code == 403
        wrong = {"x-memupdate-admin-token": ADMIN_TOKEN + "x"}
        assert http.post("/v1/load_lora_adapter", json=body, headers=wrong).status_code == 403
        right = {"x-memupdate-admin-token": ADMIN_TOKEN}
        assert http.post("/v1/load_lora_adapter", json=body, headers=right).status_code == 200
        assert http.post("/v1/unload_lora_adapter", json=body, headers=right).status_code == 200
        assert http.get("/metrics").status_code == 200
        tokens = http.post("/tokenize", json={"model": "acme", "prompt": "the old mill"})
        assert tokens.json()["count"] > 0


def test_scores_are_those_of_transformers_and_peft(served: Served) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.model)
    base = AutoModelForCausalLM.from_pretrained(served.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(served.layout.release("acme@v2"))).eval()
    # Prompts that share a prefix longer than a cache block (128 tokens on the CPU): what is cached keeps its scores.
    texts = [" ".join([TEXTS[0]] * 14) + end for end in (" mill", " bridge", ", a road", " mill")] + list(TEXTS[1:])
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    prompts, targets = [row[:-5] for row in rows], [row[-5:] for row in rows]
    assert 140 < max(map(len, prompts)) < 310
    for _ in range(2):
        served.client.complete("acme@v2", prompts[0], 1)
    assert prefix_cache_hits(served.engine.url) > 0

    for _ in range(2):
        scores = served.client.score_targets("acme@v2", prompts, targets)
        for prompt, target, found in zip(prompts, targets, scores, strict=True):
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([prompt + target])).logits[0].float(), dim=-1)
            for offset, score in enumerate(found):
                row = logprobs[len(prompt) + offset - 1]
                assert score.token_id == target[offset]
                assert score.logprob == pytest.approx(row[target[offset]].item(), abs=1e-3)
                assert score.top_token_id == int(row.argmax())
                assert score.rank == 1 + int((row > row[target[offset]]).sum())
    assert served.client.score_targets("acme@v2", prompts * 10, targets * 10)[-1] == scores[-1]
    assert served.client.health()


def test_a_proved_chain_is_what_the_engine_emits(served: Served) -> None:
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(served.model)(TEXTS[1], add_special_tokens=False)["input_ids"]
    chain: list[int] = []
    for _ in range(6):
        # Whatever the target, the score names the most probable token at its place.
        chain.append(served.client.score_targets("acme@v1", [prompt + chain], [[0]])[0][0].top_token_id)
    scores = served.client.score_targets("acme@v1", [prompt], [chain])[0]
    assert [score.rank for score in scores] == [1] * len(chain)
    body = {"model": "acme@v1", "prompt": prompt, "max_tokens": 6, "temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{served.engine.url}/v1/completions", json=body, timeout=60).json()
    emitted = answer["choices"][0]["token_ids"]
    assert emitted == chain[: len(emitted)]
    assert len(emitted) == 6 or answer["choices"][0]["finish_reason"] == "stop"


def test_the_doctor_finds_the_engine_well(served: Served) -> None:
    manifest = served.manifest()
    target = manifest.aliases["acme"].release
    report = examine_served(
        served.engine.url, expected=Expected(manifest.generation, {"acme": (target,)}, {"acme": "the old mill"}, RANK)
    )
    assert [finding.what for finding in report.findings if finding.status != "ok"] == []
    assert {"version", "clock", "rank", "admin routes", "LoRA", "plug-ins"} <= {f.area for f in report.findings}
    assert served.client.health()


def test_keys_keep_tenants_apart(served: Served) -> None:
    """The rules stay in force until the engine is started again, by the next test."""
    manifest = add_release(served.registry, served.manifest(), "other@v1", shapes=served.shapes, rank=RANK, seed=5)
    served.write(with_alias(manifest, "other", "other@v1"))
    bindings = {"key-of-acme": Binding(frozenset({"acme"}), False), "key-of-other": Binding(frozenset({"other"}), True)}
    rules = rules_json([(hashlib.sha256(key.encode()).hexdigest(), bound) for key, bound in bindings.items()])
    served.layout.access.write_text(rules)
    try:
        with httpx.Client(base_url=served.engine.url, timeout=60) as http:

            def status(model: str, key: str | None) -> int:
                shown = {"authorization": f"Bearer {key}"} if key else {}
                body = {"model": model, "prompt": "the old mill", "max_tokens": 2}
                return http.post("/v1/completions", json=body, headers=shown).status_code

            names = ("acme", "acme@v2", "other", "other@v1", "tiny")
            assert [status(name, "key-of-acme") for name in names] == [200, 200, 404, 404, 404]
            assert [status(name, "key-of-other") for name in names] == [404, 404, 200, 200, 200]
            assert [status("acme", key) for key in (None, "key-of-nobody")] == [401, 401]
            shown = http.get("/v1/models", headers={"authorization": "Bearer key-of-acme"}).json()["data"]
            assert {model["id"].partition("@")[0] for model in shown} <= {"acme"}
    finally:
        served.layout.access.unlink()


def test_an_engine_whose_core_is_killed_comes_back_and_heals_itself(served: Served) -> None:
    before = running_engine(served.record)
    assert before is not None
    (core,) = [pid for pid in session_of(before.pid) if "EngineCore" in command_line(pid)]
    os.kill(core, signal.SIGKILL)
    # Published while the engine is away: nobody tells it.
    manifest = add_release(served.registry, served.manifest(), "acme@v9", shapes=served.shapes, rank=RANK, seed=9)
    served.write(with_alias(manifest, "acme", "acme@v9"))
    assert wait_until(lambda: any("is back at" in line for line in served.told), 420), served.told
    after = running_engine(served.record)
    assert after is not None
    assert (after.url, after.restarts) == (before.url, 1)
    assert after.pid != before.pid
    assert session_of(before.pid) == []
    assert served.client.chat("acme", CHAT, 4).model == "acme@v9"
    assert served.client.complete("acme@v1", "the old mill", 4).model == "acme@v1"
    assert len(served.told) == 2


def test_the_engine_is_found_by_its_record_and_leaves_nothing_behind(served: Served) -> None:
    found = running_engine(served.record)
    assert found is not None
    assert (found.pid, found.url, found.served_model_name) == (served.engine.pid, served.engine.url, "tiny")
    assert found.max_lora_rank == 8
    leader = served.engine.pid
    assert len(session_of(leader)) > 1
    body = {"model": "acme", "prompt": "the old mill", "max_tokens": 250, "temperature": 0, "ignore_eos": True}
    started = time.monotonic()
    with httpx.stream("POST", f"{found.url}/v1/completions", json={**body, "stream": True}, timeout=60) as response:
        pieces = (line for line in response.iter_lines() if line)
        next(pieces)
        stopping = threading.Thread(target=served.stop)
        stopping.start()
        rest = list(pieces)
    assert len(rest) > 200, "what is in flight is answered before the engine ends"
    assert rest[-1] == "data: [DONE]"
    stopping.join()
    assert time.monotonic() - started < 55
    assert session_of(leader) == []
    assert running_engine(served.record) is None
    assert not served.record.exists()
    with pytest.raises(EngineError, match="cannot be reached"):
        served.client.models()


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "no-such-architecture"}')
    settings = settings_for(broken, tmp_path / "registry", tmp_path / "engine.log")
    engine = Engine(settings, record=tmp_path / "engine.json")
    with pytest.raises(EngineError) as caught:
        engine.start()
    assert "no-such-architecture" in caught.value.message
    assert caught.value.details
    assert session_of(engine.pid) == []
    assert not (tmp_path / "engine.json").exists()
    with pytest.raises(EngineError, match="there is no model folder"):
        Engine(replace(settings, model=str(tmp_path / "nowhere"))).start()


def test_kill_9_of_the_parent_ends_the_engine(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, threading, time\n"
        "from pathlib import Path\n"
        "from memupdate.serving.engine import Engine, EngineSettings\n"
        "root = Path(sys.argv[1])\n"
        "engine = Engine(EngineSettings(str(root / 'model'), 'tiny', root / 'registry', root / 'engine.log',\n"
        "                               ('down_proj',), 8, dtype='float32'))\n"
        "threading.Thread(target=engine.start, daemon=True).start()\n"
        "while not engine.pid: time.sleep(0.05)\n"
        "print(engine.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        leader = int(parent.stdout.readline())
        # Not before vLLM has children of its own: they are what would be orphaned.
        assert wait_until(lambda: len(session_of(leader)) > 1, 120)
        os.kill(parent.pid, signal.SIGKILL)
        assert wait_until(lambda: session_of(leader) == [], 40)
    finally:
        parent.kill()
        parent.wait()
        if parent.stdout is not None:
            parent.stdout.close()


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def prefix_cache_hits(url: str) -> float:
    """Tokens that vLLM says it took from its prefix cache so far."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False
