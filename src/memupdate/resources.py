"""Where the files that travel with the package are: shipped policies and the embedded base model's folder.

Invariant: the same name finds the same files in an installed wheel (`memupdate/_data/<name>`) and in a checkout.
Nothing is read here.
"""

from __future__ import annotations

from pathlib import Path

from memupdate.errors import UsageError

_PACKAGE_DIR = Path(__file__).resolve().parent
_CHECKOUT_DIRS = {"policies": Path("policies"), "atlas": Path("examples") / "atlas"}


def resource_dir(name: str) -> Path:
    """Folder of the package data `name`: `policies` or `atlas`.

    Raises:
        ValueError: no such resource exists in any version of the package.
        UsageError: the installation lacks the folder.
    """
    if name not in _CHECKOUT_DIRS:
        raise ValueError(f"unknown resource: {name!r}")
    installed = _PACKAGE_DIR / "_data" / name
    if installed.is_dir():
        return installed
    checkout = _PACKAGE_DIR.parent.parent / _CHECKOUT_DIRS[name]
    if checkout.is_dir():
        return checkout
    raise UsageError(
        f"this installation of memupdate lacks its {name} files ({installed})",
        "install it again from a wheel, or run from a full checkout",
    )
