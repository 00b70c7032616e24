"""Says in words which values a policy key allows, read from the schema, so messages cannot drift from checks."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class FoundField:
    """A field of the schema and how many parts of the dotted key lead to it."""

    info: FieldInfo
    depth: int


def field_at(model: type[BaseModel], location: Sequence[int | str]) -> tuple[type[BaseModel], FoundField | None]:
    """The field that a pydantic error location points at, and the model that owns it (the innermost one reached)."""
    owner, found = model, None
    for depth, part in enumerate(location, start=1):
        info = owner.model_fields.get(str(part))
        if info is None:
            return owner, found
        found = FoundField(info, depth)
        if not (isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)):
            break
        owner = info.annotation
    return owner, found


def allowed_values(info: FieldInfo) -> str:
    """For example `a number greater than 0 and at most 1`."""
    kind = _kind(info.annotation)
    bounds = [text for item in info.metadata if (text := _bound(item))]
    return f"{kind} {' and '.join(bounds)}" if bounds else kind


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        kind, *metadata = get_args(annotation)
        bounds = [text for item in metadata for bound in getattr(item, "metadata", [item]) if (text := _bound(bound))]
        return f"{_kind(kind)} {' and '.join(bounds)}"
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(
            repr(value) if isinstance(value, str) else str(value) for value in get_args(annotation)
        )
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"a list of {_kind(get_args(annotation)[0]).replace('a table', 'tables', 1)}"
    if get_origin(annotation) is dict:
        return f"a table of keys, each with {_kind(get_args(annotation)[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a table with " + ", ".join(annotation.model_fields)
    return _NAMES.get(annotation, str(annotation))


def _bound(item: Any) -> str:
    match item:
        case Ge(ge=low):
            return f"at least {low}"
        case Gt(gt=low):
            return f"greater than {low}"
        case Le(le=high):
            return f"at most {high}"
        case Lt(lt=high):
            return f"less than {high}"
    pattern = getattr(item, "pattern", None)
    if pattern:
        return f"matching {pattern}"
    longest = getattr(item, "max_length", None)
    return f"of at most {longest} entries" if longest else ""
