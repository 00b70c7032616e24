"""Looks at an adapter folder before an engine may: files, digest, configuration, tensor names, shapes, dtypes, finite
values.

Invariant: a folder that passes is an ordinary LoRA of rank at most `max_rank`, byte for byte the one that was
released, with nothing in it that a loader would execute. Nothing is ever unpickled, and no tensor library is needed:
the safetensors header is JSON, and finite values are told by the exponent bits (numpy has no bfloat16).
This module knows nothing about vLLM or the manifest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import struct
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from memupdate.errors import EngineError
from memupdate.layout import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, MATCHER_FILE, RELEASE_FILE

ALLOWED_FILES = frozenset({ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, MATCHER_FILE, RELEASE_FILE, "README.md"})
"""All that a release folder may hold; PEFT writes the README."""

_EXPONENT_MASKS: dict[str, tuple[str, int]] = {
    # dtype: (how to view the bytes, exponent bits; all of them set means infinite or NaN)
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
}
_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 64 << 20
_CHUNK_BYTES = 4 << 20
_CACHE_ENTRIES = 256
_TENSOR_NAME = re.compile(r"(?P<module>[A-Za-z0-9_.]+)\.(?P<side>lora_A|lora_B)\.weight")
_PEFT_PREFIX = "base_model.model."
# What changes the meaning of an adapter in ways that vLLM does not carry out: each must be absent, null, false or
# empty.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
    "target_parameters",
    "trainable_token_indices",
    "fan_in_fan_out",
)
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterError(EngineError):
    """An adapter folder that no engine may load; the message says which file and why."""


@dataclass(frozen=True)
class AdapterInfo:
    """What a folder that passed holds."""

    rank: int
    target_modules: tuple[str, ...]
    """Last parts of the adapted modules' names, sorted, for example `("down_proj", "gate_proj", "up_proj")`."""
    dtypes: tuple[str, ...]
    """As safetensors names them, for example `("F32",)`."""
    modules: int
    """How many matrices are adapted."""
    weights_bytes: int
    digest: str


def check_adapter(
    folder: Path,
    *,
    expected_digest: str,
    max_rank: int,
    base_fingerprint: str | None = None,
    base_shapes: Mapping[str, tuple[int, ...]] | None = None,
    expected_config_digest: str | None = None,
) -> AdapterInfo:
    """Check everything about `folder` that can be told without the base model's weights.

    Results, good and bad, are remembered by what `stat` says of the folder's files, so a repeated call costs
    microseconds.

    Args:
        expected_digest: `sha256:…` of the weights file.
        max_rank: the engine's limit.
        base_fingerprint: where given, and where the folder's `memupdate.json` names one, the two must agree.
        base_shapes: where given (`read_tensor_shapes`), each adapted module must be a matrix of the base model of
        fitting size
            (not looked at where the checkpoint's names have nothing in common with the adapter's).
        expected_config_digest: `sha256:…` of `adapter_config.json`; not looked at where None.

    Raises:
        AdapterError: with the first reason found.
    """
    try:
        shapes_key = None if base_shapes is None else hash(frozenset(base_shapes.items()))
        key = (_fingerprint(folder), expected_digest, max_rank, base_fingerprint, expected_config_digest, shapes_key)
        known = _CACHE.get(key)
        if known is None:
            known = _verdict(folder, expected_digest, max_rank, base_fingerprint, base_shapes, expected_config_digest)
            _CACHE.put(key, known)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder}: cannot be read ({error})") from error
    if isinstance(known, str):
        raise AdapterError(known, "publish the release again from the workspace that made it")
    return known


def read_tensor_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of the floating-point tensors of a model folder, from its safetensors headers; empty where it has
    none.

    Quantized tensors are left out: their stored shape is not the matrix's.

    Raises:
        AdapterError: a header is malformed.
        OSError: a file cannot be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            try:
                header, _ = _read_header(file, path.stat().st_size)
            except _Refused as refused:
                raise AdapterError(f"{path}: {refused}") from refused
        shapes.update({name: tensor.shape for name, tensor in header.items() if tensor.dtype in _EXPONENT_MASKS})
    return shapes


