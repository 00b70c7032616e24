"""The plug-in that vLLM loads: a LoRA resolver that serves releases of a memupdate registry by name.

Entry point `memupdate` in the group `vllm.general_plugins`. vLLM calls `register` in every one of its processes;
without `MEMUPDATE_REGISTRY` it does nothing. Invariant: vLLM is handed a folder only if the name matches the release
grammar, the manifest lists it as released, and `check_adapter` passed; everything else is answered with None, which
vLLM turns into a 404. The resolver never raises: an exception here would become a 500 for the client.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memupdate.layout import RELEASE_PATTERN, RegistryLayout
from memupdate.serving.adapter_check import AdapterError, check_adapter, read_tensor_shapes
from memupdate.serving.compat import is_supported, supported_range
from memupdate.serving.env import BASE_FINGERPRINT_ENV, MAX_RANK_ENV, REGISTRY_ENV
from memupdate.serving.manifest import RELEASED, ReleaseEntry, manifest_cache
from memupdate.serving.metrics import serving_metrics

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

RESOLVER_NAME = "memupdate"
_DEFAULT_MAX_RANK = 512
"""The largest that vLLM can be started with; the engine's own limit comes by `MEMUPDATE_MAX_LORA_RANK`."""
_MAX_LOGGED_NAME = 80
_THREADS = 4


class ReleaseFinder:
    """Looks releases up in a registry, without vLLM: what the resolver does, so that it can be tested alone."""

    def __init__(self, registry: Path, *, max_rank: int, base_fingerprint: str | None = None) -> None:
        self._layout = RegistryLayout(registry)
        self._manifest = manifest_cache(self._layout.manifest)
        self._max_rank = max_rank
        self._base_fingerprint = base_fingerprint
        self._log = _logger()

    def find(self, name: str, base_model: str) -> tuple[ReleaseEntry, Path] | None:
        """The manifest's entry and the checked folder of release `name`; None, with one log line, where it cannot be
        served.

        Args:
            base_model: what vLLM was started with; a local folder makes shapes be checked against it. Reads files:
            call it in a thread.
        """
        try:
            with serving_metrics().resolve.time():
                return self._find(name, base_model)
        except AdapterError as error:
            self._log.error("refused %s: %s", name, error.message)
        except Exception:
            self._log.exception("refused %s: unexpected error", _shown(name))
        serving_metrics().refusals.labels("adapter").inc()
        return None

    def _find(self, name: str, base_model: str) -> tuple[ReleaseEntry, Path] | None:
        if RELEASE_PATTERN.fullmatch(name) is None:
            self._log.info("not a release name: %s", _shown(name))
            return None
        manifest = self._manifest.get()
        if manifest is None:
            self._log.warning("cannot look up %s: no manifest at %s", name, self._layout.manifest)
            return None
        entry = manifest.releases.get(name)
        if entry is None or entry.state != RELEASED:
            self._log.info("%s is %s", name, "unknown" if entry is None else entry.state)
            return None
        base = self._base_fingerprint or manifest.base_fingerprint
        if entry.base_fingerprint != base:
            raise AdapterError(f"made for base model {entry.base_fingerprint}, the engine serves {base}")
        folder = self._layout.release(name)
        check_adapter(
            folder,
            expected_digest=entry.digest,
            expected_config_digest=entry.config_digest,
            base_fingerprint=base,
            max_rank=self._max_rank,
            base_shapes=_base_shapes(base_model),
        )
        return entry, folder


def register() -> None:
    """Register the resolver with vLLM, if `MEMUPDATE_REGISTRY` is set. May be called more than once.

    Never raises: vLLM would not start. What is wrong is logged; the engine then serves its base model and no release.
    """
    registry = os.environ.get(REGISTRY_ENV)
    if not registry:
        return
    try:
        _register(Path(registry))
    except Exception:
        _logger().exception(
            "the resolver could not be registered: every request for a release will be answered with 404. "
            "Install vLLM %s, or a memupdate made for this one, and start the engine again",
            supported_range(),
        )


def _register(registry: Path) -> None:
    import vllm
    from vllm.lora.resolver import LoRAResolverRegistry

    if RESOLVER_NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    if not is_supported(vllm.__version__):
        # `serve` refuses to start it; an operator's own vLLM, or an image, comes without `serve`.
        _logger().warning(
            "memupdate was not tried with vLLM %s: releases may not load, and routes that are new in it stay closed. "
            "Install vLLM %s, or a memupdate made for %s",
            vllm.__version__,
            supported_range(),
            vllm.__version__,
        )
    finder = ReleaseFinder(
        registry, max_rank=_max_rank_from_env(), base_fingerprint=os.environ.get(BASE_FINGERPRINT_ENV) or None
    )
    LoRAResolverRegistry.register_resolver(RESOLVER_NAME, _resolver(finder))


def _resolver(finder: ReleaseFinder) -> Any:
    """An instance of vLLM's `LoRAResolver`; the class is made here because its base class needs vllm."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    # Threads of its own: a registry that hangs must not take those that vLLM and its other users of the loop share.
    threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="memupdate-resolver")

    class MemupdateResolver(LoRAResolver):  # type: ignore[misc, unused-ignore]  # vllm is not analysed: its class is Any
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            # Digest and values are read from disk: not on the event loop, which streams other clients' answers.
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(threads, finder.find, lora_name, base_model_name)
            if found is None:
                return None
            entry, folder = found
            # vLLM 0.32 puts a counter of its own in place of the id; the name is what it caches by.
            return LoRARequest(lora_name=lora_name, lora_int_id=entry.lora_int_id, lora_path=str(folder.resolve()))

    return MemupdateResolver()


@lru_cache(maxsize=8)
def _base_shapes(base_model: str) -> Mapping[str, tuple[int, ...]] | None:
    """Shapes of a local base model's tensors; None where it is not a folder or has no readable safetensors."""
    folder = Path(base_model)
    try:
        return (read_tensor_shapes(folder) or None) if folder.is_dir() else None
    except (AdapterError, OSError) as error:
        _logger().warning("shapes are not checked against the base model: %s", error)
        return None


def _max_rank_from_env() -> int:
    try:
        return int(os.environ[MAX_RANK_ENV])
    except (KeyError, ValueError):
        return _DEFAULT_MAX_RANK


def _shown(name: str) -> str:
    """A name from a request, safe for one log line."""
    return repr(name[:_MAX_LOGGED_NAME]) + ("…" if len(name) > _MAX_LOGGED_NAME else "")


@lru_cache(maxsize=1)
def _logger() -> logging.Logger:
    """A logger that shows up in vLLM's log: children of `vllm` share its handler and format."""
    return logging.getLogger("vllm.memupdate")
