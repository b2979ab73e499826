"""Options of an export format: one frozen dataclass, whose fields say all that there is to say of them.

Help, type, default and validation are read from the fields; so are the flags of ``surgery export``::

    @dataclass(frozen=True)
    class Options:
        mode: Literal["merged", "live"] = option("merged", "keep the adapter in the program, or merge it")
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Literal, TypeVar

from surgery.errors import ExportError

T = TypeVar("T")
NAMES: dict[object, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "None",
}
FLAGS = (bool, int, float, str)


def option(default: T, help: str) -> T:
    """A field of an options dataclass.

    Args:
        help: what it is for, in a few words without a full stop.
    """
    return field(default=default, metadata={"help": help})  # type: ignore[return-value]  # dataclasses lie so too


@dataclass(frozen=True)
class Flag:
    """An option as a command line may give it.

    Attributes:
        kind: the type of its value.
        help: what it is for, with its choices and its default.
    """

    name: str
    kind: type
    help: str


def parse(kind: type[T], format: str, given: Mapping[str, object]) -> T:
    """Make the options of a format from keywords.

    Raises:
        ExportError: an option is unknown or missing, or a value is not what it may be; says what is known or may be.
    """
    types_of = typing.get_type_hints(kind)
    known = fields(kind)  # type: ignore[arg-type]
    if unknown := sorted(set(given) - {one.name for one in known}):
        listed = ", ".join(one.name for one in known)
        raise ExportError(f"format {format!r} has no option {', '.join(unknown)} (known: {listed or 'none'})")
    if missing := [one.name for one in known if _is_required(one) and one.name not in given]:
        raise ExportError(f"format {format!r} needs the option {missing[0]}")
    for name, value in given.items():
        if not _fits(value, types_of[name]):
            raise ExportError(f"{name} must be {_expected(types_of[name])}; found {value!r:.80}")
    return kind(**given)


def flags(kind: type) -> list[Flag]:
    """The options that a command line can give: names, numbers, texts and switches."""
    types_of = typing.get_type_hints(kind)
    found = []
    for one in fields(kind):
        simple = [(typed, member) for member in _members(types_of[one.name]) if (typed := _simple(member))]
        if not simple:
            continue
        kind_of_flag, member = simple[-1]
        choices = "" if len(values := typing.get_args(member)) < 2 else f": {', '.join(map(str, values))}"
        default = "" if one.default in (None, False, MISSING) else f" (default: {one.default})"
        help = f"{one.metadata.get('help', one.name)}{choices}{default}."
        found.append(Flag(one.name, kind_of_flag, help))
    return found


def _is_required(one: Field[object]) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _members(kind: object) -> tuple[object, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def _simple(kind: object) -> type | None:
    """The type of a flag for values of a type, or None where a command line cannot give them."""
    if typing.get_origin(kind) is Literal:
        return type(typing.get_args(kind)[0])
    return kind if kind in FLAGS else None  # type: ignore[return-value]


def _fits(value: object, kind: object) -> bool:
    if len(members := _members(kind)) > 1:
        return any(_fits(value, member) for member in members)
    if typing.get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(kind) or kind)  # type: ignore[arg-type]


def _expected(kind: object) -> str:
    if len(members := _members(kind)) > 1:
        return " or ".join(_expected(member) for member in members)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return f"{'one of ' if len(choices) > 1 else ''}{', '.join(map(repr, choices))}"
    bare = typing.get_origin(kind) or kind
    return NAMES[bare] if bare in NAMES else f"a {getattr(bare, '__name__', bare)}"
