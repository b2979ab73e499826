"""Exponents and figures of how costs grow, from recorded points."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.common.number_format import number
from bench.common.results_store import key
from bench.common.timing import power
from bench.scaling.passes import summary
from bench.scaling.run import CURVES, Row, read

Rows = Sequence[Mapping[str, Any]]
NOTHING = "No points yet: `python -m bench scaling` measures them.\n"
PASSES = "graph passes"


class Line(NamedTuple):
    """One line of a figure.

    Attributes:
        x, y: sizes, and milliseconds (of what is added to the base, where there is one).
        low, high: quartiles.
        ratio: to the base, at the largest size; None without a base.
        expected: exponent that FLOPs say; None where there is one point.
    """

    axis: str
    name: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]
    ratio: float | None
    expected: float | None


def point(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Milliseconds of a row with quartiles: what is added to the base's, where it has a base."""
    if "ratio" not in row:
        ms = row["milliseconds"]
        return ms["median"], ms["q1"], ms["q3"]
    base = row["base_milliseconds"]["median"]
    middle, low, high = (base * (row["ratio"][name] - 1) for name in ("median", "q1", "q3"))
    return middle, low, high


def is_told(row: Mapping[str, Any]) -> bool:
    """Whether a median exceeds the base's by two standard errors, for which the quartiles of normal samples stand."""
    ratio = row.get("ratio")
    if ratio is None:
        return True
    error = math.sqrt(math.pi / 2 / ratio["n"]) * (ratio["q3"] - ratio["q1"]) / 1.349
    return bool(ratio["median"] - 1 > 2 * error)


def groups(rows: Rows) -> list[tuple[tuple[Any, ...], list[Mapping[str, Any]]]]:
    """Rows by where and how they were measured."""
    names = ("device", "threads", "seed", "repeats")
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(key(dict(row), names), []).append(row)
    return sorted(found.items(), key=lambda item: tuple(map(str, item[0])))


def lines_of(rows: Rows, passes: dict[str, Any] | None = None) -> list[Line]:
    """The lines of all figures; a point whose median is not told from the base is left out.

    Args:
        rows: of one group.
    """
    found = []
    for axis, curve in CURVES.items():
        for name, expected in curve.expected.items():
            mine = sorted((r for r in rows if (r["axis"], r["line"]) == (axis, name)), key=lambda r: r["x"])
            if told := [row for row in mine if is_told(row)]:
                x, (y, low, high) = [row["x"] for row in told], zip(*map(point, told), strict=True)
                last = told[-1].get("ratio")
                if expected is None and len(x) > 1:
                    expected = power(x, [row["flops"][0] - sum(row["flops"][1:]) for row in told])[0]
                found.append(Line(axis, name, x, [*y], [*low], [*high], last["median"] if last else None, expected))
    for row in summary(passes) if passes else []:
        nodes = [float(n) for n in row["per_1000_nodes_ms"]]
        ms = [n * per / 1000 for n, per in zip(nodes, row["per_1000_nodes_ms"].values(), strict=True)]
        found.append(Line(PASSES, row["pass"], nodes, ms, ms, ms, None, 1.0))
    return found


def title(axis: str) -> str:
    """What is varied, in words."""
    if axis == PASSES:
        return "nodes of a graph"
    return f"{CURVES[axis].label} (calibration)" if axis.startswith("calibration") else CURVES[axis].label


def markdown(rows: Rows, passes: dict[str, Any] | None = None) -> str:
    """The exponents as a table for each machine and setting."""
    return "\n".join(_table(of, found, _theirs(of, passes)) for of, found in groups(rows)) or NOTHING


def _theirs(of: tuple[Any, ...], passes: dict[str, Any] | None) -> dict[str, Any] | None:
    """The passes, where they were timed on the machine of a group."""
    return passes if passes and passes["hardware"] == of[0] else None


