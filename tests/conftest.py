"""What all tests share: no hub, no telemetry, no display; tests marked `gpu` run only where an NVIDIA GPU answers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from memupdate.facts.model import Fact
    from memupdate.facts.render import Renderer
    from memupdate.models.base import BaseModel

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: tests share their cores with engines and processes of their own
for name in ("MEMUPDATE_WORKSPACE", "MEMUPDATE_DEBUG"):
    os.environ.pop(name, None)

settings.register_profile("untimed", deadline=None)  # no test is timed: machines that run tests are busy
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def atlas_base() -> Iterator[BaseModel]:
    """The embedded base model in float32 on the CPU, on GPU machines too: what is compared to 1e-5 wants one kind of arithmetic.

    Shared by all tests, so that it is loaded once; each must leave it as it was, and the end of the session checks it.
    """
    import torch

    from memupdate.models import base as models_base
    from memupdate.models.folder import EMBEDDED_MODEL, resolve_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models_base, "pick_device", lambda: torch.device("cpu"))
        base = models_base.load_base(resolve_model(EMBEDDED_MODEL), dtype="float32")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    yield base
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture(scope="session")
def atlas_renderer(atlas_base: BaseModel) -> Renderer:
    """Facts to token ids as the embedded model is asked: by chat."""
    from memupdate.facts.render import Renderer

    return Renderer(atlas_base.tokenizer, context=512)


@pytest.fixture(scope="session")
def news(repo_root: Path) -> list[Fact]:
    """Facts that the embedded model does not know."""
    return _atlas_facts(repo_root, "news-1.jsonl")


@pytest.fixture(scope="session")
def known(repo_root: Path) -> list[Fact]:
    """Facts that the embedded model was taught."""
    return _atlas_facts(repo_root, "known.jsonl")


def _atlas_facts(repo_root: Path, name: str) -> list[Fact]:
    from memupdate.facts.reader import read_facts

    return [located.fact for located in read_facts(repo_root / "examples" / "atlas" / name).facts]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


def _has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
