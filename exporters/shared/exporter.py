"""What a file in ``exporters/formats`` is: an :class:`Exporter`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Protocol, TypeVar, cast

from torch import nn

from exporters.shared.export_report import Exported
from exporters.shared.options import parse
from surgery.errors import ExportError

OptionsT = TypeVar("OptionsT", contravariant=True)
FORMATS = "exporters.formats"
ARGUMENTS = ("model", "path", "example_inputs", "options")


class Write(Protocol[OptionsT]):
    """Writes a model to a path that is free, and compares what can be loaded from it with the model."""

    def __call__(self, model: nn.Module, path: Path, example_inputs: object, options: OptionsT) -> Exported:
        """Write.

        Args:
            model: the user's own, which must not be changed: work on ``working_copy(model)``.
            path: a file that does not exist yet; an empty folder where ``DEFAULT_NAME`` is None.
            example_inputs: as the user gave them; None where none were given.
            options: an instance of the format's ``Options``.

        Raises:
            ExportError: the model cannot be written, or what was written differs from it.
        """
        ...


class Exporter(Protocol):
    """A format: a module that has these three names.

    Attributes:
        DEFAULT_NAME: of the file in a folder that a user names; None where the format is a folder.
        Options: a frozen dataclass, see :mod:`exporters.shared.options`.
        write: see :class:`Write`.
    """

    DEFAULT_NAME: str | None
    Options: type
    write: Write[object]


def formats() -> list[str]:
    """Names of the formats that there are: of the files in ``exporters/formats``."""
    found = (module.name for module in pkgutil.iter_modules(importlib.import_module(FORMATS).__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load_exporter(format: str) -> Exporter:
    """Import a format.

    Raises:
        TypeError: the module is no :class:`Exporter`; a mistake of whoever wrote it.
    """
    module = importlib.import_module(f"{FORMATS}.{format}")
    if missing := [part for part in ("DEFAULT_NAME", "Options", "write") if not hasattr(module, part)]:
        raise TypeError(f"{module.__name__} is no exporter: it has no {', '.join(missing)}")
    if not is_dataclass(module.Options) or not vars(module.Options)["__dataclass_params__"].frozen:
        raise TypeError(f"{module.__name__}.Options must be a frozen dataclass")
    if tuple(inspect.signature(module.write).parameters) != ARGUMENTS:
        raise TypeError(f"{module.__name__}.write must take {', '.join(ARGUMENTS)}")
    return cast(Exporter, module)


def parsed_options(format: str, given: Mapping[str, object]) -> tuple[Exporter, object]:
    """A format and its options, checked without a model.

    Raises:
        ExportError: the format or an option is unknown, or a value is not what it may be.
    """
    if not isinstance(format, str) or format not in formats():
        raise ExportError(f"unknown format {format!r:.80} (known: {', '.join(formats())})")
    exporter = load_exporter(format)
    return exporter, parse(exporter.Options, format, given)
