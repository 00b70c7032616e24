"""The formats that facts come in, ours and those that plug-ins add.

Invariant: the built-in formats are asked first and in a fixed order, so that no plug-in changes how a file is read that could be read
without it. A new format is a `RecordFormat` in `FORMATS`, or an entry point of the group `memupdate.fact_formats`; nothing else changes.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Any, cast

from memupdate.errors import FactsError
from memupdate.facts.formats.base import RecordFormat, RecordProblems
from memupdate.facts.formats.chat import ChatFormat
from memupdate.facts.formats.dated import DyKnowEditFormat, DyKnowFormat
from memupdate.facts.formats.editing import (
    CounterFactFormat,
    FlatCounterFactFormat,
    HalluEditFormat,
    KnowEditFormat,
    ZsreFormat,
)
from memupdate.facts.formats.native import NATIVE, LongTextFormat, PassageFormat, PhoneBookFormat, native_record
from memupdate.facts.formats.pararel import ParaRelFormat

__all__ = ["FORMATS", "NATIVE", "PLUGIN_GROUP", "RecordFormat", "RecordProblems", "all_formats", "detect_format"]
__all__ += ["find_format", "format_named", "native_record"]

PLUGIN_GROUP = "memupdate.fact_formats"
"""Entry point group; each value is an instance of a `RecordFormat`, or a class that makes one without arguments."""

FORMATS: tuple[RecordFormat, ...] = (
    NATIVE,
    PhoneBookFormat(),
    PassageFormat(),
    LongTextFormat(),
    ChatFormat(),
    CounterFactFormat(),
    KnowEditFormat(),
    FlatCounterFactFormat(),
    ZsreFormat(),
    HalluEditFormat(),
    DyKnowEditFormat(),
    ParaRelFormat(),
    DyKnowFormat(),
)
"""Built in, in order of detection."""


@cache
def all_formats() -> tuple[RecordFormat, ...]:
    """The built-in formats, then those of installed plug-ins by name.

    Raises:
        FactsError: a plug-in cannot be loaded, or takes a name that is taken.
    """
    known = {built_in.name: built_in for built_in in FORMATS}
    for entry in sorted(metadata.entry_points(group=PLUGIN_GROUP), key=lambda entry: entry.name):
        plugin = _load(entry)
        if plugin.name in known:
            raise FactsError(
                f"the plug-in {entry.value} offers the format {plugin.name}, which is there already",
                "uninstall it, or give its format another name",
            )
        known[plugin.name] = plugin
    return tuple(known.values())


def _load(entry: metadata.EntryPoint) -> RecordFormat:
    try:
        offered = entry.load()
        plugin = offered() if isinstance(offered, type) else offered
    except Exception as error:  # whatever a stranger's module does when imported
        raise FactsError(
            f"the format plug-in {entry.name} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}",
            "reinstall or uninstall the package that offers it",
        ) from error
    missing = [name for name in ("name", "summary", "detect", "parse") if not hasattr(plugin, name)]
    if missing:
        raise FactsError(
            f"the format plug-in {entry.name} ({entry.value}) has no {', '.join(missing)}", "see docs/formats.md"
        )
    return cast("RecordFormat", plugin)


def find_format(record: Any) -> RecordFormat | None:
    """The first format whose keys `record` has, or None."""
    return next((known for known in all_formats() if known.detect(record)), None)


def detect_format(record: Any) -> RecordFormat:
    """The first format whose keys `record` has; else the native one, whose messages say what is missing."""
    return find_format(record) or NATIVE


def format_named(name: str) -> RecordFormat:
    """A format by its name. Raises FactsError, which lists the names."""
    for known in all_formats():
        if known.name == name:
            return known
    raise FactsError(f"{name}: no such format of facts", f"known: {', '.join(k.name for k in all_formats())}")
