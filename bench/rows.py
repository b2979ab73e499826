"""Results of the speed matrix as JSON lines, one for each cell, so that a run can be taken up again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from passes.errors import InputError

CELL = ("config", "layers", "dtype", "r", "tokens", "runtime", "contender", "shape")  # what is measured
PLACE = ("device", "threads")  # where
SETTINGS = ("seed", "repeats")  # how
FINISHED = ("ok", "wrong")  # a cell that failed, or whose contender was not installed, is tried again


def key(row: dict[str, Any], names: Iterable[str] = (*CELL, *PLACE, *SETTINGS)) -> tuple[Any, ...]:
    """What tells a row from others."""
    return tuple(row[name] for name in names)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if there is no file.

    Raises:
        InputError: a line is no row of the speed matrix.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{str(path)!r}, line {number}: not JSON ({error}); was the file cut short?") from error
        missing = [n for n in (*CELL, *PLACE, *SETTINGS, "status") if not isinstance(row, dict) or n not in row]
        if missing:
            raise InputError(
                f"{str(path)!r}, line {number}: no row of `python -m bench speed`, it lacks {', '.join(missing)}"
            )
        if row["status"] == "ok" and not {"milliseconds", "ratio"} <= set(row):
            raise InputError(f"{str(path)!r}, line {number}: a measured row without milliseconds and ratio")
        rows.append(row)
    return rows


class Store:
    """A file of rows. Each row is on disk, whole, as soon as it is put; one of the same cell gives way to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = {key(row): row for row in read(path)}

    def finished(self, row: dict[str, Any]) -> bool:
        """Whether the cell was measured with these settings."""
        return self.rows.get(key(row), {}).get("status") in FINISHED

    def put(self, row: dict[str, Any]) -> None:
        """Add a row and write the file."""
        self.rows[key(row)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.part")
        beside.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))
        os.replace(beside, self.path)
