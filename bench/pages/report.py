"""Tables and figures from everything that was measured, and the pages that show them.

A page holds a table between ``<!-- NAME table: FILE -->`` and ``<!-- end -->``; the file is made from recorded data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.common import results_store as rows
from bench.speed import report as speed_report

PAGES = ("docs/performance.md", "bench/README.md")
MARKED = re.compile(r"(<!-- [\w-]+ table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
RESULTS = "bench/results"
SPEED = ("speed", "gpu/speed")


def _quality(folder: Path) -> str:
    from bench.quality import run as quality

    quality.report(folder)
    return "quality.png"


def _scaling(folder: Path) -> str:
    from bench.scaling import report as scaling_report

    scaling_report.write(folder)
    return "scaling.png"


def _cost(folder: Path) -> str:
    from bench.cost import figure as cost_figure
    from bench.cost import table as cost_table

    data = json.loads((folder / "cost.json").read_text())
    cost_figure.cost_figure(data["records"], cost_table.heading(data["rows"]), folder / "cost.png")
    return "cost.png"


FIGURES = {"cost.json": _cost, "quality.jsonl": _quality, "scaling.jsonl": _scaling}


def tables(root: Path) -> Iterator[tuple[str, str]]:
    """Every table that can be made from the data that is there: its file, from the root, and what it should hold."""
    from bench.cost import table as cost_table
    from bench.micro import factors, fused, lowerings
    from bench.pages import targets
    from bench.quality import run as quality
    from bench.scaling import report as scaling_report
    from bench.scaling import run as scaling

    folder = root / RESULTS
    made: dict[str, Callable[[Path], str]] = {
        "cost.json": lambda path: cost_table.markdown(json.loads(path.read_text())["rows"]),
        "lowerings.jsonl": lambda path: lowerings.markdown(lowerings.read(path)),
        "fuse.jsonl": lambda path: fused.markdown(fused.read(path)),
        "factors.json": lambda path: factors.markdown(json.loads(path.read_text())),
        "passes.json": _passes,
        "quality.jsonl": lambda path: quality.markdown(path.parent),
        "scaling.jsonl": lambda path: scaling_report.markdown(
            scaling.read(path), scaling_report.passes_of(path.parent)
        ),
    }
    for name, make in made.items():
        if (folder / name).exists():
            yield f"{RESULTS}/{name.partition('.')[0]}.md", make(folder / name)
    yield f"{RESULTS}/targets.md", targets.markdown(folder)
    for name in SPEED:
        yield f"{RESULTS}/{name}.md", speed_report.markdown(rows.read(folder / f"{name}.jsonl"))


def _passes(path: Path) -> str:
    from bench.scaling import passes

    data = json.loads(path.read_text())
    return passes.markdown(passes.summary(data), data["trace_milliseconds"])


def filled(page: str, contents: dict[str, str]) -> str:
    """A page with its tables as they should be; tables of other files stay what they are."""

    def fill(match: re.Match[str]) -> str:
        opening, name, old, end = match.groups()
        return f"{opening}{contents[name].strip()}\n{end}" if name in contents else f"{opening}{old}{end}"

    return MARKED.sub(fill, page)


def check(root: Path = Path()) -> list[str]:
    """Tables and pages that do not show the recorded data."""
    made = dict(tables(root))
    stale = [name for name, text in made.items() if not (root / name).exists() or (root / name).read_text() != text]
    for name in PAGES:
        page = (root / name).read_text()
        if filled(page, made | _shown(root, page, made)) != page:
            stale.append(name)
    return stale


def write(root: Path = Path()) -> list[Path]:
    """Write all tables, figures and pages anew; returns what was written."""
    written, made = [], dict(tables(root))
    for name, text in made.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        written.append(root / name)
    for name in SPEED:
        for number, (_, found) in enumerate(speed_report.groups(rows.read(root / RESULTS / f"{name}.jsonl"))):
            path = root / RESULTS / f"{name}{'' if number == 0 else f'-{number + 1}'}.png"
            speed_report.figure(found, path)
            written.append(path)
    folder = root / RESULTS
    written += [folder / draw(folder) for name, draw in FIGURES.items() if (folder / name).exists()]
    for name in PAGES:
        page = (root / name).read_text()
        (root / name).write_text(filled(page, made | _shown(root, page, made)))
        written.append(root / name)
    return written


def _shown(root: Path, page: str, made: dict[str, str]) -> dict[str, str]:
    """Tables that a page shows and that other programs wrote, such as the demo's."""
    names = {match.group(2) for match in MARKED.finditer(page)} - set(made)
    return {name: (root / name).read_text() for name in names if (root / name).exists()}