def _table(of: tuple[Any, ...], rows: Rows, passes: dict[str, Any] | None) -> str:
    device, threads, _, repeats = of
    table = [
        f"{device}; {threads} threads, at most {repeats} pairs (factorisation and calibration: one thread, a third as "
        "many runs in turn).",
        "",
        "| varied | cost | from … to | milliseconds | over the base at the last | exponent, of all | of the last two "
        "| FLOPs say |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for line in lines_of(rows, passes):
        ends = f"{line.x[0]:,.0f} to {line.x[-1]:,.0f} ({len(line.x)} points)"
        cells = [title(line.axis), line.name, ends, f"{number(line.y[0])} to {number(line.y[-1])}"]
        cells.append("" if line.ratio is None else f"{line.ratio:.2f}×")
        if len(line.x) > 1:
            slope, error = power(line.x, line.y)
            cells += [f"{slope:.2f}" + (f" ± {error:.2f}" if error is not None else "")]
            cells += [f"{power(line.x[-2:], line.y[-2:])[0]:.2f}"]
        else:
            cells += ["", ""]
        table.append("| " + " | ".join([*cells, "" if line.expected is None else f"{line.expected:.2f}"]) + " |")
    return "\n".join(table) + "\n"


def figure(rows: Rows, path: Path, passes: dict[str, Any] | None = None) -> None:
    """Draw every line on logarithmic axes, a panel for each size that is varied.

    Args:
        rows: the first group of them is drawn.
        path: the PNG to write.
    """
    from bench.common.figures import BLUE, INK, MUTED, ORANGE, plt

    of, first = groups(rows)[0]
    found = lines_of(first, _theirs(of, passes))
    if not found:
        return
    axes = list(dict.fromkeys(line.axis for line in found))
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED}
    colors = (BLUE, ORANGE, INK, MUTED, "#059669")
    with plt.rc_context(style):
        columns = min(4, len(axes))
        height = math.ceil(len(axes) / columns)
        drawn, panels = plt.subplots(
            height, columns, figsize=(3.7 * columns, 3.2 * height), squeeze=False, constrained_layout=True
        )
        for panel in panels.flat[len(axes) :]:
            panel.set_axis_off()
        for axis, panel in zip(axes, panels.flat, strict=False):
            lines = [line for line in found if line.axis == axis]
            added = any(line.ratio is not None for line in lines)
            for line, color in zip(lines, colors, strict=False):
                reach = [[a - b for a, b in zip(line.y, line.low, strict=True)],
                         [b - a for a, b in zip(line.y, line.high, strict=True)]]  # fmt: skip
                slope = f", exponent {power(line.x, line.y)[0]:.2f}" if len(line.x) > 1 else ""
                panel.errorbar(line.x, line.y, reach, fmt="o-", ms=3.5, lw=1.3, color=color, label=line.name + slope)
            panel.set(xscale="log", yscale="log", xlabel="nodes of the base" if axis == PASSES else CURVES[axis].label)
            panel.set_xscale("log", base=2)
            sizes = sorted({x for line in lines for x in line.x})
            panel.set_xticks(sizes, [f"{x:,.0f}" for x in sizes])
            panel.minorticks_off()
            panel.set_title(axis.partition(",")[0], fontsize=9.5)
            panel.set_ylabel("ms, adapters: added to the base's" if added else "ms", fontsize=8.5)
            panel.legend(frameon=False, fontsize=7.5)
        drawn.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(drawn)


def passes_of(folder: Path) -> dict[str, Any] | None:
    """The recorded run of the passes, which has a curve of its own."""
    path = folder / "passes.json"
    return json.loads(path.read_text()) if path.exists() else None  # type: ignore[no-any-return]


def write(folder: Path) -> str:
    """Write the table and the figure beside the data, and return the table."""
    rows: list[Row] = read(folder / "scaling.jsonl")
    text = markdown(rows, passes_of(folder))
    (folder / "scaling.md").write_text(text)
    if rows:
        figure(rows, folder / "scaling.png", passes_of(folder))
    return text
