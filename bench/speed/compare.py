"""Two files of the speed matrix side by side: which cells got slower or faster by more than the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common.results_store import CELL, PLACE, SETTINGS, key, read
from passes.errors import InputError

NOTEWORTHY = 0.05  # smaller differences are not flagged
MEASURES = ("milliseconds", "ratio")


@dataclass(frozen=True)
class Change:
    """A cell in both files, with its place where there are several.

    The second's median over the first's, its range over the quartiles, and what it means.
    """

    cell: tuple[Any, ...]
    before: float
    after: float
    low: float
    high: float
    verdict: str  # "slower", "faster", "same", or "broken" where the second has no valid measurement

    @property
    def ratio(self) -> float:
        """The second's median over the first's."""
        return self.after / self.before


@dataclass(frozen=True)
class Comparison:
    """The cells of both files, those of one file alone, and where those of both were measured."""

    changes: list[Change]
    only_before: int
    only_after: int
    places: tuple[set[str], set[str]]

    @property
    def regressed(self) -> bool:
        """Whether a cell is slower, or no longer valid."""
        return any(change.verdict in ("slower", "broken") for change in self.changes)


def compare(before: Path, after: Path, measure: str = "milliseconds") -> Comparison:
    """Compare what two files have in common.

    Where a file has rows of several places, cells are compared within a place; where it has a cell several times even
    there, among those of the same seed and repeats.

    Args:
        measure: "milliseconds", or "ratio" for the ratios to the base, which leave the machine's speed out.

    Raises:
        InputError: a file is missing or no file of the speed matrix, or they have no cell in common.
    """
    for path in (before, after):
        if not path.is_file():
            raise InputError(f"there is no file {str(path)!r}")
    files = read(before), read(after)
    names = _names(files)
    old, new = ({key(row, names): row for row in rows} for rows in files)
    changes = [
        _change(cell, old[cell], new[cell], measure) for cell in old if cell in new and old[cell]["status"] == "ok"
    ]
    if not changes:
        raise InputError(
            f"{str(before)!r} ({len(old)} rows) and {str(after)!r} ({len(new)} rows) have no measured cell in common; "
            f"a cell is one {', '.join(names)}"
        )
    places = tuple(
        {f"{row['device']}, {row['threads']} threads" for cell, row in rows.items() if cell in old and cell in new}
        for rows in (old, new)
    )
    return Comparison(changes, len(set(old) - set(new)), len(set(new) - set(old)), (places[0], places[1]))


def _names(files: Sequence[list[dict[str, Any]]]) -> tuple[str, ...]:
    """What tells cells apart, so that none of a file's rows stands for another."""
    if any(len({key(row, PLACE) for row in rows}) > 1 for rows in files):
        names: tuple[str, ...] = (*CELL, *PLACE)
    else:
        names = CELL
    twice = any(len({key(row, names) for row in rows}) < len(rows) for rows in files)
    return (*names, *SETTINGS) if twice else names


def _change(cell: tuple[Any, ...], old: Mapping[str, Any], new: Mapping[str, Any], measure: str) -> Change:
    a = old[measure]
    if new["status"] != "ok":
        return Change(cell, a["median"], float("nan"), float("nan"), float("nan"), "broken")
    b = new[measure]
    ratio, verdict = b["median"] / a["median"], "same"
    if b["q1"] > a["q3"] and ratio > 1 + NOTEWORTHY:
        verdict = "slower"
    elif b["q3"] < a["q1"] and ratio < 1 / (1 + NOTEWORTHY):
        verdict = "faster"
    return Change(cell, a["median"], b["median"], b["q1"] / a["q3"], b["q3"] / a["q1"], verdict)


def told(found: Comparison, measure: str = "milliseconds") -> str:
    """The comparison as text, what changed most first."""
    unit, lines = " ms" if measure == "milliseconds" else "× base", []
    for change in sorted(found.changes, key=lambda c: (c.verdict == "same", c.verdict != "broken", -abs(c.ratio - 1))):
        name = ", ".join(map(str, change.cell))
        if change.verdict == "broken":
            lines.append(f"BROKEN  {name}: {change.before:.3f}{unit} before, now without a valid measurement")
        else:
            flag = change.verdict.upper() if change.verdict != "same" else ""
            lines.append(
                f"{flag:7} {name}: {change.ratio:.3f} ({change.low:.2f} to {change.high:.2f}), "
                f"{change.before:.3f} to {change.after:.3f}{unit}"
            )
    counts = {v: sum(c.verdict == v for c in found.changes) for v in ("slower", "faster", "broken", "same")}
    lines.append(", ".join(f"{n} {v}" for v, n in counts.items()) + f"; only in the first {found.only_before}, "
                 f"only in the second {found.only_after}")  # fmt: skip
    if found.places[0] != found.places[1]:
        lines.append(f"not measured in one place: {' / '.join(sorted(found.places[0]))} and "
                     f"{' / '.join(sorted(found.places[1]))}; milliseconds say little, use --by ratio")  # fmt: skip
    return "\n".join(lines)
