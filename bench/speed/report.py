"""Tables and a figure of the speed matrix, from its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.common.results_store import key
from bench.models.decoder import shapes
from bench.speed.contenders import CONTENDERS
from bench.speed.roofline import minimum_ms
from bench.speed.runtimes import RUNTIMES

# What one group of tables has in common.
RUN = ("config", "layers", "dtype", "r", "tokens", "device", "threads", "seed", "repeats")
SHAPES = tuple(shapes(512))
NOTHING = "No rows yet: `python -m bench speed` measures them.\n"
Rows = Sequence[Mapping[str, Any]]


def groups(rows: Rows) -> list[tuple[tuple[Any, ...], list[Mapping[str, Any]]]]:
    """Rows by the model, the machine that they were measured on, and how: no row stands for another."""
    ordered = sorted(rows, key=lambda row: tuple(map(str, key(row, RUN))))
    return [(of, limited(list(found))) for of, found in groupby(ordered, key=lambda row: key(row, RUN))]


def limited(rows: Rows) -> list[Mapping[str, Any]]:
    """Rows of one machine with their least times by its best rates.

    Ceilings are measured once in a run, which may be while others use the machine: the rate of products is also what
    any cell reached. That of memory is not, as a cell may read from a cache.
    """
    done = [row for row in rows if row["status"] == "ok" and "ceilings" in row]
    best = {}
    if done:
        best = {rate: max(row["ceilings"][rate] for row in done) for rate in ("flops_per_second", "bytes_per_second")}
        reached = max(1000 * row.get("flops", 0) / row["milliseconds"]["median"] for row in done)
        best["flops_per_second"] = max(best["flops_per_second"], reached)
    return [
        {**row, "ceilings": best, "minimum_ms": minimum_ms({n: row[n] for n in ("flops", "bytes")}, best)}
        if row in done and "flops" in row
        else row
        for row in rows
    ]


def markdown(rows: Rows) -> str:
    """A table for each model, machine and runtime: ratio to the base beside it, milliseconds, and about their least."""
    return "\n".join(_group(of, found) for of, found in groups(rows)) or NOTHING


def _group(of: tuple[Any, ...], rows: Rows) -> str:
    config, layers, dtype, r, tokens, device, threads, seed, repeats = of
    lines = [
        f"**{config}, {layers} layer{'s' if layers > 1 else ''}, {dtype}, r = {r}; {device}, {threads} threads; "
        f"seed {seed}, at most {repeats} pairs**",
        "",
    ]
    machine = [row["ceilings"] for row in rows if "ceilings" in row]
    if machine:
        rate, bandwidth = (max(c[n] for c in machine) for n in ("flops_per_second", "bytes_per_second"))
        lines += [f"Ceilings: {rate / 1e9:,.0f} GFLOP/s, the best of products by themselves and of all cells; "
                  f"{bandwidth / 1e9:,.1f} GB/s of memory.", ""]  # fmt: skip
    at = {(row["runtime"], row["contender"], row["shape"]): row for row in rows}
    for runtime in RUNTIMES:
        kinds = [s for s in SHAPES if any(a == runtime and c == s for a, _, c in at)]
        if not kinds:
            continue
        lines += [f"| {_named(runtime, rows)} | " + " | ".join(_title(s, tokens) for s in kinds) + " |"]
        lines += ["|---" + "|---:" * len(kinds) + "|"]
        for name in CONTENDERS:
            found = [at.get((runtime, name, shape)) for shape in kinds]
            if any(found):
                lines.append(f"| {name} | " + " | ".join(map(_cell, found)) + " |")
        lines.append("")
    return "\n".join(lines)


def _named(runtime: str, rows: Rows) -> str:
    """A runtime, and the backend of ``torch.compile`` where it is not the usual one."""
    found = {row.get("backend") for row in rows if row["runtime"] == runtime} - {None, "inductor"}
    return f"{runtime} with {', '.join(sorted(map(str, found)))}" if found else runtime


def _title(shape: str, tokens: int) -> str:
    if shape.startswith("decode"):
        return f"decode, batch {shape.removeprefix('decode ')}"
    return f"{'training step' if shape == 'training' else shape}, {tokens:,} tokens"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["status"] == "wrong":
        return f"wrong: error {max(row['errors'].values()):.2g} of the effect"
    if row["status"] != "ok":
        return str(row["status"])
    ratio, ms = row["ratio"], row["milliseconds"]["median"]
    return (
        f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f}); "
        f"{_digits(ms)} of ~{_digits(row['minimum_ms'])} ms"
    )


def _digits(ms: float) -> str:
    return f"{ms:.3g}" if ms < 100 else f"{ms:,.0f}"


def figure(rows: Rows, path: Path) -> None:
    """Draw ratios to the base with their quartiles, a panel for each runtime and shape, and about the least ones.

    Args:
        rows: of one group, see :func:`groups`.
        path: the PNG to write.
    """
    from bench.common.figures import BLUE, INK, MUTED, ORANGE, plt

    kinds = [s for s in SHAPES if any(row["shape"] == s for row in rows)]
    lines = {
        runtime: [c for c in CONTENDERS if any((row["runtime"], row["contender"]) == (runtime, c) for row in rows)][
            ::-1
        ]
        for runtime in RUNTIMES
        if any(row["runtime"] == runtime for row in rows)
    }
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED}
    with plt.rc_context(style):
        heights = [0.5 + 0.19 * len(names) for names in lines.values()]
        drawn, axes = plt.subplots(
            len(lines), len(kinds), figsize=(2.2 + 2.3 * len(kinds), 0.9 + sum(heights)), sharex="col", sharey="row",
            squeeze=False, constrained_layout=True, height_ratios=heights,
        )  # fmt: skip
        for (runtime, names), panels in zip(lines.items(), axes, strict=True):
            for panel, shape in zip(panels, kinds, strict=True):
                mine = [row for row in rows if (row["runtime"], row["shape"]) == (runtime, shape)]
                if not mine:
                    panel.set_axis_off()
                    continue
                panel.axvline(1, color=MUTED, lw=0.8)
                panel.set_title(f"{runtime}: {shape}", fontsize=9)
                panel.tick_params(labelbottom=True)
                for row in mine:
                    y = names.index(row["contender"])
                    if row["status"] == "wrong":
                        panel.text(1, y, " wrong", color=ORANGE, va="center", fontsize=8)
                    if row["status"] == "ok":
                        ratio, base = row["ratio"], row["base_milliseconds"]["median"]
                        panel.plot([ratio["q1"], ratio["q3"]], [y, y], color=BLUE, lw=2, alpha=0.5)
                        panel.plot(ratio["median"], y, "o", color=BLUE, ms=4)
                        panel.plot(row["minimum_ms"] / base, y, "|", color=INK, ms=7)
                panel.set_yticks(range(len(names)), names)
                panel.set_ylim(-0.6, len(names) - 0.4)
        drawn.supxlabel(
            "time over the plain base's, quartiles of pairs; the tick is about what FLOPs and bytes allow", fontsize=9
        )
        drawn.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(drawn)