class _Refused(Exception):
    """A reason to refuse, without the path; only inside this module."""


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class _Cache:
    """The last `_CACHE_ENTRIES` verdicts: an `AdapterInfo`, or the reason for refusing."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Any, AdapterInfo | str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> AdapterInfo | str | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Any, verdict: AdapterInfo | str) -> None:
        with self._lock:
            self._entries[key] = verdict
            while len(self._entries) > _CACHE_ENTRIES:
                self._entries.popitem(last=False)


_CACHE = _Cache()


def _fingerprint(folder: Path) -> tuple[Any, ...]:
    """What `lstat` says of the folder and everything in it: path, mtime_ns, size, inode, kind."""
    entries = [(str(folder), *_status(os.lstat(folder)))]
    with os.scandir(folder) as found:
        entries += sorted((entry.name, *_status(entry.stat(follow_symlinks=False))) for entry in found)
    return tuple(entries)


def _status(status: os.stat_result) -> tuple[int, int, int, int]:
    return (status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode)


def _verdict(
    folder: Path,
    expected_digest: str,
    max_rank: int,
    base_fingerprint: str | None,
    base_shapes: Mapping[str, tuple[int, ...]] | None,
    expected_config_digest: str | None,
) -> AdapterInfo | str:
    try:
        _check_files(folder)
        if base_fingerprint is not None:
            _check_base(folder / RELEASE_FILE, base_fingerprint)
        config = _check_config(folder / ADAPTER_CONFIG_FILE, max_rank, expected_config_digest)
        return _check_weights(folder / ADAPTER_WEIGHTS_FILE, expected_digest, config, base_shapes)
    except _Refused as refused:
        return f"{folder}: {refused}"


def _check_files(folder: Path) -> None:
    """Only expected plain files, no links, no folders, nothing that a loader might unpickle or execute."""
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        raise _Refused("not a folder (links are refused)")
    names = set()
    for entry in os.scandir(folder):
        if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            raise _Refused(f"{entry.name!r} is no plain file (links and folders are refused)")
        if entry.name not in ALLOWED_FILES:
            raise _Refused(f"unexpected file {entry.name!r}")
        names.add(entry.name)
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE):
        if name not in names:
            raise _Refused(f"{name} is missing")


def _open(path: Path) -> BinaryIO:
    """Open without following a link that was put there since `_check_files`."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")


def _read_json(path: Path) -> tuple[dict[str, Any], bytes]:
    with _open(path) as file:
        content = file.read(_MAX_CONFIG_BYTES + 1)
    if len(content) > _MAX_CONFIG_BYTES:
        raise _Refused(f"{path.name} is larger than {_MAX_CONFIG_BYTES} bytes")
    try:
        value = json.loads(content, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"{path.name} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise _Refused(f"{path.name} holds no object")
    return value, content


def _check_base(path: Path, base_fingerprint: str) -> None:
    if not path.exists():
        return
    found = _read_json(path)[0].get("base_fingerprint")
    if found is not None and found != base_fingerprint:
        raise _Refused(f"made for base model {found}, the engine serves {base_fingerprint}")


@dataclass(frozen=True)
class _Config:
    rank: int
    target_modules: tuple[str, ...]


def _check_config(path: Path, max_rank: int, expected_digest: str | None) -> _Config:
    value, content = _read_json(path)
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    if expected_digest is not None and digest != expected_digest:
        raise _Refused(f"{path.name} has digest {digest}, the manifest says {expected_digest}")
    if value.get("peft_type") != "LORA":
        raise _Refused(f"{path.name}: peft_type is {value.get('peft_type')!r}, only LORA is served")
    rank = value.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise _Refused(f"{path.name}: r is {rank!r}")
    if rank > max_rank:
        raise _Refused(f"{path.name}: rank {rank} is above the engine's limit of {max_rank}")
    alpha = value.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise _Refused(f"{path.name}: lora_alpha is {alpha!r}")
    if value.get("bias", "none") != "none":
        raise _Refused(f"{path.name}: bias is {value['bias']!r}, only 'none' is served")
    for name in _UNSUPPORTED:
        if value.get(name):
            raise _Refused(f"{path.name}: {name} is not supported by the engine")
    if value.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise _Refused(f"{path.name}: init_lora_weights {value['init_lora_weights']!r} changes the base model")
    targets = value.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
        raise _Refused(f"{path.name}: target_modules must be a list of module names")
    return _Config(rank, tuple(sorted(set(targets))))


def _check_weights(
    path: Path, expected_digest: str, config: _Config, base_shapes: Mapping[str, tuple[int, ...]] | None
) -> AdapterInfo:
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Before the digest: what is far larger than such an adapter can be is not read through.
        header, data_start = _read_header(file, size)
        modules = _check_tensors(header, config)
        if base_shapes:
            _check_base_shapes(modules, base_shapes)
        file.seek(0)
        digest = _digest(file)
        if digest != expected_digest:
            raise _Refused(f"{path.name} has digest {digest}, the manifest says {expected_digest}")
        for name, tensor in header.items():
            _check_finite(file, name, tensor, data_start)
    return AdapterInfo(
        rank=config.rank,
        target_modules=tuple(sorted({module.rsplit(".", 1)[-1] for module in modules})),
        dtypes=tuple(sorted({tensor.dtype for tensor in header.values()})),
        modules=len(modules),
        weights_bytes=size,
        digest=digest,
    )


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return "sha256:" + digest.hexdigest()


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, _Tensor], int]:
    """The tensors of a safetensors file and where their data starts. No gaps, no overlaps: the format demands it."""
    file.seek(0)
    prefix = file.read(8)
    if len(prefix) < 8:
        raise _Refused("the weights file is cut off before its header")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise _Refused(f"the header claims {length} bytes of a file of {size}")
    try:
        value = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"the header of the weights file is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise _Refused("the header of the weights file holds no object")
    value.pop("__metadata__", None)
    tensors = {name: _parse_tensor(name, entry) for name, entry in value.items()}
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            raise _Refused(f"the data of {name!r} leaves a gap or overlaps another tensor")
        position = tensor.end
    if 8 + length + position != size:
        raise _Refused(f"the header describes {8 + length + position} bytes, the file has {size}")
    return tensors, 8 + length


