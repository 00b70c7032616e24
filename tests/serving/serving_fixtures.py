"""What the serving tests share: tiny real adapters in PEFT's format, and manifests that name them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from memupdate.layout import RegistryLayout
from memupdate.serving.manifest import Manifest, ReleaseEntry, with_release

BASE = "sha256:" + "b" * 64
SHAPES = {
    "model.layers.0.mlp.gate_proj": (24, 16),
    "model.layers.0.mlp.down_proj": (16, 24),
}
"""Adapted module → (d_out, d_in)."""


def sha256(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def lora_tensors(
    shapes: Mapping[str, tuple[int, int]], rank: int, *, seed: int = 0, size: float = 0.1
) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tensors = {}
    for module, (d_out, d_in) in shapes.items():
        for side, shape in (("lora_A", (rank, d_in)), ("lora_B", (d_out, rank))):
            values = random.normal(0, size, shape).astype(np.float32)
            tensors[f"base_model.model.{module}.{side}.weight"] = values
    return tensors


def lora_config(shapes: Mapping[str, tuple[int, int]], rank: int, **changes: object) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in shapes}),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
        **changes,
    }


def write_adapter(
    folder: Path,
    *,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    rank: int = 4,
    seed: int = 0,
    size: float = 0.1,
    tensors: Mapping[str, np.ndarray] | None = None,
    **config: object,
) -> Path:
    """A PEFT adapter folder."""
    folder.mkdir(parents=True)
    values = dict(tensors) if tensors is not None else lora_tensors(shapes, rank, seed=seed, size=size)
    save_file(values, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps(lora_config(shapes, rank, **config)))
    return folder


def entry_for(folder: Path, lora_int_id: int, *, rank: int = 4, base: str = BASE) -> ReleaseEntry:
    return ReleaseEntry(
        digest=sha256(folder / "adapter_model.safetensors"),
        config_digest=sha256(folder / "adapter_config.json"),
        rank=rank,
        lora_int_id=lora_int_id,
        base_fingerprint=base,
    )


def add_release(
    registry: Path,
    manifest: Manifest,
    name: str,
    *,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    rank: int = 4,
    seed: int = 0,
    size: float = 0.1,
) -> Manifest:
    """Write an adapter into the registry; the manifest that names it."""
    folder = write_adapter(RegistryLayout(registry).release(name), shapes=shapes, rank=rank, seed=seed, size=size)
    entry = entry_for(folder, manifest.next_lora_int_id(), rank=rank, base=manifest.base_fingerprint)
    return with_release(manifest, name, entry)
