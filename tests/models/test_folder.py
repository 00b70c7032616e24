"""The base model as a folder: found by name, path or hub repository, told apart by its bytes, refused in one clear line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from memupdate.errors import ExitCode, ModelError
from memupdate.models import folder as folder_module
from memupdate.models.folder import ModelFolder, resolve_model

REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def copy(tmp_path: Path, repo_root: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in FILES:
        shutil.copy(repo_root / "examples" / "atlas" / name, folder / name)
    return folder


def refused(model: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        resolve_model(model)
    assert caught.value.exit_code == ExitCode.UNREACHABLE == 6
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


def test_the_embedded_model_by_name(repo_root: Path) -> None:
    folder = resolve_model("atlas")
    assert folder.path == repo_root / "examples" / "atlas"
    assert folder.has_chat_template
    assert folder.config["model_type"] == "llama"
    assert [f.name for f in folder.weight_files] == ["model.safetensors"]


def test_a_path_absolute_relative_or_from_home(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    monkeypatch.setenv("HOME", str(copy.parent))
    for model in (str(copy), "model", "./model", "~/model"):
        assert resolve_model(model).path == copy.resolve()
    monkeypatch.chdir(copy.parent.parent)
    assert resolve_model(f"{copy.parent.name}/model").path == copy.resolve()  # looks like a repository, but is there


@pytest.mark.parametrize("model", ["nowhere", "/no/such/folder", "./nowhere", "~/nowhere/at/all", "a/b/c"])
def test_a_missing_folder(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(model).message == f"{model}: no such folder"


def test_a_file_is_no_folder(copy: Path) -> None:
    assert "no such folder" in refused(str(copy / "config.json")).message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"model_type": ', "cannot be read as JSON"),
        ("[]", "not a JSON object"),
        ("{}", "empty config.json"),
        (None, "not there"),
    ],
)
def test_a_broken_config(copy: Path, text: str | None, reason: str) -> None:
    file = copy / "config.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    message = refused(str(copy)).message
    assert reason in message
    assert str(copy) in message


def test_a_config_that_is_not_text(copy: Path) -> None:
    (copy / "config.json").write_bytes(b"\xff\xfe\x00{")
    assert "cannot be read as JSON" in refused(str(copy)).message


def test_no_safetensors(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "no *.safetensors weights" in refused(str(copy)).message


def test_no_tokenizer(copy: Path) -> None:
    for text in (None, "{}", "nonsense"):
        (copy / "tokenizer.json").unlink(missing_ok=True)
        if text is not None:
            (copy / "tokenizer.json").write_text(text)
        with pytest.raises(ModelError, match=r"no fast tokenizer") as caught:
            ModelFolder(copy).count_tokens("Acme")
        assert caught.value.exit_code == 6
        assert "\n" not in caught.value.message


def test_chat_template_in_either_place(copy: Path) -> None:
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    assert not ModelFolder(copy).has_chat_template
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    assert ModelFolder(copy).has_chat_template
    (copy / "tokenizer_config.json").unlink()
    assert not ModelFolder(copy).has_chat_template


def test_tokens_are_counted_without_special_ones() -> None:
    folder = resolve_model("atlas")
    assert folder.count_tokens("") == 0
    assert folder.count_tokens("1991") == 4  # digits are split
    assert folder.count_tokens("Velerco Robotics") == 3


@pytest.mark.parametrize("name", FILES)
def test_fingerprint_changes_with_a_byte_of_any_file(copy: Path, tmp_path: Path, name: str) -> None:
    cache = tmp_path / "cache"
    before = ModelFolder(copy).fingerprint(cache)
    assert before.startswith("sha256:")
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    os.utime(copy / name, ns=(1, 1))  # another stamp, whatever the file system's clock
    assert ModelFolder(copy).fingerprint(cache) != before
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    assert ModelFolder(copy).fingerprint(cache) == before


def test_fingerprint_is_the_contents_not_the_place(copy: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(copy, moved)
    assert ModelFolder(moved).fingerprint(tmp_path / "a") == ModelFolder(copy).fingerprint(tmp_path / "b")


def test_digests_are_kept(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = folder_module.file_sha256

    def counting(path: Path) -> str:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(folder_module, "file_sha256", counting)
    first = ModelFolder(copy).fingerprint(tmp_path / "cache")
    assert sorted(read) == sorted(FILES)
    assert ModelFolder(copy).fingerprint(tmp_path / "cache") == first
    assert len(read) == len(FILES)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert ModelFolder(copy).fingerprint(tmp_path / "cache") == first
    assert read[len(FILES) :] == ["model.safetensors"]


def test_repository_from_the_local_cache(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own cache layout, read offline."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in FILES:
        blob = repository / "blobs" / hashlib.sha256((copy / name).read_bytes()).hexdigest()
        shutil.copy(copy / name, blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    folder = resolve_model("org/name")
    assert folder.path == snapshot
    assert folder.fingerprint(tmp_path / "c") == ModelFolder(copy).fingerprint(tmp_path / "c")
    assert "org/other: cannot be had from the hub" in refused("org/other").message


def test_unknown_repository_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    error = refused("nobody/nothing")
    assert error.message.startswith("nobody/nothing: cannot be had from the hub (")


def etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The routes of a hub that a download needs, over a folder of one repository."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        prefix, _, name = path.partition(f"/resolve/{REVISION}/")
        if path == "/api/models/org/name/revision/main":
            siblings = [{"rfilename": f.name} for f in sorted(self.root.iterdir())]
            self.send(json.dumps({"id": "org/name", "sha": REVISION, "siblings": siblings}).encode(), body)
        elif path == f"/api/models/org/name/tree/{REVISION}":
            entries = [self.entry(f) for f in sorted(self.root.iterdir())]
            self.send(json.dumps(entries).encode(), body)
        elif prefix == "/org/name" and (self.root / name).is_file():
            self.send((self.root / name).read_bytes(), body)
        else:
            self.send_error(404)

    def entry(self, file: Path) -> dict[str, object]:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": etag(file.read_bytes())}

    def send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", f'"{etag(content)}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Keep the tests' output quiet."""


@pytest.fixture
def hub(copy: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub on this machine that has `org/name`; its URL and what it was asked for."""
    (copy / "pytorch_model.bin").write_bytes(b"pickled")
    handler = type("BoundHub", (Hub,), {"root": copy, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_repository_is_downloaded_without_anything_pickled(
    hub: tuple[str, list[str]], copy: Path, tmp_path: Path
) -> None:
    url, asked = hub
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from memupdate.errors import ModelError\n"
        "from memupdate.models.folder import resolve_model\n"
        "folder = resolve_model('org/name')\n"
        "print(folder.path, folder.fingerprint(Path(sys.argv[1])))\n"
        "try:\n"
        "    resolve_model('org/absent')\n"
        "except ModelError as error:\n"
        "    print(error.message)\n"
        "print('torch' in sys.modules)\n"
    )
    kept = {n: v for n, v in os.environ.items() if "proxy" not in n.lower()}
    environment = {
        **kept,
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "*",
    }
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, absent, torch_loaded = done.stdout.splitlines()
    path, fingerprint = found.split()
    assert sorted(f.name for f in Path(path).iterdir()) == sorted(FILES)
    assert fingerprint == ModelFolder(copy).fingerprint(tmp_path / "c2")
    assert absent.startswith("org/absent: cannot be had from the hub (")
    assert torch_loaded == "False"
    assert not [a for a in asked if a.endswith(".bin")]
