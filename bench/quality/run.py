"""Does it learn? A small comparison of methods on the demo's model and text: ``python -m bench quality``.

Every variant with something to train, PEFT's LoRA, PiSSA and DoRA, and full fine-tuning, with the same data, batches,
steps, optimiser and schedule, and for each a learning rate of its own from a small sweep. The sweep uses seed 0 and
chooses by the validation part; what is reported is the loss on the held-out part, which nothing was chosen by.

A finished run is a line of ``quality.jsonl``; a run that is there already is not made again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.common.result_provenance import environment
from bench.quality import step_time as quality_steps
from bench.quality.figure import quality_figure
from bench.quality.methods import BASE, EXTENSION, GRID, Method, methods, rate
from bench.quality.report import quality_markdown
from bench.quality.training import QualitySettings, Task, runner
from passes.errors import InputError
from surgery.support.progress_bar import track

Row = dict[str, Any]
Rows = dict[Task, Row]


def read(path: Path) -> list[Row]:
    """The recorded runs; a last line that was cut off while it was written is no run."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def task_of(row: Row) -> Task:
    """The task that a recorded run was."""
    return Task(Method(row["name"], row["family"], row["kind"], row["rank"]), row["seed"], row["rate"])


def settings_of(rows: list[Row]) -> QualitySettings:
    """The settings that all recorded runs share.

    Raises:
        InputError: they differ.
    """
    first = rows[0]["settings"]
    if other := next((row for row in rows if row["settings"] != first), None):
        raise InputError(f"runs with different settings in one file: {first} and {other['settings']}")
    return QualitySettings(**first)


def loss_of(row: Row) -> float:
    """What a learning rate is chosen by: the loss on the validation part; a run that diverged is the worst."""
    loss = row["validation_loss"]
    return math.inf if loss is None else float(loss)


def best(method: Method, tried: Iterable[int], rows: Rows) -> int:
    """The half decade of the lowest validation loss with seed 0; of equal ones the smallest."""
    return min(sorted(tried), key=lambda n: loss_of(rows[Task(method, 0, rate(n))]))


def grid(method: Method, rows: Rows) -> list[int]:
    """Half decades to try: the family's grid, and once that has been run and is best at an edge, those beyond."""
    tried = list(GRID[method.family])
    if all(Task(method, 0, rate(n)) in rows for n in tried):
        found = best(method, tried, rows)
        if found == tried[0]:
            tried = [tried[0] - n for n in range(EXTENSION, 0, -1)] + tried
        elif found == tried[-1]:
            tried += [tried[-1] + n for n in range(1, EXTENSION + 1)]
    return tried


def chosen(method: Method, rows: Rows) -> tuple[float, bool] | None:
    """The learning rate that the sweep chose, and whether it lies at the edge of what was tried; None if unfinished."""
    tried = grid(method, rows)
    if not all(Task(method, 0, rate(n)) in rows for n in tried):
        return None
    found = best(method, tried, rows)
    return rate(found), found in (tried[0], tried[-1])


def complete(
    settings: QualitySettings, compared: list[Method], path: Path, *, cache: Path | None = None, workers: int = 1
) -> None:
    """Make all runs that are not recorded yet: the sweep, its extension, and the other seeds at the chosen rates."""
    source = {**environment(), "threads": 1, "workers": workers}  # before a row is written, which changes the checkout
    recorded = read(path)
    if recorded and settings_of(recorded) != settings:
        raise InputError(f"{path} holds runs with other settings ({recorded[0]['settings']}); choose another --out")
    if others := {row["python"] for row in recorded} - {source["python"]}:  # the texts are those of its library
        raise InputError(f"{path} holds runs of Python {', '.join(sorted(others))}; choose another --out")
    rows = {task_of(row): row for row in recorded}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_text().endswith("\n"):  # the last line was cut off
        path.write_text("".join(json.dumps(row) + "\n" for row in recorded))

    def sweep() -> list[Task]:
        return [Task(method, 0, rate(n)) for method in compared for n in grid(method, rows)]

    def seeds() -> list[Task]:
        found = [(method, chosen(method, rows)) for method in compared]
        return [Task(m, seed, choice[0]) for m, choice in found if choice for seed in range(settings.seeds)]

    with runner(settings, cache, workers) as run_all:
        stages = (("the sweep", lambda: [Task(BASE, 0, None), *sweep()]), ("its extension", sweep), ("seeds", seeds))
        for name, tasks in stages:
            todo = [task for task in tasks() if task not in rows]
            for row in track(run_all(todo), name, enabled=bool(todo), total=len(todo)):
                row = {**row, "settings": asdict(settings), **source}
                rows[task_of(row)] = row
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def summary(recorded: list[Row]) -> list[Row]:
    """One row for each method that was run completely, the base first: the runs at its rate, and how that was found."""
    settings, rows = settings_of(recorded), {task_of(row): row for row in recorded}
    found = [{**asdict(BASE), "runs": [row], "rate": None, "at_edge": False} for row in recorded if _is_base(row)]
    for method in methods(settings.r):
        if not (choice := chosen(method, rows)):
            continue
        runs = [rows.get(Task(method, seed, choice[0])) for seed in range(settings.seeds)]
        if None not in runs:
            found.append({**asdict(method), "runs": runs, "rate": choice[0], "at_edge": choice[1]})
    return found


def _is_base(row: Row) -> bool:
    return bool(row["family"] == BASE.family)


def markdown(out: Path) -> str:
    """The table and the words of recorded runs.

    Raises:
        InputError: nothing is recorded.
    """
    recorded = read(out / "quality.jsonl")
    if not recorded:
        raise InputError(f"no runs in {out / 'quality.jsonl'}; run python -m bench quality first")
    steps = quality_steps.read(out / "quality_steps.json")
    return quality_markdown(summary(recorded), settings_of(recorded), recorded, steps)


def report(out: Path) -> str:
    """Write the table and the figure from the recorded runs, and return the table.

    Raises:
        InputError: nothing is recorded.
    """
    text = markdown(out)
    (out / "quality.md").write_text(text)
    quality_figure(summary(read(out / "quality.jsonl")), out / "quality.png")
    return text


def measure(
    settings: QualitySettings, names: Sequence[str] | None, out: Path, *, cache: Path | None = None, workers: int = 2
) -> None:
    """Make what runs are missing, and time the steps of their methods.

    Args:
        names: of methods, as the table names them; all by default.
        out: directory of the results.
        cache: folder of trained base models.
        workers: processes, each with one thread.

    Raises:
        InputError: there is no such method.
    """
    known = {method.name: method for method in methods(settings.r)}
    if unknown := sorted(set(names or ()) - set(known)):
        raise InputError(f"no method {unknown[0]!r}; there are {'; '.join(known)}")
    path = out / "quality.jsonl"
    complete(settings, [known[name] for name in names or known], path, cache=cache, workers=workers)
    quality_steps.complete(settings, summary(read(path)), out / "quality_steps.json", cache)
