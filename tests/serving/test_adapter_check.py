"""Adapter folders, good and hostile: only what was released, is a plain LoRA and fits the engine passes."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from serving_fixtures import BASE, SHAPES, entry_for, lora_tensors, sha256, write_adapter

from memupdate.serving import adapter_check as module
from memupdate.serving.adapter_check import AdapterError, AdapterInfo, check_adapter, read_tensor_shapes
from memupdate.serving.manifest import Manifest, with_release, with_retired, write_manifest
from memupdate.serving.vllm_plugin import ReleaseFinder

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
A = "base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"
B = "base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight"


def check(folder: Path, *, max_rank: int = 8, digest: str | None = None, **options: object) -> AdapterInfo:
    return check_adapter(
        folder,
        expected_digest=digest or sha256(folder / WEIGHTS),
        max_rank=max_rank,
        **options,  # type: ignore[arg-type]  # each test names options as check_adapter does
    )


def write_raw(path: Path, header: dict[str, object], data: bytes) -> None:
    """A safetensors file with any header."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def half_precision(folder: Path, dtype: str, bits: np.ndarray) -> None:
    """Replace the weights by one pair of `dtype` whose lora_A holds the given 16-bit patterns, shape (4, 16)."""
    a, b = bits.astype("<u2").tobytes(), np.zeros((24, 4), "<u2").tobytes()
    header = {
        A: {"dtype": dtype, "shape": [4, 16], "data_offsets": [0, len(a)]},
        B: {"dtype": dtype, "shape": [24, 4], "data_offsets": [len(a), len(a) + len(b)]},
    }
    write_raw(folder / WEIGHTS, header, a + b)


def test_a_good_adapter_passes_and_is_looked_at_once(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "acme@v1")
    (folder / "memupdate.json").write_text(json.dumps({"base_fingerprint": BASE}))
    (folder / "README.md").write_text("made by PEFT")
    shapes = {name + ".weight": shape for name, shape in SHAPES.items()}
    with patch.object(module, "_verdict", wraps=module._verdict) as verdict:
        for _ in range(3):
            info = check(folder, base_fingerprint=BASE, base_shapes=shapes, max_rank=4)
        assert verdict.call_count == 1
        assert (info.rank, info.target_modules, info.dtypes, info.modules) == (
            4,
            ("down_proj", "gate_proj"),
            ("F32",),
            2,
        )
        os.utime(folder / WEIGHTS, ns=(1, 1))
        check(folder, base_fingerprint=BASE, base_shapes=shapes, max_rank=4)
        assert verdict.call_count == 2


def test_a_swapped_digest_is_refused(tmp_path: Path) -> None:
    first, second = write_adapter(tmp_path / "a", seed=1), write_adapter(tmp_path / "b", seed=2)
    digest = sha256(first / WEIGHTS)
    check(first, digest=digest)
    with pytest.raises(AdapterError, match="has digest"):
        check(second, digest=digest)
    (first / WEIGHTS).write_bytes((second / WEIGHTS).read_bytes())
    with pytest.raises(AdapterError, match="has digest"):
        check(first, digest=digest)
    config = sha256(second / CONFIG)
    check(second, expected_config_digest=config)
    (second / CONFIG).write_text((second / CONFIG).read_text() + " ")
    with pytest.raises(AdapterError, match=r"adapter_config\.json has digest"):
        check(second, expected_config_digest=config)


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "evil.pkl", "tokenizer.py", "adapter_model.safetensors.index.json"]
)
def test_an_unexpected_file_beside_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / name).write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(AdapterError, match="unexpected file"):
        check(folder)


