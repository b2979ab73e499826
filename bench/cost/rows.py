"""The rows of the cost report on disk, one JSON line each, so that a run can be taken up again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cost.worker import CostSettings
from passes.errors import InputError

SAME = ("commit", "python", "versions", "hardware", "threads")  # what a kept row must have been measured with


class SavedRows:
    """The file ``cost.jsonl``; every row is on disk, whole, as soon as it is put.

    Args:
        path: the file; its directory is made.
        keep: begin with the lines that are there, but for one that was cut off; else with none.

    Raises:
        InputError: the directory or the file cannot be made or read.
    """

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the directory {str(path.parent)!r}: {error}") from error
        try:
            text = path.read_text() if keep and path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {str(path)!r}: {error}") from error
        self.lines = [line for line in text.splitlines() if _is_json(line)]
        self._write()

    def finished(self, settings: CostSettings, source: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows without an error that have these settings, and were measured by this code on this machine.

        Args:
            source: as ``bench.common.result_provenance.environment`` gives it.
        """
        return [
            row
            for row in map(_row, self.lines)
            if "error" not in row
            and row.get("settings") == asdict(settings)
            and all(name in row and row[name] == source[name] for name in SAME)
        ]

    def put(self, row: dict[str, Any]) -> None:
        """Add a row in place of those of the same variant, settings and machine; all other lines stay.

        Raises:
            InputError: the file cannot be written; what was there is still there.
        """
        self.lines = [line for line in self.lines if not _replaces(row, _row(line))] + [json.dumps(row)]
        self._write()

    def _write(self) -> None:
        beside = self.path.with_name(f".{self.path.name}.part")
        try:
            beside.write_text("".join(line + "\n" for line in self.lines))
            os.replace(beside, self.path)
        except OSError as error:
            raise InputError(f"cannot write {str(self.path)!r}: {error}") from error


def device_in(row: dict[str, Any]) -> str | None:
    """Name of the device of a row; None if it failed before there was one."""
    return row["model"]["device"] if "model" in row else None


def _replaces(new: dict[str, Any], old: dict[str, Any]) -> bool:
    same = all(name in old and old[name] == new[name] for name in ("variant", "settings", "hardware"))
    return same and device_in(old) in (None, device_in(new))


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _row(line: str) -> dict[str, Any]:
    """A line as a row; whatever else was written there is one that says nothing."""
    found = json.loads(line)
    return found if isinstance(found, dict) else {}
