"""The container files copy what is there, build on what they made before, and start what vLLM's own command line takes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.containerfile import Copy, Run, Setting, Stage, Variables, context_files, read_stages
from memupdate.serving.compat import engine_installed

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "deploy" / "Dockerfile", ROOT / "deploy" / "Dockerfile.cpu"]
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


@pytest.fixture(params=FILES, ids=lambda file: file.name)
def stages(request: pytest.FixtureRequest) -> list[Stage]:
    return read_stages(request.param)


@each_file
def test_the_build_is_sent_what_the_wheel_is_made_of(file: Path) -> None:
    sent = {path.as_posix() for path in context_files(ROOT, file.with_name(file.name + ".dockerignore"))}
    needed = subprocess.run(
        ["git", "ls-files", "pyproject.toml", "LICENSE", "README.md", "src", "policies", "examples", "tools", "requirements"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    assert "pyproject.toml" in needed or not (ROOT / ".git").exists()
    assert set(needed) <= sent
    assert not [path for path in sent if path.startswith((".git/", ".venv/", "build/")) or "__pycache__" in path]


def test_what_is_copied_and_mounted_is_there(stages: list[Stage]) -> None:
    for number, stage in enumerate(stages):
        earlier = {other.name: other for other in stages[:number]}
        for step in stage.steps:
            if isinstance(step, Copy) and step.stage is None:
                assert all((ROOT / source).exists() for source in step.sources)
            named = [(step.stage, step.sources[0])] if isinstance(step, Copy) and step.stage else []
            named += [(mount.stage, mount.source) for mount in step.mounts] if isinstance(step, Run) else []
            for name, source in named:
                commands = " ".join(run.command for run in earlier[name].steps if isinstance(run, Run))
                assert source in commands, "the earlier stage makes it"


def test_the_shell_understands_every_line(stages: list[Stage]) -> None:
    for stage in stages:
        for step in stage.steps:
            if isinstance(step, Run):
                read = subprocess.run(["sh", "-n", "-c", step.command], capture_output=True, text=True, check=False)
                assert read.returncode == 0, read.stderr


def test_images_end_without_rights_and_with_what_the_resolver_needs(stages: list[Stage]) -> None:
    last = stages[-1]
    assert last.steps.index(Setting("USER", "10001")) > max(
        number for number, step in enumerate(last.steps) if isinstance(step, Run)
    ), "nothing is done as root after it, and all before it"
    values = {k: v for step in last.steps if isinstance(step, Variables) for k, v in step.values.items()}
    assert values["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    users = [step.command for step in last.steps if isinstance(step, Run) and "useradd" in step.command]
    assert [Path(values["HOME"]).name in command.split() for command in users] == [True]


def test_both_images_start_alike() -> None:
    one, other = (read_stages(file)[-1] for file in FILES)
    for name in ("ENTRYPOINT", "EXPOSE", "USER"):
        assert one.setting(name) == other.setting(name)


@pytest.mark.parametrize(
    "line", ["HEALTHCHECK CMD true", "RUN --mount=type=cache,target=/x true", "ENV --x=1 A=b", "ADD a b"]
)
def test_what_is_not_understood_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM a\n{line}\n")
    with pytest.raises(ValueError, match=r"not understood|with flags"):
        read_stages(tmp_path / "Dockerfile")


@pytest.mark.slow
@pytest.mark.skipif(engine_installed() is None, reason="vLLM is not installed")
def test_vllm_takes_the_arguments_of_the_manifest() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (deployment,) = [
        document
        for document in yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "engine.yaml").read_text("utf-8"))
        if document["kind"] == "Deployment"
    ]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    taken = make_arg_parser(FlexibleArgumentParser()).parse_args(container["args"])
    assert (taken.model, taken.host, taken.port, taken.dtype) == ("/models/base", "0.0.0.0", 8000, "bfloat16")
    assert taken.enable_lora
    assert (taken.max_lora_rank, taken.max_loras, taken.max_cpu_loras) == (32, 3, 4)
    assert "lm_head" not in taken.lora_target_modules