def _parse_tensor(name: str, entry: Any) -> _Tensor:
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, *offsets]
        if not isinstance(dtype, str) or len(offsets) != 2 or len(shape) > 8:
            raise ValueError
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise _Refused(f"malformed header entry for {name!r}") from None
    return _Tensor(dtype, tuple(shape), offsets[0], offsets[1])


def _check_tensors(header: Mapping[str, _Tensor], config: _Config) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each module: pairs of lora_A (r, d_in) and lora_B (d_out, r) for `target_modules`."""
    sides: dict[str, dict[str, _Tensor]] = {}
    for name, tensor in header.items():
        matched = _TENSOR_NAME.fullmatch(name)
        if matched is None:
            raise _Refused(f"unexpected tensor {name!r}")
        if tensor.dtype not in _EXPONENT_MASKS:
            raise _Refused(f"{name}: dtype {tensor.dtype} is not a floating dtype that is served")
        item_bytes = np.dtype(_EXPONENT_MASKS[tensor.dtype][0]).itemsize
        if len(tensor.shape) != 2 or math.prod(tensor.shape) * item_bytes != tensor.end - tensor.start:
            raise _Refused(f"{name}: shape {list(tensor.shape)} does not fit its data")
        sides.setdefault(matched["module"].removeprefix(_PEFT_PREFIX), {})[matched["side"]] = tensor
    if not sides:
        raise _Refused("the weights file holds no tensors")
    modules = {module: _pair_shape(module, pair, config.rank) for module, pair in sides.items()}
    used = {target for target in config.target_modules for module in modules if _targets(target, module)}
    for module in modules:
        if not any(_targets(target, module) for target in config.target_modules):
            raise _Refused(f"{module} has weights but is not among target_modules")
    if missing := sorted(set(config.target_modules) - used):
        raise _Refused(f"target_modules names {missing[0]}, which has no weights")
    return modules


def _pair_shape(module: str, pair: Mapping[str, _Tensor], rank: int) -> tuple[int, int]:
    if set(pair) != {"lora_A", "lora_B"}:
        raise _Refused(f"{module}: lora_A and lora_B must come in pairs")
    a, b = pair["lora_A"].shape, pair["lora_B"].shape
    if a[0] != rank or b[1] != rank or 0 in a or 0 in b:
        raise _Refused(f"{module}: lora_A {list(a)} and lora_B {list(b)} are not of rank {rank}")
    return b[0], a[1]


def _targets(target: str, module: str) -> bool:
    """PEFT's rule for a list: the whole name, or its end after a dot."""
    return module == target or module.endswith("." + target)


def _check_base_shapes(modules: Mapping[str, tuple[int, int]], base_shapes: Mapping[str, tuple[int, ...]]) -> None:
    if not any(module + ".weight" in base_shapes for module in modules):
        return  # Checkpoint and module names differ (as for some multimodal or quantized models): nothing to compare.
    for module, shape in modules.items():
        base = base_shapes.get(module + ".weight")
        if base is None:
            raise _Refused(f"{module} is not a module of the base model")
        if base != shape:
            raise _Refused(f"{module}: adapts a matrix of {list(shape)}, the base model has {list(base)}")


def _check_finite(file: BinaryIO, name: str, tensor: _Tensor, data_start: int) -> None:
    view, mask = _EXPONENT_MASKS[tensor.dtype]
    file.seek(data_start + tensor.start)
    remaining = tensor.end - tensor.start
    while remaining:
        chunk = file.read(min(remaining, _CHUNK_BYTES))
        if not chunk:
            raise _Refused("the weights file was cut off while it was read")
        remaining -= len(chunk)
        exponents = np.frombuffer(chunk, dtype=view) & np.array(mask, dtype=view)
        if bool((exponents == mask).any()):
            raise _Refused(f"{name} holds a value that is not finite")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value
