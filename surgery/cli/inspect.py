"""``surgery inspect``: the sites of a model as a table, and a drawing of one operated site, without any weight."""

from __future__ import annotations

import importlib
import operator
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import fx, nn

from passes.analysis.linear_sites import Site
from passes.capture.graph_products import Products
from passes.capture.inspect_model import Inspection
from passes.errors import InputError
from passes.infra.pass_manager import run_pipeline
from passes.ir.module_utils import copy_graph
from passes.transforms.insert import Insert, InsertionPoint
from passes.viz.site_diagram import Drawing, draw_site
from surgery.errors import TargetError
from surgery.hosting.attach import graph_adapter
from surgery.hosting.checks import check_form
from surgery.hosting.graph_site import GraphSite
from surgery.hosting.graph_surgery import products_of, register_sites
from surgery.modules.adapter import Adapter
from surgery.modules.core import Core, Factors
from surgery.planning.adapter_init import initial_core
from surgery.planning.target_selection import select_sites, site_ranks, why_not_chosen
from surgery.support.hf_config import first_line, hub_config, model_class
from surgery.support.untrusted_files import JsonObject
from surgery.variants import DEFAULT, Variant, resolve_variant
from surgery.verbs.apply import inspect_sites
from surgery.verbs.argument_types import ExampleInputs, VariantLike
from surgery.verbs.capture_base import capture_base


@dataclass(frozen=True)
class Choice:
    """A model's sites, which of them a variant would operate on, and why not on the others.

    Attributes:
        ranks: of the chosen sites, by key.
        reasons: of the other sites, by key.
    """

    model: nn.Module
    inspection: Inspection
    variant: Variant
    ranks: dict[str, int]
    reasons: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[JsonObject]:
        """One mapping per site and skipped product, for machines."""
        groups = _siblings(self.inspection)
        rows: list[JsonObject] = []
        for site in self.inspection.sites:
            chosen = {"chosen": site.key in self.ranks, "r": self.ranks.get(site.key)}
            reads_with = [key for key in groups[site.key] if key != site.key]
            rows.append({**asdict(site), "reads_with": reads_with, **chosen, "reason": self.reasons.get(site.key)})
        skipped = [
            {"key": s.where, "operation": s.operation, "chosen": False, "reason": s.reason}
            for s in self.inspection.skipped
        ]
        return rows + skipped

    def table(self, *, every: bool = False) -> Table:
        """A ``rich`` table; like sites of all layers share a row unless ``every`` is true."""
        from rich import box

        how = self.inspection.how if self.inspection.captured else "module walk (not captured)"
        title = f"{type(self.model).__name__}: {len(self.inspection.sites)} sites, from {how}"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1), pad_edge=False)
        table.add_column("site", overflow="fold")
        for name in ("n", "d_out x d_in", "op", "reads with", "role", self.variant.name):
            table.add_column(name, justify="right" if name in ("n", "d_out x d_in") else "left")
        groups = _siblings(self.inspection)
        rows: dict[tuple[str, ...], list[int]] = {}
        for i, site in enumerate(self.inspection.sites):
            others = ", ".join(_short(key, site.key) for key in groups[site.key] if key != site.key)
            role = {True: "writes residual", False: "", None: "unknown"}[site.residual]
            called = f"called {site.calls} times" if site.calls > 1 else ""
            role = ", ".join(filter(None, [role, "tied" if site.tied else "", called]))
            verdict = f"r={self.ranks[site.key]}" if site.key in self.ranks else self.reasons[site.key]
            key = site.key if every else re.sub(r"(?<=\.)\d+(?=\.|$)", "*", site.key)
            shape = " x ".join(str(n) for n in (site.stack, site.d_out, site.d_in) if n is not None)
            row = (key, shape, site.operation or "?", others, role, verdict)
            rows.setdefault(row, []).append(i)
        for (key, *rest), alike in rows.items():
            table.add_row(key, str(len(alike)), *rest)
        return table

    def lines(self) -> list[str]:
        """What is no site, and why; notes."""
        counted: dict[tuple[str, str], int] = {}
        for s in self.inspection.skipped:
            counted[s.operation, s.reason] = counted.get((s.operation, s.reason), 0) + 1
        lines = [f"no site: {n} x {operation}: {reason}" for (operation, reason), n in counted.items()]
        return lines + [f"note: {note}" for note in self.inspection.notes]

    def draw(self, key: str, example_inputs: ExampleInputs | None = None, form: str = "delta") -> Drawing:
        """Draw the graph around a site as surgery would leave it; the tensors have shapes and no values.

        Raises:
            InputError: the form is neither "delta" nor "residual".
            TargetError: there is no such site in the graph.
        """
        check_form(form)
        sites = {site.key: site for site in self.inspection.sites}
        if key not in sites:
            raise TargetError(f"no site is named {key!r}; sites are {', '.join(list(sites)[:8])}, ...")
        graph, _ = capture_base(self.model, example_inputs)
        graph.requires_grad_(False)
        site, r = sites[key], self.ranks.get(key, min(sites[key].d_out, sites[key].d_in, self.variant.r))
        products = products_of(graph)
        node = _meta_site(graph, site, products, self.variant, self.variant.rank(r))
        if form == "residual" and not node.host.changes_weight:
            node.register_buffer("W_res", torch.empty(site.d_out, site.d_in, device="meta"))
            node.form = form
        run_pipeline(graph, [Insert(_insertion_points(graph, products, node))])
        return draw_site(graph, key)


