"""A base model as a folder: where it is, what identifies it, how many tokens a text has. Torch-free, so that plans start at once.

Invariant: two folders with the same fingerprint give the same logits. Nothing here loads weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memupdate.errors import ModelError
from memupdate.resources import resource_dir
from memupdate.storage import canonical_json, file_sha256, text_sha256, write_text_atomic

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EMBEDDED_MODEL = "atlas"
"""Name under which the embedded base model is asked for."""
_ENCODE_BATCH = 4096
"""Texts that the tokenizer takes at a time."""


@dataclass(frozen=True)
class ModelFolder:
    """A local folder in the Hugging Face layout: config.json, tokenizer.json, *.safetensors."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. Raises ModelError where it is missing or broken."""
        return _read_json(self.path / "config.json")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The fast tokenizer, without transformers. Raises ModelError."""
        from tokenizers import Tokenizer

        file = self.path / "tokenizer.json"
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception for a missing or broken file
            raise ModelError(
                f"{file}: no fast tokenizer can be read ({error})", "convert the tokenizer to tokenizer.json"
            ) from error

    @cached_property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer carries a chat template, in a file of its own or in tokenizer_config.json."""
        if (self.path / "chat_template.jinja").is_file() or (self.path / "chat_template.json").is_file():
            return True
        file = self.path / "tokenizer_config.json"
        return file.is_file() and bool(_read_json(file).get("chat_template"))

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files of the weights, sorted. Raises ModelError where there is none."""
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"{self.path}: no *.safetensors weights", "memupdate reads safetensors only; convert the model first"
            )
        return files

    def count_tokens(self, text: str) -> int:
        """Number of tokens of `text`, without special tokens."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def token_texts(self, texts: Iterable[str]) -> Iterator[tuple[str, ...]]:
        """The tokens of each text, each as the text that it stands for, led by a blank where it follows one."""
        remaining = iter(texts)
        while chunk := list(islice(remaining, _ENCODE_BATCH)):
            for text, encoded in zip(chunk, self.tokenizer.encode_batch(chunk, add_special_tokens=False), strict=True):
                yield tuple(
                    (" " if start > 0 and text[start - 1].isspace() else "") + text[start:end]
                    for start, end in encoded.offsets
                )

    def fingerprint(self, cache_dir: Path) -> str:
        """`sha256:…` over configuration, tokenizer and weights; digests of large files are kept in `cache_dir`."""
        names = [
            self.path / n for n in ("config.json", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json")
        ]
        files = [n for n in names if n.is_file()] + self.weight_files
        cache = cache_dir / "digests.json"
        known: dict[str, str] = json.loads(cache.read_text()) if cache.is_file() else {}
        digests = {}
        for file in files:
            stat = os.stat(file)
            stamp = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
            if stamp not in known:
                known[stamp] = file_sha256(file)
                write_text_atomic(cache, canonical_json(known))
            digests[file.name] = known[stamp]
        return text_sha256(canonical_json(digests))


def resolve_model(model: str) -> ModelFolder:
    """The folder of `model`: the embedded one by name, a local path, or a snapshot of a hub repository (downloaded if need be).

    Raises:
        ModelError: neither a folder with a config.json nor a repository that the hub (or its local cache) has.
    """
    if model == EMBEDDED_MODEL:
        folder = ModelFolder(resource_dir(EMBEDDED_MODEL))
    elif Path(model).expanduser().exists() or model.startswith(("/", "./", "../", "~")) or model.count("/") != 1:
        folder = ModelFolder(Path(model).expanduser().resolve())
    else:
        folder = ModelFolder(_hub_snapshot(model))
    if not folder.path.is_dir():
        raise ModelError(
            f"{model}: no such folder", "give the path of a model folder or a hub repository such as Qwen/Qwen3-0.6B"
        )
    if folder.config and folder.weight_files:
        return folder
    raise ModelError(f"{folder.path}: empty config.json", "download the model again")


def _hub_snapshot(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds, from requests to its own
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "check the name and the network, or download it and give the folder"
        raise ModelError(f"{repository}: cannot be had from the hub ({first_line})", hint) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file}: not there", "give a folder in the Hugging Face layout") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({error})", "download the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: not a JSON object", "download the model again")
    return value
