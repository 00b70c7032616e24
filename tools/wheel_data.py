"""Build hook: puts the policies and the embedded base model into the wheel, under `memupdate/_data/`.

An editable install gets nothing here: it reads both from the checkout, so there is never an old copy beside the new.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = {"policies": "memupdate/_data/policies", "examples/atlas": "memupdate/_data/atlas"}
SUFFIXES = {".toml", ".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".md"}
NEEDED = (
    "policies/standard.toml",
    "policies/atlas.toml",
    "examples/atlas/model.safetensors",
    "examples/atlas/config.json",
)
MODEL_LIMIT_BYTES = 12_000_000
"""What the embedded model may weigh, so that the wheel stays quick to fetch."""


class WheelDataHook(BuildHookInterface):
    """Adds the data files to a standard wheel; refuses to build one that could not run the demo."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        root = Path(self.root)
        missing = [name for name in NEEDED if not (root / name).is_file()]
        if missing:
            raise FileNotFoundError(f"the wheel needs {', '.join(missing)}")
        size_bytes = (root / "examples/atlas/model.safetensors").stat().st_size
        if size_bytes > MODEL_LIMIT_BYTES:
            raise ValueError(
                f"examples/atlas/model.safetensors has {size_bytes} bytes; the limit is {MODEL_LIMIT_BYTES}"
            )
        for folder, target in FOLDERS.items():
            for file in sorted((root / folder).rglob("*")):
                if file.is_file() and file.suffix in SUFFIXES:
                    build_data["force_include"][str(file)] = f"{target}/{file.relative_to(root / folder).as_posix()}"