def _siblings(inspection: Inspection) -> dict[str, list[str]]:
    """The sites that read the same input as each site, itself included."""
    groups: dict[object, list[str]] = {}
    for site in inspection.sites:
        groups.setdefault(site.key if site.group is None else site.group, []).append(site.key)
    return {key: keys for keys in groups.values() for key in keys}


def _short(key: str, other: str) -> str:
    """A key without the parts that it shares with another."""
    parts, others = key.split("."), other.split(".")
    while len(parts) > 1 and others and parts[0] == others[0]:
        parts, others = parts[1:], others[1:]
    return ".".join(parts)


def _insertion_points(graph: fx.GraphModule, products: Products, node: Adapter) -> list[InsertionPoint]:
    original = graph.graph
    points = register_sites(graph, original, products, [node])
    graph.graph = copy_graph(original)
    if not points:
        raise TargetError(f"site {node.key!r} does not run on the example inputs, so the graph does not show it")
    return points


def _meta_site(graph: fx.GraphModule, site: Site, products: Products, variant: Variant, r: int) -> Adapter:
    """A site whose factors have shapes and no values."""
    weight = graph.get_parameter(site.weight)
    dtype = getattr(torch, variant.factors_dtype) if variant.factors_dtype else weight.dtype
    lead = () if site.stack is None else (site.stack,)
    shapes = [(*lead, *shape) for shape in ((site.d_out, r), (r,), (r, site.d_in))]
    empty = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    core_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    core = Core(initial_core(variant, site.key, r, 0, site.stack), core_dtype, torch.device("meta"))
    host = GraphSite(graph, site.weight, site.bias, changes_weight=site.key not in products)
    adapter = graph_adapter(host, site, variant, Factors(*empty), core)
    adapter.share(adapter.steering, register=True)
    return adapter


def choose(
    model: nn.Module,
    variant: VariantLike = DEFAULT,
    r: int | None = None,
    example_inputs: ExampleInputs | None = None,
    **targets: Any,
) -> Choice:
    """Say what ``apply_surgery`` would choose, without operating.

    Args:
        targets: ``target_modules``, ``exclude_modules``, ``layers_to_transform`` and ``rank_pattern``.

    Raises:
        SurgeryError: as ``apply_surgery`` would.
    """
    config = resolve_variant(variant, r)
    inspection = inspect_sites(model, example_inputs)
    pattern = targets.pop("rank_pattern", None)
    options = {"target_modules": None, "exclude_modules": None, "layers_to_transform": None, **targets}
    chosen = select_sites(model, inspection, **options, config=config)
    ranks = site_ranks(chosen, config, pattern)
    return Choice(model, inspection, config, ranks, why_not_chosen(model, inspection, ranks))


def load_model(source: str, device: str | torch.device = "meta") -> tuple[nn.Module, ExampleInputs | None]:
    """A model without the weights of its checkpoint, and its example inputs (None for its defaults).

    Args:
        source: a hub id, a directory with a ``config.json``, or ``package.module:callable``, which gives a module, or a
            module and its example inputs.
        device: where it is made; on the meta device it has no weights, on another the initial ones of its class.

    Raises:
        InputError: there is no such model.
    """
    if is_callable(source):
        module, _, name = source.partition(":")
        return _from_callable(module, name, device)
    import transformers

    config = hub_config(source)
    cls = model_class(config, None)
    try:
        with torch.device(device):
            model = cls(config) if cls is not None else transformers.AutoModel.from_config(config)
    except Exception as error:  # sizes that do not go together fail in many ways
        raise InputError(f"cannot build the model that {source!r} configures: {first_line(error)}") from error
    return model.eval(), None


def is_callable(source: str) -> bool:
    """Whether a model is named as ``package.module:callable``."""
    return re.fullmatch(r"[\w.]+:[\w.]+", source) is not None


def _from_callable(module: str, name: str, device: str | torch.device) -> tuple[nn.Module, ExampleInputs | None]:
    try:
        target = operator.attrgetter(name)(importlib.import_module(module))
        with torch.device(device):
            made = target()
    except (Exception, SystemExit) as error:  # it is somebody else's code
        raise InputError(f"cannot call {module}:{name}: {type(error).__name__}: {first_line(error)}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(f"{module}:{name} gave a {type(model).__name__}, expected an nn.Module (and example inputs)")
    return model.eval(), inputs


def write_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.write_text(text)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error}") from error
