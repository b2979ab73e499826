"""The cost report: ``surgery cost MODEL``, every variant beside the base and full fine-tuning.

Each row comes from a process of its own (``bench.cost.worker``), where the variant and the base take turns, and is kept
as a line of ``cost.jsonl`` as soon as it is there. Beside each ratio of times stands that of the counted FLOPs, to
compare it with. It is no bound: the base spends time outside products too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.common.result_provenance import environment
from bench.cost.rows import SavedRows, device_in
from bench.cost.worker import BASE, FULL, CostSettings
from passes.errors import InputError
from surgery.variants import REGISTRY, resolve_variant

DEVICE = """
import sys
from bench.common.load_model import device_name, device_of
print(device_name(device_of(sys.argv[1])))
"""


def chosen(names: Sequence[str] | None) -> list[str]:
    """The rows of a report: the base, full fine-tuning, and the variants asked for, or all.

    Raises:
        VariantError: there is no such variant.
    """
    wanted = [resolve_variant(name).name for name in names] if names else sorted(REGISTRY)
    return [BASE, FULL, *dict.fromkeys(wanted)]


def run(
    settings: CostSettings, variants: Sequence[str] | None = None, out: Path | None = None, *, resume: bool = False
) -> list[dict[str, Any]]:
    """Measure every row, print the tables, and write them with the data and the figure.

    Args:
        variants: names; all by default.
        out: directory for ``cost.jsonl``, ``cost.json``, ``cost.csv``, ``cost.md`` and ``cost.png``; None writes none.
        resume: take the rows from ``cost.jsonl`` that were measured with these settings, on this machine and device, by
            this code; its other rows stay in that file, until they are measured again.

    Raises:
        InputError: the model cannot be loaded, or an option is wrong.
    """
    from bench.cost.table import show, write

    if settings.r < 1 or min(settings.batch, settings.length, settings.repeats) < 1:
        raise InputError("r, batch, length and repeats must be at least 1")
    names, source = chosen(variants), environment()
    kept = SavedRows(out / "cost.jsonl", keep=resume) if out else None
    known = _known(kept.finished(settings, source), settings.device) if kept else {}
    rows = [known[name] for name in names if name in known]
    for name, tell in _progress([name for name in names if name not in known]):
        row = {**measured(settings, name, tell), **source}
        if name == BASE and row["stage"] in ("start", "loading"):  # no variant could do better
            raise InputError(row["error"].partition(": ")[2].removeprefix("InputError: "))
        rows.append(row)
        if kept:
            kept.put(row)
    rows.sort(key=lambda row: names.index(row["variant"]))
    show(rows)
    if out:
        write(rows, source, out)
    return rows


def _known(finished: Sequence[dict[str, Any]], device: str) -> dict[str, dict[str, Any]]:
    """Those of the rows that were measured on this device, by variant."""
    name = _device_here(device) if finished else None
    return {row["variant"]: row for row in finished if device_in(row) == name}


def _device_here(name: str) -> str:
    """What a row would call its device, from a process of its own: set up here, it would hold memory all the while."""
    command = [sys.executable, "-c", DEVICE, name]
    run = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    if run.returncode:
        reason = _ended(run.returncode, run.stderr)
        raise InputError(reason.rpartition("InputError: ")[2])
    return run.stdout.strip().splitlines()[-1]


def _environment() -> dict[str, str]:
    """Variables of a process that imports what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}


def _progress(names: list[str]) -> Any:
    """Each name, with a function that shows the stage it is in, under a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(names))
        for name in names:
            yield name, lambda stage, name=name: bar.update(task, description=f"{name}: {stage}")
            bar.advance(task)


def measured(settings: CostSettings, name: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """The row of one variant, from a process of its own; where that was killed, the row says so."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        result = Path(folder) / "row.json"
        result.write_text(json.dumps({"variant": name, "settings": asdict(settings), "stage": "start"}))
        command = [sys.executable, "-m", "bench.cost.worker", json.dumps(asdict(settings)), name, str(result)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment()) as process:
            try:
                assert process.stdout is not None
                for stage in process.stdout:
                    tell(stage.strip())
            except BaseException:
                process.kill()
                raise
        row: dict[str, Any] = json.loads(result.read_text())
        if process.returncode:
            log.seek(0)
            row["error"] = f"{row['stage']}: {_ended(process.returncode, log.read())}"
    return row


def _ended(code: int, log: str) -> str:
    """Why a process ended early."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"the process was ended by {name}" + ", most likely out of memory" * (name == "SIGKILL")
    return (log.strip().splitlines() or [f"the process ended with {code}"])[-1]