def test_links_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("{}")
    linked = write_adapter(tmp_path / "a")
    (linked / "memupdate.json").symlink_to(outside)
    with pytest.raises(AdapterError, match="no plain file"):
        check(linked)
    weights = write_adapter(tmp_path / "b")
    (weights / WEIGHTS).rename(tmp_path / "moved")
    (weights / WEIGHTS).symlink_to(tmp_path / "moved")
    with pytest.raises(AdapterError, match="no plain file"):
        check(weights)
    (tmp_path / "c").symlink_to(write_adapter(tmp_path / "real"))
    with pytest.raises(AdapterError, match="links are refused"):
        check(tmp_path / "c")
    nested = write_adapter(tmp_path / "d")
    (nested / "README.md").mkdir()
    with pytest.raises(AdapterError, match="no plain file"):
        check(nested)
    without = write_adapter(tmp_path / "e")
    (without / CONFIG).unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        check(without)
    with pytest.raises(AdapterError, match="cannot be read"):
        check(tmp_path / "nowhere", digest="sha256:0")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: type) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in lora_tensors(SHAPES, 4).items()}
    check(write_adapter(tmp_path / "good", tensors=tensors))
    tensors[B][3, 2] = value
    with pytest.raises(AdapterError, match="not finite"):
        check(write_adapter(tmp_path / "bad", tensors=tensors))


@settings(max_examples=60)
@given(pattern=st.integers(0, 0xFFFF), position=st.integers(0, 63))
def test_bfloat16_and_float16_are_judged_by_their_bits(
    tmp_path_factory: pytest.TempPathFactory, pattern: int, position: int
) -> None:
    bits = np.zeros(64, "<u2")
    bits[position] = pattern
    for dtype in ("BF16", "F16"):
        folder = write_adapter(tmp_path_factory.mktemp("bits") / "a", shapes={"model.layers.0.mlp.gate_proj": (24, 16)})
        half_precision(folder, dtype, bits)
        widened = (bits.astype("<u4") << 16).view("<f4") if dtype == "BF16" else bits.view("<f2")
        if np.isfinite(widened).all():
            assert check(folder).dtypes == (dtype,)
        else:
            with pytest.raises(AdapterError, match="not finite"):
                check(folder)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        (A, (5, 16), "not of rank 4"),
        (B, (24, 5), "not of rank 4"),
        (A, (4, 16, 1), "does not fit"),
        (A, (4, 0), "not of rank 4"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(tmp_path: Path, name: str, shape: tuple[int, ...], reason: str) -> None:
    tensors = lora_tensors(SHAPES, 4)
    tensors[name] = np.zeros(shape, np.float32)
    with pytest.raises(AdapterError, match=reason):
        check(write_adapter(tmp_path / "a", tensors=tensors))


def test_shapes_of_another_base_model_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    base = {name + ".weight": np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    save_file(base, str(model / "model.safetensors"))
    shapes = read_tensor_shapes(model)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (24, 16)
    folder = write_adapter(tmp_path / "good")
    check(folder, base_shapes=shapes)
    with pytest.raises(AdapterError, match=r"adapts a matrix of \[24, 16\], the base model has \[24, 8\]"):
        check(folder, base_shapes={**shapes, "model.layers.0.mlp.gate_proj.weight": (24, 8)})
    with pytest.raises(AdapterError, match="not a module of the base model"):
        check(
            write_adapter(tmp_path / "b", shapes={**SHAPES, "model.layers.9.mlp.up_proj": (8, 8)}), base_shapes=shapes
        )
    check(folder, base_shapes={"other.names.weight": (1, 1)})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4'"),
        ({"r": 64}, "rank 64 is above the engine's limit of 8"),
        ({"r": 8}, "not of rank 8"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"gate_proj": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"target_modules": "all-linear"}, "must be a list"),
        ({"target_modules": ["gate_proj"]}, "not among target_modules"),
        ({"target_modules": ["gate_proj", "down_proj", "up_proj"]}, "up_proj, which has no weights"),
        ({"target_modules": ["proj"]}, "not among target_modules"),
    ],
)
def test_configurations_that_the_engine_would_not_carry_out_are_refused(
    tmp_path: Path, config: dict[str, object], reason: str
) -> None:
    with pytest.raises(AdapterError, match=reason):
        check(write_adapter(tmp_path / "a", **config))  # type: ignore[arg-type]  # a wrong type is the point


