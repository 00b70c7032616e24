"""The container files and Kubernetes manifests start what `serve` would start, confined, and read what it would read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml
from kubernetes_validate.utils import all_versions

from memupdate.cli import app
from memupdate.layout import REGISTRY_DIR
from memupdate.policies import parse_policy
from memupdate.serving import engine as engine_module
from memupdate.serving.compat import is_supported
from memupdate.serving.engine import EngineSettings, engine_command

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cpu"]


def documents() -> list[dict[str, Any]]:
    return [document for file in MANIFESTS for document in yaml.safe_load_all(file.read_text("utf-8"))]


def only(kind: str, name: str | None = None) -> dict[str, Any]:
    (found,) = [d for d in documents() if d["kind"] == kind and name in (None, d.get("metadata", {}).get("name"))]
    return found


def engine_pod() -> dict[str, Any]:
    return only("Deployment")["spec"]["template"]["spec"]


def watch_pod() -> dict[str, Any]:
    return only("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def test_the_container_runs_exactly_what_serve_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "is_cpu_engine", lambda: False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    settings = EngineSettings(
        model="/models/base",
        served_model_name="base",
        registry=Path("/registry"),
        log_path=Path("engine.log"),
        lora_target_modules=("down_proj", "gate_proj", "up_proj"),
        max_lora_rank=32,
        max_loras=3,
        max_cpu_loras=4,
        host="0.0.0.0",
        port=8000,
        dtype="bfloat16",
        drain_s=20,
        base_fingerprint="sha256:" + "0" * 64,
        api_key="a client's",
    )
    command, environment = engine_command(settings)
    (container,) = engine_pod()["containers"]
    assert container["args"] == command[4:]
    shown = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    # The model is a folder in the pod, which it is not here.
    elsewhere = {entry["name"]: next(iter(entry["valueFrom"])) for entry in container["env"] if "valueFrom" in entry}
    assert elsewhere == {"MEMUPDATE_BASE_FINGERPRINT": "configMapKeyRef", "VLLM_API_KEY": "secretKeyRef"}
    written = {name: value for name, value in environment.items() if name not in elsewhere}
    assert elsewhere.keys() | written.keys() == environment.keys()
    assert shown == {**written, "HF_HUB_OFFLINE": "1"}
    for file in DOCKERFILES:
        (entry,) = re.findall(r"^ENTRYPOINT \[(.*)\]$", file.read_text("utf-8"), flags=re.MULTILINE)
        assert [word.strip(' "') for word in entry.split(",")] == ["python3", *command[1:4]]


@pytest.mark.parametrize("version", all_versions())
@pytest.mark.parametrize("document", documents(), ids=lambda document: document["kind"])
def test_kubernetes_takes_every_document(document: dict[str, Any], version: str) -> None:
    if document["kind"] == "Kustomization":  # kubectl's own; it never reaches the cluster
        assert set(document) == {"apiVersion", "kind", "namespace", "resources", "images"}
        return
    kubernetes_validate.validate(document, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError, match="nonsense"):
        kubernetes_validate.validate({**document, "nonsense": 1}, version, strict=True)


def test_images_are_those_that_the_kustomization_makes_of_names() -> None:
    (image,) = only("Kustomization")["images"]
    assert engine_pod()["containers"][0]["image"] == watch_pod()["containers"][0]["image"] == image["name"]
    job = only("Job")["spec"]["template"]["spec"]  # made apart, so that its images are written out
    assert {c["image"] for c in [*job["initContainers"], *job["containers"]]} == {f"{image['name']}:{image['newTag']}"}


def test_engines_cannot_write_what_they_serve() -> None:
    pod = engine_pod()
    mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["/registry"]["readOnly"]
    assert mounts["/registry"]["subPath"] == REGISTRY_DIR
    assert mounts["/models/base"]["readOnly"]
    claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert claims == {d["metadata"]["name"] for d in documents() if d["kind"] == "PersistentVolumeClaim"}


def pods() -> list[dict[str, Any]]:
    return [engine_pod(), only("Job")["spec"]["template"]["spec"], watch_pod()]


@pytest.mark.parametrize("pod", pods(), ids=["engine", "job", "watch"])
def test_pods_are_confined_and_their_volumes_exist(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"]
        assert not own["allowPrivilegeEscalation"]
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for file in DOCKERFILES:
        last_stage = file.read_text("utf-8").rpartition("\nFROM ")[2]
        assert re.search(rf"^USER {pod['securityContext']['runAsUser']}$", last_stage, flags=re.MULTILINE)


def test_probes_service_and_budget_fit_the_deployment() -> None:
    deployment, labels = only("Deployment"), engine_pod()
    (container,) = labels["containers"]
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert deployment["spec"]["template"]["metadata"]["labels"] == selector
    assert only("Service", "memupdate-engine")["spec"]["selector"] == selector
    assert only("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == selector
    assert only("PodDisruptionBudget")["spec"]["minAvailable"] < deployment["spec"]["replicas"]
    (port,) = container["ports"]
    assert str(port["containerPort"]) == container["args"][container["args"].index("--port") + 1]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    drain = int(container["args"][container["args"].index("--shutdown-timeout") + 1])
    assert labels["terminationGracePeriodSeconds"] > drain + 20


def test_the_kustomization_names_what_is_there_and_the_job_is_made_apart() -> None:
    kustomization = only("Kustomization")
    files = {file.name for file in MANIFESTS}
    assert set(kustomization["resources"]) == files - {"kustomization.yaml", "add-job.yaml"}
    assert only("Namespace")["metadata"]["name"] == kustomization["namespace"] == only("Job")["metadata"]["namespace"]
    for document in documents():
        assert {"apiVersion", "kind"} <= set(document)


def test_the_policy_is_one_and_drains_as_the_engine_does() -> None:
    policy = parse_policy(only("ConfigMap")["data"]["policy.toml"])
    args = engine_pod()["containers"][0]["args"]
    assert str(policy.serving.drain_s) == args[args.index("--shutdown-timeout") + 1]
    assert policy.serving.dtype == args[args.index("--dtype") + 1]


def test_the_job_uses_commands_that_exist() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group, as typer builds it
    pod = only("Job")["spec"]["template"]["spec"]
    script = pod["initContainers"][0]["args"][0]
    used = {*re.findall(r"memupdate (?:-w \S+ )?(\w+)", script), pod["containers"][0]["command"][3]}
    assert used == {"init", "doctor", "resume", "serve", "add"}
    assert used <= set(known)


def test_the_watch_asks_each_engine_by_itself(tmp_path: Path) -> None:
    """Its script is run by a shell, with a resolver that knows two engines and a `memupdate` that says how it was called."""
    service, (container,) = only("Service", "memupdate-engines")["spec"], watch_pod()["containers"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"]
    assert service["selector"] == only("Deployment")["spec"]["selector"]["matchLabels"]
    assert only("CronJob")["spec"]["concurrencyPolicy"] == "Forbid"
    (tmp_path / "memupdate").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "memupdate").chmod(0o755)
    known = [(2, 1, 6, "", (ip, 8000)) for ip in ("10.0.0.7", "10.0.0.6", "10.0.0.7")] + [
        (10, 1, 6, "", ("fd00::1", 8000, 0, 0))
    ]
    (tmp_path / "sitecustomize.py").write_text(
        f"import socket\nsocket.getaddrinfo = lambda name, *_, **__: {{'memupdate-engines': {known}}}[name]\n"
    )
    environment = {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    said = subprocess.check_output([*container["command"], *container["args"]], env=environment, text=True).split()
    urls = ["http://10.0.0.6:8000", "http://10.0.0.7:8000", "http://[fd00::1]:8000"]
    assert said == ["-w", "/workspace", "abort", "--if-failing", *(word for url in urls for word in ("--served", url))]
    typer.main.get_command(app).commands["abort"].make_context("abort", said[3:])  # type: ignore[attr-defined]
    assert {m["mountPath"] for m in container["volumeMounts"] if m.get("readOnly")} == {"/models/base"}


def test_images_hold_a_supported_vllm() -> None:
    gpu, cpu = (file.read_text("utf-8") for file in DOCKERFILES)
    (version,) = re.findall(r"^ARG VLLM_VERSION=v(\S+)$", gpu, flags=re.MULTILINE)
    assert is_supported(version)
    (torch,) = re.findall(r"torch==(\S+)", cpu.split("RUN pip install")[2])
    assert f"pip install torch=={torch};" in (ROOT / "requirements" / "cpu.txt").read_text("utf-8")
