"""Frozen configurations: they check themselves, are written to files as plain values, and are found by their names."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from typing import ClassVar, TypeVar

from surgery.errors import VariantError
from surgery.support.untrusted_files import JsonObject

C = TypeVar("C", bound="Configuration")


@dataclass(frozen=True)
class Configuration:
    """A frozen dataclass of numbers, words and switches, each checked by name when the configuration is made."""

    name: ClassVar[str] = ""
    """The registered name; empty for a base class."""
    kind: ClassVar[str] = "configuration"
    """What it configures, for messages."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(field.default, bool) and not isinstance(getattr(self, field.name), bool):
                raise VariantError(f"{field.name} must be True or False, found {getattr(self, field.name)!r:.80}")

    def one_of(self, name: str, known: Sequence[str]) -> None:
        """Refuse a value of a field that is none of the known ones."""
        value = getattr(self, name)
        if not isinstance(value, str) or value not in known:
            raise VariantError(f"{name} must be one of {', '.join(known)}, found {value!r:.80}")

    def number(self, name: str, *, least: float, most: float = math.inf, whole: bool = False) -> None:
        """Refuse a value of a field that is not a number from ``least`` to ``most``."""
        value, kinds = getattr(self, name), (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most or value == math.inf:
            limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise VariantError(f"{name} must be {'an integer' if whole else 'a number'} {limits}, found {value!r:.80}")

    def hyperparameters(self) -> JsonObject:
        """All fields as plain values, for the adapter file."""
        return asdict(self)

    @classmethod
    def from_hyperparameters(cls: type[C], values: JsonObject) -> C:
        """The configuration that :meth:`hyperparameters` wrote.

        Raises:
            VariantError: a field is unknown or missing, or its value is wrong.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise VariantError(f"{cls.kind} {cls.name!r} has no hyper-parameter {', '.join(unknown)}")
        required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        if missing := sorted(required - set(values)):
            raise VariantError(f"{cls.kind} {cls.name!r} lacks the hyper-parameter {', '.join(missing)}")
        return cls(**values)


def named(registry: Mapping[str, type[C]], kind: str, name: str) -> type[C]:
    """The registered class of a name.

    Raises:
        VariantError: there is none; says which there are.
    """
    if name not in registry:
        near = get_close_matches(name, registry, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise VariantError(f"unknown {kind} {name!r:.80}{hint} (known: {', '.join(sorted(registry))})")
    return registry[name]


def configured(registry: Mapping[str, type[C]], base: type[C], given: object, defaults: object = None) -> C:
    """A configuration, from itself, its class, its registered name, or what :func:`as_entry` wrote.

    Args:
        base: the class that all in the registry derive from.
        defaults: of a name, an object whose attributes are taken for fields of the same name.

    Raises:
        VariantError: it is none of these, or the name is unknown.
    """
    if isinstance(given, type) and issubclass(given, base):
        given = given()
    elif isinstance(given, str):
        given = shared(named(registry, base.kind, given), defaults)
    elif isinstance(given, Mapping) and isinstance(given.get("name"), str):
        values = {key: value for key, value in given.items() if key != "name"}
        given = named(registry, base.kind, given["name"]).from_hyperparameters(values)
    if not isinstance(given, base):
        raise VariantError(
            f"{base.kind} must be a name ({', '.join(sorted(registry))}) or a configuration, not {type(given).__name__}"
        )
    return given


def shared(cls: type[C], values: object) -> C:
    """A configuration whose fields have the values of another one's fields of the same names."""
    own = {field.name for field in fields(values)} if isinstance(values, Configuration) else set()
    return cls(**{field.name: getattr(values, field.name) for field in fields(cls) if field.name in own})


def as_entry(configuration: Configuration) -> JsonObject:
    """The name and the fields of a configuration as plain values."""
    return {"name": configuration.name} | configuration.hyperparameters()


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, each of which registers what it defines; not the helpers, ``_name``."""
    for module in pkgutil.iter_modules(path):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")
