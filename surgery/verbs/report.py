"""The report: what was operated on and how, what was not and why, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from passes.analysis.linear_sites import Skipped
from surgery.hosting.root import GeneratingRoot, Root
from surgery.hosting.state import record_of, trainable_parameters, unwrap
from surgery.hosting.subclasses import without
from surgery.lowerings import ALWAYS, IN_RESIDUAL, REGISTRY, describe, step
from surgery.lowerings._cost_model import core_macs, predicted, predicted_change, size_of
from surgery.modules.adapter import Adapter
from surgery.planning.target_selection import why_not_chosen
from surgery.verbs.steer import sites

TOKENS = 512
CHANGED = "changed weight"


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
        cached: bytes of changed weights that inference caches, at the most; they are dropped in ``train()``.
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
    cached: int = 0

    @property
    def shape(self) -> str:
        """Sizes as text."""
        return "x".join(str(size) for size in (self.stack, self.d_out, self.d_in) if size is not None)


@dataclass(frozen=True, repr=False)
class Report:
    """All operated sites, the products left alone with the reason, and how the model was captured.

    ``print(report)`` and ``show()`` give the table, a notebook shows it by itself, ``repr`` is one line.
    """

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
        from surgery.verbs.report_view import show

        show(self)

    def __str__(self) -> str:
        from surgery.verbs.report_view import as_text

        return as_text(self)

    def __repr__(self) -> str:
        from surgery.verbs.report_view import summary

        return summary(self)

    def _repr_html_(self) -> str:
        from surgery.verbs.report_view import as_html

        return as_html(self)


def _class_name(model: nn.Module) -> str:
    """Name of the model's own class, where a hosted weight gave it a parametrised one."""
    cls = without(without(type(model), GeneratingRoot), Root)
    return (cls.__bases__[0] if parametrize.is_parametrized(model) else cls).__name__


Lowerings = tuple[str, str, str, str, float | None, float | None]


def _lowerings(site: Adapter) -> Lowerings:
    """The fields ``lowering`` to ``cost_training`` of a site."""
    size, device = size_of(site, TOKENS), site.factors.U.device.type
    if site.host.changes_weight:
        cached = not site.host.inlined
        names = (f"{CHANGED}, cached" if cached else CHANGED, CHANGED)
        stack = site.factors.stack or 1
        costs = [predicted_change(size, stack, device, cached=cached and not t, training=t) for t in (False, True)]
        return *names, *names, costs[0], costs[1]
    if site.schedule is None:  # in a graph, which leaves no choice
        name = IN_RESIDUAL if site.form == "residual" else ALWAYS
        costs = [predicted(name, size, device, training=training) for training in (False, True)]
        return name, name, name, name, costs[0], costs[1]
    cases = [site.schedule.case(training=training, rows=False) for training in (False, True)]
    names = (step(cases[0], TOKENS), step(cases[1], TOKENS))
    costs = [predicted(names[training], size, device, training=training) for training in (False, True)]
    return describe(cases[0]), describe(cases[1]), *names, costs[0], costs[1]


def _cached(site: Adapter) -> int:
    """Bytes that inference caches of a changed weight, where a lowering of the site does."""
    weight = site.base_weight
    if site.schedule is None:
        return 0 if site.host.inlined else site.host.parameter().numel() * weight.dtype.itemsize
    names = [name for _, name in site.schedule.case(training=False, rows=False)]
    return max((REGISTRY[name].caches for name in names), default=0) * weight.shape.numel() * weight.dtype.itemsize


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
        host = site.host.name
        trainable = sum(p.numel() for p in site.core.parameters())
        facts = record.factorisation.get(key, {})
        operated.append(
            SiteReport(
                key,
                site.variant.name,
                d_out,
                d_in,
                r,
                host,
                *_lowerings(site),
                trainable,
                0 if site.host.changes_weight else r * (d_in + d_out) + core_macs(site.variant, r),
                d_out * d_in,
                facts.get("method"),
                facts.get("error"),
                facts.get("residual"),
                facts.get("energy"),
                facts.get("tokens"),
                site.factors.stack,
                _cached(site),
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
