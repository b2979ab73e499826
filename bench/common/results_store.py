"""Results as JSON lines, one for each cell or point, so that a run can be taken up again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from passes.errors import InputError

CELL = ("config", "layers", "dtype", "r", "tokens", "runtime", "contender", "shape")  # what is measured
PLACE = ("device", "threads")  # where
SETTINGS = ("seed", "repeats")  # how
SAME = ("versions", "cell_seconds", "backend")  # what a row that is kept has in common with a new one
FINISHED = ("ok", "wrong")  # a cell that failed, or whose contender was not installed, is tried again


def key(row: dict[str, Any], names: Iterable[str] = (*CELL, *PLACE, *SETTINGS)) -> tuple[Any, ...]:
    """What tells a row from others."""
    return tuple(row[name] for name in names)


def lines(path: Path, names: Iterable[str], command: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none if there is no file.

    Args:
        names: what every row has.
        command: what writes such files.

    Raises:
        InputError: a line is no such row.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{str(path)!r}, line {number}: not JSON ({error}); was the file cut short?") from error
        missing = [name for name in names if not isinstance(row, dict) or name not in row]
        if missing:
            raise InputError(f"{str(path)!r}, line {number}: no row of `{command}`, it lacks {', '.join(missing)}")
        rows.append(row)
    return rows


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of the speed matrix in a file; none if there is no file.

    Raises:
        InputError: a line is no row of the speed matrix.
    """
    rows = lines(path, (*CELL, *PLACE, *SETTINGS, "status"), "python -m bench speed")
    for number, row in enumerate(rows, start=1):
        if row["status"] == "ok" and not {"milliseconds", "ratio"} <= set(row):
            raise InputError(f"{str(path)!r}, line {number}: a measured row without milliseconds and ratio")
    return rows


class Store:
    """A file of rows. Each row is on disk, whole, as soon as it is put; one of the same key gives way to it.

    Args:
        found: the rows that are there.
        names: that make the key.
    """

    def __init__(
        self, path: Path, found: Iterable[dict[str, Any]], names: Sequence[str] = (*CELL, *PLACE, *SETTINGS)
    ) -> None:
        self.path, self.names = path, names
        self.rows = {key(row, names): row for row in found}

    def __contains__(self, row: dict[str, Any]) -> bool:
        """Whether there is a row of this key."""
        return key(row, self.names) in self.rows

    def finished(self, row: dict[str, Any]) -> bool:
        """Whether the cell was measured like this: with these settings, packages and time; the commit may differ."""
        kept = self.rows.get(key(row, self.names))
        return kept is not None and kept["status"] in FINISHED and all(kept.get(n) == row.get(n) for n in SAME)

    def put(self, row: dict[str, Any]) -> None:
        """Add a row and write the file."""
        self.rows[key(row, self.names)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.part")
        beside.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))
        os.replace(beside, self.path)
