"""How a report is shown: as a table on a terminal, as text, and in a notebook."""

from __future__ import annotations

import math
import re
from collections import Counter
from html import escape
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from surgery.verbs.report import Report, SiteReport

LEFT = ("site", "host", "inference", "training")
WIDTH = 110


def print_report(report: Report, console: Console) -> None:
    """Print the table and the lines below it."""
    table = Table(
        title=_title(report),
        title_style="bold",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        padding=(0, 1),
        pad_edge=False,
    )
    names, rows = _cells(report)
    for name in names:
        if name == "site":
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in _lines(report):
        console.print(line, highlight=False)


def show(report: Report) -> None:
    """Print a report on the standard output stream, in colour on a terminal."""
    console = Console()
    print_report(report, console if console.is_terminal else Console(width=WIDTH))


def as_text(report: Report) -> str:
    """What :func:`show` prints, without colour."""
    console = Console(width=WIDTH, color_system=None)
    with console.capture() as captured:
        print_report(report, console)
    return captured.get()


def summary(report: Report) -> str:
    """A report in one line."""
    variants = ", ".join(dict.fromkeys(site.variant for site in report.sites))
    sizes = f"{report.trainable:,} of {report.total:,} parameters trainable"
    return f"<Report: {report.model}, {len(report.sites)} sites ({variants}), {sizes}>"


def as_html(report: Report) -> str:
    """The table for a notebook; it takes the notebook's own colours, light or dark."""
    names, rows = _cells(report)

    styles = [f"padding: 0.15em 0.7em; text-align: {'left' if name in LEFT else 'right'}" for name in names]

    def row_of(cells: list[str], tag: str) -> str:
        return "".join(f'<{tag} style="{s}">{escape(cell)}</{tag}>' for s, cell in zip(styles, cells, strict=True))

    body = "".join(f"<tr>{row_of(row, 'td')}</tr>" for row in rows)
    lines = "".join(f"<li>{escape(line)}</li>" for line in _lines(report))
    return (
        f'<div><p><b>{escape(_title(report))}</b></p><table style="font-variant-numeric: tabular-nums">'
        f"<thead><tr>{row_of(names, 'th')}</tr></thead><tbody>{body}</tbody></table>"
        f'<ul style="opacity: 0.8; list-style: none; padding-left: 0">{lines}</ul></div>'
    )


def _title(report: Report) -> str:
    variants = ", ".join(dict.fromkeys(site.variant for site in report.sites))
    return f"{report.model}: {len(report.sites)} sites operated on ({variants})"


def _cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and one row for like sites of all layers."""
    hosts = any(site.host != "module" for site in report.sites)  # the usual one goes without saying
    names = ["site", "n", "out x in", "r", *(["host"] if hosts else []), "inference", "training", "energy", "trainable"]
    grouped: dict[tuple[str, ...], list[SiteReport]] = {}
    for site in report.sites:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", site.key)
        grouped.setdefault((name, site.shape, str(site.r), site.host, *_lowerings(site)), []).append(site)
    rows = []
    for (name, shape, r, host, inference, training), alike in grouped.items():
        energies = [site.energy for site in alike if site.energy is not None]
        energy = f"{100 * sum(energies) / len(energies):.0f}%" if energies else "loaded"
        trainable = f"{sum(site.trainable for site in alike):,}"
        where = [host] if hosts else []
        rows.append([name, str(len(alike)), shape, r, *where, inference, training, energy, trainable])
    return names, rows


def _lowerings(site: SiteReport) -> tuple[str, str]:
    """The two lowerings, with their cost where it is predicted."""
    if site.cost is None or site.cost_training is None:
        return site.lowering, site.lowering_training
    return f"{site.lowering_at} +{site.cost:.0%}", f"{site.training_at} +{site.cost_training:.0%}"


def _lines(report: Report) -> list[str]:
    """What the table does not show: sizes, factors, data, and what was left alone."""
    from surgery.verbs.report import TOKENS

    sites = report.sites
    captured = "" if report.captured else " (not captured)"
    lines = [f"{report.trainable:,} of {report.total:,} parameters are trainable; sites from {report.how}{captured}"]
    if any(site.cost is not None for site in sites):
        lines.append(f"inference, training: the lowering at {TOKENS} tokens and its predicted cost over the plain base")
    if cached := sum(site.cached for site in sites):
        lines.append(f"inference caches up to {cached / 2**20:,.1f} MiB of changed weights")
    macs = f"+{100 * sum(s.macs for s in sites) / max(sum(s.base_macs for s in sites), 1):.0f}%"
    lines.append(f"low-rank products take {macs} multiply-accumulates of the sites' own")
    methods = Counter(s.method for s in sites if s.method)
    if methods:
        worst = max(s.error for s in sites if s.error is not None)
        error = 10.0 ** math.ceil(math.log10(max(worst, 1e-300)))
        names = ", ".join(f"{n} by {method}" for method, n in methods.items())
        lines.append(f"factors: {names}, orthonormal within {error:.0e}; energy is the share that r directions hold")
    if inexact := [s.residual for s in sites if s.method == "randomised" and s.residual is not None]:
        lines.append(f"randomised factors deviate from singular triples by up to {max(inexact):.1%}")
    if tokens := [s.tokens for s in sites if s.tokens is not None]:
        lines.append(f"calibrated on {min(tokens):,} tokens" + (" or more" if max(tokens) > min(tokens) else ""))
    for (reason, operation), n in Counter((s.reason, s.operation) for s in report.skipped).items():
        lines.append(f"left alone: {n} x {operation}: {reason}")
    return lines + [f"note: {note}" for note in report.notes]
