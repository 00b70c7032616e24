"""The images are built line by line, and the manifests' job and engine are run in them: `make test-slow` where that can be done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.cluster_run import FACTS
from memupdate.serving.compat import is_cpu_engine

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `cluster_run` saw."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("apt-get") is None:
        pytest.skip("needs root, unshare and apt-get")
    if not is_cpu_engine():
        pytest.skip("the image for machines without a GPU is run")
    work = tmp_path_factory.mktemp("cluster")
    command = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
        sys.executable,
        "-m",
        "deploy.cluster_run",
    ]
    done = subprocess.run([*command, str(work)], cwd=TESTS, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    shutil.rmtree(work)
    assert done.returncode == 0
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.endurance
@pytest.mark.timeout(3600)
def test_the_images_and_manifests_do_what_the_docs_say(seen: dict[str, Any]) -> None:
    assert seen["gpu_image_moved"] == [], "what the official image holds stays as it is"
    assert seen["gpu_image_user"] == "10001"
    assert (seen["job_workspace"], seen["job_add"]) == (0, 0)
    assert (seen["publish"], seen["doctor"]) == (0, 0)
    assert seen["answers"] == [["acme@v1", True]] * FACTS
    assert seen["admin_route"] == 403
    assert seen["engine_code"] == 0
