"""The cost report as tables and files: one flat record per row, from which everything that is shown is made."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common.number_format import number
from bench.common.timing import quartiles
from bench.cost.worker import CALIBRATION
from passes.errors import InputError

MB = 1e6
KINDS = ("forward", "step")
Column = tuple[str, str]


def record(row: dict[str, Any]) -> dict[str, Any]:
    """A row as numbers: milliseconds, ratios to the base, megabytes of 10^6 bytes; None where there is nothing."""
    times, peaks, held = row.get("milliseconds", {}), row.get("peak_bytes", {}), row.get("held_bytes")
    found: dict[str, Any] = {"variant": row["variant"]}
    found |= {name: row.get(name) for name in ("sites", "trainable")}
    for kind in KINDS:
        pairs, flops = times.get(kind), row.get("flops", {}).get(kind)
        low, middle, high = quartiles(pairs) if pairs else (None, None, None)
        found[f"{kind}_ms"] = statistics.median(a for a, _ in pairs) if pairs else None
        found[f"{kind}_base_ms"] = statistics.median(b for _, b in pairs) if pairs else None
        found |= {f"{kind}_ratio": middle, f"{kind}_ratio_low": low, f"{kind}_ratio_high": high}
        found[f"{kind}_flop_ratio"] = flops[0] / flops[1] if flops and flops[1] else None
        used = row.get("lowering", {}).get(kind, {})
        found[f"{kind}_lowering"] = ", ".join(sorted(used, key=lambda name: -used[name])) or None
    found["added_macs_per_token"] = row.get("macs")
    found["added_macs_share"] = row["macs"] / row["base_macs"] if row.get("base_macs") else None
    found |= {f"held_{name}_mb": held[name] / MB if held else None for name in ("factors", "core", "kept")}
    found["held_mb"] = sum(held.values()) / MB if held else None
    for kind in (*KINDS, "initialisation"):
        found[f"peak_{kind}_mb"] = None if peaks.get(kind) is None else peaks[kind] / MB
    found |= {f"{name}_ms": times.get(name) for name in ("initialisation", "merge")}
    found["file_mb"] = row["file_bytes"] / MB if row.get("file_bytes") is not None else None
    found["error"] = row.get("error")
    return found


def over(found: dict[str, Any], kind: str) -> str:
    """Median of the paired ratios to the base, with the quartiles."""
    if found[f"{kind}_ratio"] is None:
        return "n/a"
    low, high = found[f"{kind}_ratio_low"], found[f"{kind}_ratio_high"]
    return f"{found[f'{kind}_ratio']:.2f} ({low:.2f} to {high:.2f})"


def speed(found: dict[str, Any]) -> dict[str, str]:
    """The cells of the first table."""
    cells = {"variant": found["variant"], "trainable": _whole(found["trainable"])}
    for kind, name in zip(KINDS, ("forward", "fwd + bwd"), strict=True):
        cells[f"{name}, ms"] = number(found[f"{kind}_ms"])
        cells["over base" + " " * (kind == "step")] = over(found, kind)
        cells["FLOPs" + " " * (kind == "step")] = _ratio(found[f"{kind}_flop_ratio"])
    used = [found[f"{kind}_lowering"] for kind in KINDS]
    cells["computed as"] = " / ".join(name or "n/a" for name in used) if any(used) else ""
    return cells


def size(found: dict[str, Any]) -> dict[str, str]:
    """The cells of the second table."""
    share = found["added_macs_share"]
    return {
        "variant": found["variant"],
        "sites": _whole(found["sites"]),
        "MACs per token": "n/a" if share is None else f"+{found['added_macs_per_token']:,} ({share:.0%})",
        "adapter, MB": number(found["held_mb"]),
        "peak fwd, MB": number(found["peak_forward_mb"]),
        "peak fwd + bwd, MB": number(found["peak_step_mb"]),
        "peak init, MB": number(found["peak_initialisation_mb"]),
        "init, ms": number(found["initialisation_ms"]),
        "merge, ms": number(found["merge_ms"]),
        "file, MB": number(found["file_mb"]),
    }


def _whole(value: int | None) -> str:
    return "n/a" if value is None else f"{value:,}"


def _ratio(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def heading(rows: Sequence[dict[str, Any]]) -> str:
    """What was measured."""
    settings, model = rows[0]["settings"], next((row["model"] for row in rows if "model" in row), {})
    weights = "random weights, " if settings["config_only"] else ""
    tokens = f", {settings['batch']} x {settings['length']} tokens" if model.get("sized") else ""
    return (
        f"{settings['model']} ({model.get('class')}, {model.get('parameters', 0):,} parameters, {weights}"
        f"{model.get('dtype')}) on {model.get('device')}{tokens}, "
        f"r = {settings['r']}, lowering {settings['lowering']}, {settings['repeats']} pairs of runs"
    )


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How to read the tables, and what failed."""
    memory = next((row["memory"] for row in rows if "memory" in row), "")
    lines = [
        "over base: median of paired ratios to the frozen base, which takes turns in the same process, and quartiles; "
        "those of the base itself are to a copy of it, so they show the noise. FLOPs: those of all matrix products, as "
        "counted, over the base's: to compare the times with, and no bound, as the base does more than products.",
        "fwd + bwd: in eval mode, to what is trained and to the embeddings (or inputs), without an optimiser's step. "
        "computed as: the lowerings of a forward / of a forward with a backward.",
        "MACs per token: what low-rank products would add, and their share of the operated sites' own. adapter: "
        "factors, cores and cached weights in memory, beside the base's weights. init: apply_surgery, on random "
        f"calibration data of {CALIBRATION} batches where a variant needs some.",
        f"peak: {memory}. file: on disk; of full fine-tuning, all parameters.",
    ]
    failed = [f"FAILED {row['variant']}: {row['error']}" for row in rows if row.get("error")]
    return lines + failed


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Both tables, with what they say of themselves."""
    parts = [heading(rows), ""]
    for cells in (speed, size):
        table = [cells(record(row)) for row in rows]
        left = {"variant", "computed as"}
        parts += ["| " + " | ".join(name.strip() for name in table[0]) + " |"]
        parts += ["|" + "|".join("---" if name in left else "---:" for name in table[0]) + "|"]
        parts += ["| " + " | ".join(line.values()) + " |" for line in table] + [""]
    return "\n".join([*parts, *(f"* {line.replace('|', ' ')}" for line in notes(rows))]) + "\n"


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print both tables on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(150, shutil.get_terminal_size().columns))
    console.print(heading(rows), highlight=False)
    for cells in (speed, size):
        lines = [cells(record(row)) for row in rows]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for name in lines[0]:
            left = name in ("variant", "computed as")
            table.add_column(name.strip(), justify="left" if left else "right", no_wrap=name == "variant")
        for row, line in zip(rows, lines, strict=True):
            table.add_row(*line.values(), style="red" if row.get("error") else None)
        console.print(table)
    for line in notes(rows):
        console.print(line, highlight=False, style="bold red" if line.startswith("FAILED") else "dim", markup=False)


def write(rows: Sequence[dict[str, Any]], source: dict[str, Any], out: Path) -> None:
    """Write ``cost.json``, ``cost.csv``, ``cost.md`` and ``cost.png``.

    Raises:
        InputError: a file cannot be written.
    """
    from bench.cost.figure import cost_figure

    records = [record(row) for row in rows]
    data = {**source, "settings": rows[0]["settings"], "records": records, "rows": list(rows)}
    try:
        (out / "cost.json").write_text(json.dumps(data, indent=1) + "\n")
        (out / "cost.md").write_text(markdown(rows))
        with (out / "cost.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        cost_figure(records, heading(rows), out / "cost.png")
    except OSError as error:
        raise InputError(f"cannot write to {str(out)!r}: {error}") from error
