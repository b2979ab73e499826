"""The report: what was operated on and how, what was not and why, and what it costs."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from passes.analysis.linear_sites import Skipped
from surgery.hosting.hosts import host_of
from surgery.lowerings import describe, step
from surgery.lowerings._cost_model import core_macs, predicted, size_of
from surgery.modules.adapter import SSpaceLinear
from surgery.planning.target_selection import why_not_chosen
from surgery.verbs.apply import record_of, unwrap
from surgery.verbs.steer_and_merge import sites, trainable_parameters

TOKENS = 512


@dataclass(frozen=True)
class SiteReport:
    """One operated site.

    Attributes:
        lowering: which runs in inference from how many tokens on.
        lowering_training: the same while the core is trained.
        lowering_at, training_at: the two at ``TOKENS`` tokens.
        cost, cost_training: predicted overhead at ``TOKENS`` tokens, as a share of the plain base's time.
        macs: multiply-accumulates per token that the adapter's matrix products add.
        base_macs: those of the base product.
        method, error, residual, energy: of the factorisation; None where factors were loaded.
        tokens: that calibration showed the site; None without calibration.
        stack: number of matrices in the weight, each adapted by itself; None for one. Multiply-accumulates are of one.
    """

    key: str
    variant: str
    d_out: int
    d_in: int
    r: int
    host: str
    lowering: str
    lowering_training: str
    lowering_at: str
    training_at: str
    cost: float | None
    cost_training: float | None
    trainable: int
    macs: int
    base_macs: int
    method: str | None
    error: float | None
    residual: float | None
    energy: float | None
    tokens: int | None
    stack: int | None = None

    @property
    def shape(self) -> str:
        """Sizes as text."""
        return "x".join(str(size) for size in (self.stack, self.d_out, self.d_in) if size is not None)


@dataclass(frozen=True)
class Report:
    """All operated sites, the products left alone with the reason, and how the model was captured."""

    model: str
    sites: tuple[SiteReport, ...]
    skipped: tuple[Skipped, ...]
    captured: bool
    how: str
    notes: tuple[str, ...]
    trainable: int
    total: int

    def show(self) -> None:
        """Print the report as a table, with like sites of all layers in one row."""
        from rich.console import Console

        console = Console()
        self._print(console if console.is_terminal else Console(width=110))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, color_system=None)
        with console.capture() as captured:
            self._print(console)
        return captured.get()

    def _print(self, console: Any) -> None:
        console.print(self._table())
        for line in self._lines():
            console.print(line, highlight=False)

    def _table(self) -> Any:
        from rich import box
        from rich.table import Table

        variants = ", ".join(dict.fromkeys(site.variant for site in self.sites))
        title = f"{self.model}: {len(self.sites)} sites operated on ({variants})"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1), pad_edge=False)
        table.add_column("site", overflow="fold")
        hosts = any(site.host != "module" for site in self.sites)  # the usual one goes without saying
        for name in ("n", "out x in", "r", "host", "inference", "training", "energy", "trainable"):
            left = name in ("host", "inference", "training")
            if name != "host" or hosts:
                table.add_column(name, justify="left" if left else "right", no_wrap=True)
        rows: dict[tuple[Any, ...], list[SiteReport]] = {}
        for site in self.sites:
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", site.key)
            rows.setdefault((name, site.shape, site.r, site.host, *_columns(site)), []).append(site)
        for (name, shape, r, host, inference, training), found in rows.items():
            energies = [s.energy for s in found if s.energy is not None]
            energy = f"{100 * sum(energies) / len(energies):.0f}%" if energies else "loaded"
            trainable = f"{sum(s.trainable for s in found):,}"
            where = (host,) if hosts else ()
            table.add_row(name, str(len(found)), shape, str(r), *where, inference, training, energy, trainable)
        return table

    def _lines(self) -> list[str]:
        captured = "" if self.captured else " (not captured)"
        lines = [f"{self.trainable:,} of {self.total:,} parameters are trainable; sites from {self.how}{captured}"]
        if any(site.cost is not None for site in self.sites):
            lines.append(
                f"inference, training: the lowering at {TOKENS} tokens and its predicted cost over the plain base"
            )
        macs = f"+{100 * sum(s.macs for s in self.sites) / max(sum(s.base_macs for s in self.sites), 1):.0f}%"
        lines.append(f"low-rank products take {macs} multiply-accumulates of the sites' own")
        methods = Counter(s.method for s in self.sites if s.method)
        if methods:
            worst = max(s.error for s in self.sites if s.error is not None)
            error = 10.0 ** math.ceil(math.log10(max(worst, 1e-300)))
            names = ", ".join(f"{n} by {method}" for method, n in methods.items())
            lines.append(
                f"factors: {names}, orthonormal within {error:.0e}; energy is the share that r directions hold"
            )
        if inexact := [s.residual for s in self.sites if s.method == "randomised" and s.residual is not None]:
            lines.append(f"randomised factors deviate from singular triples by up to {max(inexact):.1%}")
        if tokens := [s.tokens for s in self.sites if s.tokens is not None]:
            lines.append(f"calibrated on {min(tokens):,} tokens" + (" or more" if max(tokens) > min(tokens) else ""))
        for (reason, operation), n in Counter((s.reason, s.operation) for s in self.skipped).items():
            lines.append(f"left alone: {n} x {operation}: {reason}")
        return lines + [f"note: {note}" for note in self.notes]


def _class_name(model: nn.Module) -> str:
    """Name of the model's own class, where a hosted weight gave it a parametrised one."""
    return (type(model).__bases__[0] if parametrize.is_parametrized(model) else type(model)).__name__


