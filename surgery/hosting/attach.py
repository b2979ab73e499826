"""Put adapters on their sites. Hosts take them off again: the same modules, parameters, order and class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from passes.analysis.linear_sites import Site
from passes.capture.graph_products import Products
from passes.errors import CaptureError, InputError
from passes.ir.module_utils import private_module
from passes.ir.torch_internals import Convolution
from passes.transforms.insert import Insert
from passes.transforms.propagate_metadata import Annotate
from surgery.errors import TargetError, WeightError
from surgery.hosting.called_module import CalledModule, ResidualModule
from surgery.hosting.graph_site import GraphSite
from surgery.hosting.graph_surgery import GraphState, copy_whole, register_sites, rewrite
from surgery.hosting.read_weight import ReadWeight
from surgery.hosting.root import share_steering
from surgery.hosting.state import own_tensors, parameter_names, record_of
from surgery.modules.adapter import Adapter
from surgery.modules.base_weights import base_weight_in, base_weight_of
from surgery.modules.convolution_adapter import ConvolutionAdapter
from surgery.modules.core import Core, Factors
from surgery.modules.host import Host
from surgery.modules.weight_record import WeightRecord
from surgery.support.strides import overlaps
from surgery.variants import Variant


@dataclass(frozen=True)
class AdapterPlan:
    """Everything that one site needs to be operated on, made before the model is touched."""

    site: Site
    host: str  # "module", "weight" or "graph"
    variant: Variant
    factors: Factors
    core: Core
    lowering: str = "auto"
    form: str = "delta"
    keep_base: bool = True
    trained: bool = False  # whether the weight was trained beside the adapter, so that the factors are not its own
    dtypes: frozenset[torch.dtype] = frozenset()  # that the factors were rounded to before


def attach_all(model: nn.Module, plans: Iterable[AdapterPlan], original: GraphState | None, products: Products) -> None:
    """Put adapters on their sites; the caller undoes what is done if one of them fails.

    Args:
        original: of a graph, what it was before any surgery.
        products: of a graph, those that an adapter can be written beside.
    """
    inlined = []
    reads = {n.target for n in original.graph.nodes if n.op == "get_attr"} if original else set()
    plans = list(plans)
    owners = owners_of(model) if any(plan.form == "residual" for plan in plans) else Counter()
    for plan in plans:
        if plan.host == "graph" or plan.site.weight in reads:
            inlined.append(_inlined(model, plan))
            continue
        if original is not None:  # a module that a graph calls may be another model's too
            assert isinstance(model, fx.GraphModule)
            private_module(model, plan.site.weight.rpartition(".")[0], original.modules)
            copy_whole(model)
        attach(model, plan, owners)
    if inlined:
        assert isinstance(model, fx.GraphModule)
        assert original is not None
        share_steering(model, record_of(model), inlined)  # before their forwards are traced
        rewrite(model, [Insert(register_sites(model, original.graph, products, inlined)), Annotate()])


def make_adapter(host: Host, site: Site, variant: Variant, factors: Factors, core: Core) -> Adapter:
    """An adapter for a host, not yet attached."""
    base = base_weight_of(site.key, host, site.layout, factors.shape, site.rows)
    if host.changes_weight and overlaps(host.parameter()):
        raise WeightError(
            f"site {site.key!r}: entries of its weight overlap in memory (strides {host.parameter().stride()}), which "
            "those of a changed weight cannot; give it memory of its own with .contiguous(), or leave it out with "
            "exclude_modules"
        )
    kind = ConvolutionAdapter if host.convolves else Adapter
    return kind(site.key, host, base, variant, factors, core)


def _inlined(model: nn.Module, plan: AdapterPlan) -> Adapter:
    site = plan.site
    if site.rows:
        raise CaptureError(f"site {site.key!r} is a part of a packed weight, which graphs cannot hold; merge it first")
    host = GraphSite(model, site.weight, site.bias, changes_weight=plan.host != "graph")
    adapter = graph_adapter(host, site, plan.variant, plan.factors, plan.core)
    _record(adapter, plan)
    adapter.train(model.training)
    if plan.form == "residual" and not host.changes_weight:
        host.split()
    return adapter


def graph_adapter(host: GraphSite, site: Site, variant: Variant, factors: Factors, core: Core) -> Adapter:
    """An adapter for a place in a graph, not yet inlined."""
    adapter = make_adapter(host, site, variant, factors, core)
    host.adapter = adapter
    return adapter


def _record(adapter: Adapter, plan: AdapterPlan) -> None:
    """Record which weight the factors belong to; its hash is what files know it by, so that saving takes none."""
    weight = adapter.host.registered()
    if weight is not None and not weight.is_meta:
        fingerprint = adapter.base_weight.fingerprint()
        adapter.record = WeightRecord(fingerprint, trained=plan.trained, dtypes=plan.dtypes)
        adapter.record.adopt(adapter, weight)


def owners_of(model: nn.Module) -> Counter[int]:
    """How many modules register each parameter, by its identity."""
    return Counter(i for m in model.modules() for i in {id(p) for p in own_tensors(m) if p is not None})


def attach(model: nn.Module, plan: AdapterPlan, owners: Counter[int] | None = None) -> None:
    """Put an adapter on its site; within a transaction, which undoes what is done if it fails."""
    site = plan.site
    owner_path, _, local = site.weight.rpartition(".")
    owner = model.get_submodule(owner_path)
    bias = site.bias.rpartition(".")[2] if site.bias else None
    if (plan.host == "weight" or plan.form == "residual") and not base_weight_in(model, site).holds_entries:
        raise WeightError(
            f"site {site.key!r}: its weight is quantised, so that it has to be a module that is called, in delta form"
        )
    host: CalledModule | ReadWeight
    if plan.host == "weight":
        host = ReadWeight(owner, local, bias)
    elif plan.form == "residual" and not isinstance(owner, Convolution):
        host = ResidualModule(owner, shared=(owners or owners_of(model))[id(owner._parameters["weight"])] > 1)
    else:
        host = CalledModule(owner)
    adapter = make_adapter(host, site, plan.variant, plan.factors, plan.core)
    adapter.train(owner.training)
    host.attach(adapter)
    _record(adapter, plan)
    if host.name == "module":
        try:
            adapter.reschedule(plan.lowering)
        except InputError as error:
            raise InputError(f"site {site.key!r}: {error}") from error


def plan_of(paths: Mapping[nn.Module, str], key: str, site: Adapter) -> AdapterPlan:
    """The adapter of a site, of the model of these paths, as it can be rebuilt."""
    weight, bias = parameter_names(paths, site)
    d_out, d_in = site.factors.shape[-2:]
    place = Site(key, weight, bias, site.layout, d_out, d_in, stack=site.factors.stack, rows=site.rows)
    return AdapterPlan(
        place,
        site.host.name,
        site.variant,
        site.factors,
        site.core,
        site.lowering,
        site.form,
        trained=site.record.trained,
        dtypes=site.record.dtypes,
    )


def check_not_operated(present: Mapping[str, Adapter], sites: Sequence[Site]) -> None:
    """Refuse a second adapter on one site, and one on a part of it.

    Args:
        present: the adapters of the model.

    Raises:
        TargetError: one of the sites carries an adapter.
    """
    whole = {key.rpartition(".")[0] for key, site in present.items() if site.rows}
    if twice := [
        site.key
        for site in sites
        if site.key in (*present, *whole) or (site.rows and site.key.rpartition(".")[0] in present)
    ]:
        raise TargetError(
            f"site {twice[0]!r} already carries an adapter ({len(twice)} such); call undo_surgery or merge first"
        )
