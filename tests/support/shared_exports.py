"""Exported files that several tests read: each is exported once in a run, by whichever process needs it first."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from exporters import ExportReport, export
from tests.support.zoo import SmallModel


class SharedExports:
    """Exports of one run, in a folder that all its processes see. Tests read the files, and write elsewhere."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def __call__(
        self, build: Callable[[str], SmallModel], name: str, mode: str = "merged", format: str = "onnx", **options: Any
    ) -> tuple[SmallModel, ExportReport]:
        """The model, built anew, and the report of its export.

        Args:
            build: gives the same model, bit for bit, whenever it is called.
            name: what it is given.
            mode, options: of the exporter; strings, numbers and flags.
            format: of the file.
        """
        model = build(name)
        kind = f"{build.__module__}.{build.__qualname__}"
        place = self.folder / "-".join(
            [kind, name, format, mode, *(f"{key}={options[key]}" for key in sorted(options))]
        )
        with FileLock(f"{place}.lock"):
            told = place.with_name(f"{place.name}.json")
            if not told.exists():
                path = place / f"m.{format}"
                report = export(model.model, format, path, mode=mode, example_inputs=model.inputs, **options)
                told.write_text(json.dumps(asdict(report), default=str))
        found = json.loads(told.read_text())
        paths = {"path": Path(found["path"]), "files": tuple(map(Path, found["files"]))}
        return model, ExportReport(**{**found, **paths})
