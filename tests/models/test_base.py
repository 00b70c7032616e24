"""Loading weights: the embedded model as it is, and every broken folder as one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memupdate.errors import ExitCode, ModelError
from memupdate.models.base import BaseModel, load_base, pick_dtype
from memupdate.models.folder import resolve_model

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def copy(tmp_path: Path, repo_root: Path) -> Path:
    """The embedded model in a folder that may be broken."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (*MODEL_FILES, "chat_template.jinja"):
        shutil.copy(repo_root / "examples" / "atlas" / name, folder / name)
    return folder


def set_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def drop_a_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.3." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def test_the_model_is_frozen_and_in_evaluation_mode(atlas_base: BaseModel) -> None:
    assert not atlas_base.model.training
    assert not any(p.requires_grad for p in atlas_base.model.parameters())
    assert {p.dtype for p in atlas_base.model.parameters()} == {torch.float32}
    assert atlas_base.model.num_parameters() == 3_606_784
    assert len(atlas_base.tokenizer) == atlas_base.model.config.vocab_size


def test_dtypes() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (pick_dtype("auto", cpu), pick_dtype("auto", cuda)) == (torch.float32, torch.bfloat16)
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert load_base(resolve_model("atlas"), dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "breakage",
    [
        pytest.param(cut_weights, id="weights cut off"),
        pytest.param(lambda d: (d / "model.safetensors").write_bytes(b"not a model " * 9), id="weights are no weights"),
        pytest.param(drop_a_layer, id="a layer is missing"),
        pytest.param(lambda d: set_config(d, num_hidden_layers=5), id="config of a deeper model"),
        pytest.param(lambda d: set_config(d, intermediate_size=700), id="config of another size"),
        pytest.param(lambda d: set_config(d, hidden_size="wide"), id="config with a text for a number"),
        pytest.param(lambda d: set_config(d, model_type="lama"), id="unknown kind of model"),
        pytest.param(lambda d: (d / "tokenizer.json").unlink(), id="tokenizer is missing"),
        pytest.param(lambda d: (d / "tokenizer.json").write_text('{"a":'), id="tokenizer is broken"),
        pytest.param(lambda d: (d / "tokenizer.json").write_text("{}"), id="tokenizer is empty"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_broken_folder_is_one_clear_line(copy: Path, breakage: Callable[[Path], object]) -> None:
    breakage(copy)
    with pytest.raises(ModelError) as caught:
        load_base(resolve_model(str(copy)), dtype="float32")
    assert caught.value.exit_code == ExitCode.UNREACHABLE == 6
    assert caught.value.message.startswith(f"{copy}: ")
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_an_unbroken_copy_loads(copy: Path, atlas_base: BaseModel) -> None:
    """So that the test above fails for the reason it names."""
    loaded = load_base(resolve_model(str(copy)), dtype="float32")
    expected = atlas_base.model.state_dict()
    assert all(torch.equal(t.cpu(), expected[n]) for n, t in loaded.model.state_dict().items())