def test_tensors_that_are_no_lora_pairs_are_refused(tmp_path: Path) -> None:
    tensors = lora_tensors(SHAPES, 4)
    single = {name: tensor for name, tensor in tensors.items() if name != B}
    with pytest.raises(AdapterError, match="come in pairs"):
        check(write_adapter(tmp_path / "single", tensors=single))
    extra = {**tensors, "base_model.model.model.embed_tokens.weight": np.zeros((4, 4), np.float32)}
    with pytest.raises(AdapterError, match="unexpected tensor"):
        check(write_adapter(tmp_path / "extra", tensors=extra))
    whole = {**tensors, A: np.zeros((4, 16), np.int32)}
    with pytest.raises(AdapterError, match="not a floating dtype"):
        check(write_adapter(tmp_path / "whole", tensors=whole))
    with pytest.raises(AdapterError, match="no tensors"):
        check(write_adapter(tmp_path / "none", tensors={}))


def test_headers_that_lie_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", shapes={"model.layers.0.mlp.gate_proj": (24, 16)})
    a = {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256]}
    b = {"dtype": "F32", "shape": [24, 4], "data_offsets": [256, 640]}
    write_raw(folder / WEIGHTS, {A: a, B: b}, bytes(640))
    check(folder)
    lies = {
        "gap or overlaps": {A: a, B: {**b, "data_offsets": [128, 512]}},
        "the file has": {A: a},
        "malformed": {A: a, B: {**b, "data_offsets": [256, -1]}},
        "does not fit": {A: {**a, "shape": [4, 1 << 40]}, B: b},
    }
    for reason, header in lies.items():
        write_raw(folder / WEIGHTS, header, bytes(640))
        with pytest.raises(AdapterError, match=reason):
            check(folder)
    content = (folder / WEIGHTS).read_bytes()
    for damaged, reason in (
        (content[:5], "cut off"),
        (struct.pack("<Q", 1 << 60) + content[8:], "claims"),
        (struct.pack("<Q", 4) + b"[[[[" + content[8:], "not JSON"),
        (pickle.dumps([1] * 100), "claims|not JSON"),
        (b"PK\x03\x04" + bytes(100), "claims|not JSON"),
    ):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(AdapterError, match=reason):
            check(folder)


@settings(max_examples=100)
@given(data=st.data())
def test_a_damaged_weights_file_is_refused_or_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = write_adapter(tmp_path_factory.mktemp("damaged") / "a")
    content = bytearray((folder / WEIGHTS).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position : position + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    (folder / WEIGHTS).write_bytes(bytes(content))
    try:
        info = check(folder)
    except AdapterError:
        return
    assert info.rank == 4
    assert info.dtypes == ("F32",)
    assert info.weights_bytes == len(content)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "memupdate.json").write_text(json.dumps({"base_fingerprint": "sha256:other"}))
    check(folder)
    with pytest.raises(AdapterError, match="made for base model sha256:other"):
        check(folder, base_fingerprint=BASE)


def test_the_finder_serves_only_what_the_manifest_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = write_adapter(tmp_path / "releases" / "acme@v1")
    retired = write_adapter(tmp_path / "releases" / "acme@v2", seed=2)
    write_adapter(tmp_path / "releases" / "acme@v3", seed=3)
    write_adapter(tmp_path / "outside", seed=4)
    foreign = write_adapter(tmp_path / "releases" / "acme@v5", seed=5)
    manifest = with_release(Manifest(BASE), "acme@v1", entry_for(good, 11))
    manifest = with_release(manifest, "acme@v5", entry_for(foreign, 13, base="sha256:other"))
    manifest = with_retired(with_release(manifest, "acme@v2", entry_for(retired, 12)), "acme@v2")
    finder = ReleaseFinder(tmp_path, max_rank=8)
    assert finder.find("acme@v1", "") is None
    write_manifest(tmp_path / "manifest.json", manifest)
    found = finder.find("acme@v1", "hub/model")
    assert found is not None
    assert (found[0].lora_int_id, found[1]) == (11, good)
    for name in ("acme@v2", "acme@v3", "acme@v5", "../outside", "acme@v1/../../outside", "acme@v1\n", "", "x" * 10**6):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert finder.find(name, "hub/model") is None
        assert len(caplog.records) == 1
        assert len(caplog.records[0].getMessage()) < 400
    assert ReleaseFinder(tmp_path, max_rank=2).find("acme@v1", "") is None
    assert ReleaseFinder(tmp_path, max_rank=8, base_fingerprint="sha256:x").find("acme@v1", "") is None
