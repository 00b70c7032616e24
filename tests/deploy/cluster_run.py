"""The images built, and the manifests' containers run in them in the order of docs/serving.md, on the embedded model.

As root, in `tests`: `unshare --mount --pid --fork --mount-proc --kill-child python -m deploy.cluster_run WORK`; the last line of its output
is a JSON object of what was seen. Each container gets its own root, read-only system folders, the pod's user, volumes and environment,
and its command as the manifest has it. Not as in a cluster: a free port, the policy of the embedded model but for `[serving]`, what
`serve` adds on a machine without a GPU, this machine's network, no limits on resources, and no isolation of network and processes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from deploy.containerfile import read_stages
from deploy.image_build import Builder, Root, entrypoint

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
FACTS = 6
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "calibration.json",
               "chat_template.jinja", "model.safetensors")  # fmt: skip
_STARTED_S = 600.0
_CPU_ARGS = ["--enforce-eager"]
_CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
"""What else `serve` would set on a CPU is in the image."""


def main(work: Path) -> dict[str, Any]:
    builder = Builder(work, ROOT)
    base = builder.base()
    begun = time.monotonic()
    cpu_stages = read_stages(DEPLOY / "Dockerfile.cpu")
    cpu = builder.build(cpu_stages, {"python:3.11-slim": base}, DEPLOY / "Dockerfile.cpu.dockerignore")
    found: dict[str, Any] = {"cpu_image_s": round(time.monotonic() - begun)}
    found |= gpu_image(builder, base, cpu["environment"])
    image = cpu[cpu_stages[-1].name]
    found |= Cluster(builder, image, entrypoint(cpu_stages[-1]), work).run()
    return found


def gpu_image(builder: Builder, base: Root, environment: Root) -> dict[str, Any]:
    """The other container file on what stands for the official image: an environment with vLLM and without memupdate."""
    stages = read_stages(DEPLOY / "Dockerfile")
    without = builder.on_top_of(environment)
    checked(without, ["python3", "-m", "pip", "uninstall", "-q", "-y", "memupdate"])
    before = checked(without, ["python3", "-m", "pip", "freeze"])
    bases = {"python:3.12-slim": base, stages[-1].base: without}
    last = builder.build(stages, bases, DEPLOY / "Dockerfile.dockerignore")[stages[-1].name]
    after = checked(last, ["python3", "-m", "pip", "freeze"])
    moved = {line for line in before.splitlines() if line not in after.splitlines()}
    return {"gpu_image_moved": sorted(moved), "gpu_image_user": checked(last, ["id", "-u"]).strip()}


class Cluster:
    """The volumes, and what runs on them."""

    def __init__(self, builder: Builder, image: Root, entry: Sequence[str], work: Path) -> None:
        self._builder, self._image, self._entry = builder, image, list(entry)
        files = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        documents = [d for file in files for d in yaml.safe_load_all(file.read_text("utf-8"))]
        self._one = {d["kind"]: d for d in documents}
        self._job = self._one["Job"]["spec"]["template"]["spec"]
        self._engine = self._one["Deployment"]["spec"]["template"]["spec"]
        self._group = self._job["securityContext"]["fsGroup"]
        self._work = work / "volumes"
        claims = [d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"]
        self._claims = {name: self._made(name) for name in claims}
        self._maps = {name: self._made(name) for name in ("memupdate-policy", "memupdate-facts")}
        self._fill()

    def run(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        begun = time.monotonic()
        for container in [*self._job["initContainers"], *self._job["containers"]]:
            found[f"job_{container['name']}"] = self._start(
                self._job, container, [*container["command"], *container.get("args", [])]
            ).wait()
        found["job_s"] = round(time.monotonic() - begun)
        (container,) = self._engine["containers"]
        engine, url = self._started(container)
        try:
            found["engine_s"] = self._probed(engine, container, url)
            found |= self._published(url)
        finally:
            engine.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            found["engine_code"] = engine.wait(self._engine["terminationGracePeriodSeconds"])
            found["engine_stop_s"] = round(time.monotonic() - begun, 1)
        return found

    def _started(self, container: dict[str, Any]) -> tuple[subprocess.Popen[str], str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        args = list(container["args"])
        args[args.index("--port") + 1] = str(port)
        command = [*self._entry, *args, *_CPU_ARGS]
        return self._start(self._engine, container, command, _CPU_ENVIRONMENT), f"http://127.0.0.1:{port}"

    def _probed(self, engine: subprocess.Popen[str], container: dict[str, Any], url: str) -> float:
        """Seconds until all probes are answered. Raises RuntimeError where the engine ends or takes too long."""
        begun = time.monotonic()
        paths = [container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
        while engine.poll() is None and time.monotonic() < begun + _STARTED_S:
            try:
                if all(httpx.get(url + path, timeout=5, trust_env=False).status_code == 200 for path in paths):
                    return round(time.monotonic() - begun, 1)
            except httpx.HTTPError:
                pass
            time.sleep(1)
        raise RuntimeError(f"the engine does not answer its probes (exit code {engine.poll()})")

    def _published(self, url: str) -> dict[str, Any]:
        """`publish` in the job's place, then each fact asked of the alias by a client."""
        (job,) = self._job["containers"]
        memupdate = ["memupdate", "-w", "/workspace"]
        codes = {
            name: self._start(self._job, job, [*memupdate, *rest, "--served", url]).wait()
            for name, rest in (("publish", ["publish", "acme@v1"]), ("doctor", ["doctor"]))
        }
        answers = []
        for line in (self._maps["memupdate-facts"] / "facts.jsonl").read_text("utf-8").splitlines():
            fact = json.loads(line)
            body = {"model": "acme", "messages": [{"role": "user", "content": fact["prompt"]}], "temperature": 0}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False).json()
            said = answer["choices"][0]["message"]["content"] if "choices" in answer else answer
            answers.append((answer.get("model"), said if said != fact["target"] else True))
        admin = httpx.post(f"{url}/v1/load_lora_adapter", json={}, timeout=30, trust_env=False).status_code
        return {**codes, "answers": answers, "admin_route": admin}

    def _start(
        self,
        pod: dict[str, Any],
        container: dict[str, Any],
        command: Sequence[str],
        extra: dict[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """A container of its own, as the pod has it."""
        root = self._builder.on_top_of(self._image)
        root.user, root.groups = pod["securityContext"]["runAsUser"], (pod["securityContext"]["fsGroup"],)
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in container["volumeMounts"]:
            self._mount(root, volumes[mount["name"]], mount)
        if container["securityContext"]["readOnlyRootFilesystem"]:
            self._builder.make_read_only(root)
        given = {entry["name"]: entry["value"] for entry in container.get("env", ()) if "value" in entry}
        print(f"{container['name']}: {' '.join(command)}", flush=True)
        process: subprocess.Popen[str] = root.run(command, {**given, **(extra or {})}, stdin=subprocess.DEVNULL)
        return process

    def _mount(self, root: Root, volume: dict[str, Any], mount: dict[str, Any]) -> None:
        target = root.at(mount["mountPath"])
        target.mkdir(parents=True, exist_ok=True)
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            size = volume["emptyDir"]["sizeLimit"].removesuffix("i")
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=1777", "tmpfs", target], check=True)
            return
        if "persistentVolumeClaim" in volume:
            source = self._claims[volume["persistentVolumeClaim"]["claimName"]]
        elif "configMap" in volume:
            source = self._maps[volume["configMap"]["name"]]
        else:
            source = self._made(f"empty-{root.path.parent.name}-{volume['name']}")
        subprocess.run(["mount", "--bind", source / mount.get("subPath", ""), target], check=True)
        if mount.get("readOnly"):
            subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)

    def _made(self, name: str) -> Path:
        """A folder that the pod's group may write, as volumes are with `fsGroup`."""
        path = self._work / name
        path.mkdir(parents=True)
        os.chown(path, 0, self._group)
        path.chmod(0o2775)
        return path

    def _fill(self) -> None:
        for name in MODEL_FILES:
            shutil.copy(ROOT / "examples" / "atlas" / name, self._claims["memupdate-model"])
        given = self._one["ConfigMap"]["data"]["policy.toml"]
        own = (ROOT / "policies" / "atlas.toml").read_text("utf-8")
        policy = own.partition("[serving]")[0] + "".join(given.partition("[serving]")[1:])
        (self._maps["memupdate-policy"] / "policy.toml").write_text(policy, "utf-8")
        lines = (ROOT / "examples" / "atlas" / "news-1.jsonl").read_text("utf-8").splitlines(keepends=True)[:FACTS]
        (self._maps["memupdate-facts"] / "facts.jsonl").write_text("".join(lines), "utf-8")


def checked(root: Root, command: Sequence[str]) -> str:
    """Output of a command that must succeed."""
    process = root.run(command, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return str(output)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]).resolve())))
