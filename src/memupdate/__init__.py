"""memupdate: new facts written into a deployed language model as LoRA, with a budget before and a proof after.

`from memupdate import Workspace` is the whole public API. Importing this package loads neither torch nor vllm;
`Workspace` is looked up when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memupdate.operations.workspace import Workspace

__version__ = "0.1.0"
__all__ = ["Workspace", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Workspace":
        from memupdate.operations.workspace import Workspace

        return Workspace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