def _columns(site: SiteReport) -> tuple[str, str]:
    """The two lowerings at ``TOKENS`` tokens, with their cost where it is predicted."""
    if site.cost is None or site.cost_training is None:
        return site.lowering, site.lowering_training
    return f"{site.lowering_at} +{site.cost:.0%}", f"{site.training_at} +{site.cost_training:.0%}"


def _lowerings(site: SSpaceLinear, host: str) -> tuple[str, str, str, str, float | None, float | None]:
    if host != "module":
        name = "dense" if host == "weight" else "lowrank"
        return name, name, name, name, None, None
    cases = [site.schedule.case(training=training, rows=False) for training in (False, True)]
    size, device = size_of(site, TOKENS), site.factors.U.device.type
    names = [step(case, TOKENS) for case in cases]
    costs = [predicted(names[training], size, device, training=training) for training in (False, True)]
    return describe(cases[0]), describe(cases[1]), names[0], names[1], costs[0], costs[1]


def report(model: nn.Module) -> Report:
    """Report on an operated model.

    Raises:
        SurgeryError: the model carries no surgery.
    """
    model = unwrap(model)
    record = record_of(model)
    inspection = record.inspection
    operated = []
    for key, site in sites(model).items():
        (d_out, d_in), r = site.factors.shape[-2:], site.factors.rank
        host = host_of(site)
        trainable = sum(p.numel() for p in site.core.parameters())
        found = record.factorisation.get(key, {})
        operated.append(
            SiteReport(
                key,
                site.variant.name,
                d_out,
                d_in,
                r,
                host,
                *_lowerings(site, host),
                trainable,
                0 if host == "weight" else r * (d_in + d_out) + core_macs(site.variant, r),
                d_out * d_in,
                found.get("method"),
                found.get("error"),
                found.get("residual"),
                found.get("energy"),
                found.get("tokens"),
                site.factors.stack,
            )
        )
    skipped: list[Skipped] = []
    if inspection:
        chosen = {site.key for site in operated}
        skipped += [Skipped(k, "linear", reason) for k, reason in why_not_chosen(model, inspection, chosen).items()]
        skipped.extend(inspection.skipped)
    trainable, total = trainable_parameters(model)
    return Report(
        _class_name(model),
        tuple(operated),
        tuple(skipped),
        inspection.captured if inspection else False,
        inspection.how if inspection else "adapter file",
        inspection.notes if inspection else (),
        trainable,
        total,
    )
