"""Ways to host an adapter: as the module that is called, as a parametrisation of a weight that is read, or in a graph.

``attach`` and ``detach`` are exact inverses: same modules, same parameter objects, same order, same class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from passes.analysis.linear_sites import Site
from passes.capture.module_calls import CallRecord
from passes.errors import CaptureError, InputError, SurgeryError
from passes.ir.linear_modules import layout_of_forward
from passes.ir.module_utils import private_module
from passes.transforms.insert import Insert
from passes.transforms.propagate_metadata import Annotate
from surgery.errors import TargetError
from surgery.hosting.graph_surgery import GraphState, copy_whole, register_sites, rewrite
from surgery.lowerings._cost_model import schedule_of
from surgery.lowerings.dense import give_handle
from surgery.modules.adapter import SSpaceLinear, SSpaceWeight
from surgery.modules.core import Core, Factors
from surgery.modules.graph_host_module import SSpaceNode
from surgery.modules.residual_host import SSpaceResidual, join, split
from surgery.variants import Variant

ATTRIBUTES = ("variant", "factors", "core", "layout", "base_class")
OWN = ("lowering", "schedule", "handle", "_kept")  # what a site keeps beside them


@dataclass(frozen=True)
class Graft:
    """Everything that one site needs to be operated on, made before the model is touched."""

    site: Site
    host: str  # "module", "weight" or "graph"
    variant: Variant
    factors: Factors
    core: Core
    lowering: str = "auto"
    form: str = "delta"
    keep_base: bool = True


def choose_host(model: nn.Module, site: Site, calls: CallRecord | None) -> str:
    """Host a site as a module only where the module is known to be called, and its weight never read without the call.

    Without a record of calls, children of PyTorch's own composite modules are taken to be read (as
    ``nn.MultiheadAttention`` does), and any other linear module to be called.
    """
    owner_path, _, local = site.weight.rpartition(".")
    owner = model.get_submodule(owner_path)
    plain = local == "weight" and is_module_host(type(owner), site.layout) and "forward" not in vars(owner)
    if not plain or owner is model or any(hasattr(owner, name) for name in (*ATTRIBUTES, "form", "W_res")):
        return "weight"
    if calls is not None and site.weight in calls.read:
        return "weight"
    if calls is not None and site.key in calls.called:
        return "module"
    parent = model.get_submodule(owner_path.rpartition(".")[0])
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    composite = type(parent).__module__.startswith("torch.nn.") and not isinstance(parent, containers)
    return "weight" if composite else "module"


def attach_all(model: nn.Module, grafts: Iterable[Graft], original: GraphState | None) -> None:
    """Put adapters on their sites; the caller undoes what is done if one of them fails.

    Args:
        original: of a graph patient, what it was before any surgery.
    """
    nodes = []
    reads = {n.target for n in original.graph.nodes if n.op == "get_attr"} if original else set()
    grafts = list(grafts)
    owners = owners_of(model) if original is None and any(graft.form == "residual" for graft in grafts) else None
    for graft in grafts:
        if graft.host == "graph" or graft.site.weight in reads:
            nodes.append(_node(model, graft))
            continue
        if original is not None:  # a module that a graph calls may be another model's too
            assert isinstance(model, fx.GraphModule)
            private_module(model, graft.site.weight.rpartition(".")[0], original.modules)
            copy_whole(model)
        attach(model, graft, owners)
    if nodes:
        assert isinstance(model, fx.GraphModule)
        assert original is not None
        rewrite(model, [Insert(register_sites(model, original.graph, nodes)), Annotate()])


def _node(model: nn.Module, graft: Graft) -> SSpaceNode:
    site, kind = graft.site, "product" if graft.host == "graph" else "weight"
    if site.rows:
        raise CaptureError(f"site {site.key!r} is a part of a packed weight, which graphs cannot hold; merge it first")
    names = (site.weight, site.bias)
    node = SSpaceNode(model, site.key, names, graft.variant, graft.factors, graft.core, site.layout, kind=kind)
    node.train(model.training)
    if graft.form == "residual" and kind == "product":
        node.split()
    return node


def is_module_host(cls: type[nn.Module], layout: str) -> bool:
    """Tell ``nn.Linear`` and ``Conv1D`` from subclasses, whose own methods a change of class would hide."""
    forward = cls.forward
    return forward.__qualname__ == f"{cls.__name__}.forward" and layout_of_forward(forward) == layout


def owners_of(model: nn.Module) -> Counter[int]:
    """How many modules register each parameter, by its identity."""
    return Counter(i for m in model.modules() for i in {id(p) for p in weights_of(m) if p is not None})


def attach(model: nn.Module, graft: Graft, owners: Counter[int] | None = None) -> None:
    """Put an adapter on its site; within a transaction, which undoes what is done if it fails."""
    owner_path, _, local = graft.site.weight.rpartition(".")
    owner = model.get_submodule(owner_path)
    bias = graft.site.bias.rpartition(".")[2] if graft.site.bias else None
    site = graft.site
    adapter = SSpaceWeight(owner, local, bias, site.key, site.rows) if graft.host == "weight" else owner
    values = (graft.variant, graft.factors, graft.core, graft.site.layout, type(owner))
    for name, value in zip(ATTRIBUTES, values, strict=True):
        setattr(adapter, name, value)
    for part in (graft.factors, graft.core):
        part.train(owner.training)
    if isinstance(adapter, SSpaceWeight):
        parametrize.register_parametrization(owner, local, adapter, unsafe=True)
        return
    owner.__class__ = SSpaceLinear
    if graft.form == "residual":
        weight = owner._parameters["weight"]
        counts = owners_of(model) if owners is None else owners
        split(owner, shared=counts[id(weight)] > 1)
    _schedule(owner, graft)


def _schedule(site: nn.Module, graft: Graft) -> None:
    """Decide when a called site is computed in which lowering."""
    assert isinstance(site, SSpaceLinear)
    site.lowering = graft.lowering
    try:
        site.schedule = schedule_of(site, graft.lowering)
    except InputError as error:
        raise InputError(f"site {graft.site.key!r}: {error}") from error
    give_handle(site)


def detach(site: SSpaceLinear) -> None:
    """Take an adapter off its site; the owner is what it was."""
    assert not isinstance(site, SSpaceNode), "adapters in a graph are taken out together"
    if not isinstance(site, SSpaceWeight):
        _strip(site, site.base_class)
        return
    owner, name = site.owner[0], site.weight_name
    hosted: Any = owner.parametrizations[name]  # type: ignore[index,operator]
    if len(hosted) > 1:  # other parts of the weight
        del hosted[next(i for i, other in enumerate(hosted) if other is site)]
        return
    cls = type(owner)  # a deep copy shares it: without a class of its own, removal would delete the original's property
    owner.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
    for parameter in site.order:
        if parameter in owner._parameters:
            owner._parameters[parameter] = owner._parameters.pop(parameter)


def _strip(module: nn.Module, cls: type[nn.Module]) -> None:
    if isinstance(module, SSpaceResidual):
        join(module)
    module.__class__ = cls
    for name in (*ATTRIBUTES, *OWN):
        if name in vars(module) or name in module._modules:
            delattr(module, name)


def replace_weight(site: SSpaceLinear, weight: torch.Tensor) -> None:
    """Take an adapter off and give its owner a new weight parameter; the old tensor is not written."""
    owner: nn.Module = site.owner[0] if isinstance(site, SSpaceWeight) else site
    name = site.weight_name if isinstance(site, SSpaceWeight) else "weight"
    base, requires_grad = site.parameter, site.parameter.requires_grad
    if isinstance(site, SSpaceWeight) and site.rows is not None:
        start, stop = site.rows
        weight = torch.cat([base.detach()[:start], weight, base.detach()[stop:]])
    detach(site)
    parameter = nn.Parameter(weight, requires_grad=requires_grad)
    if parametrize.is_parametrized(owner, name):
        owner.parametrizations[name].original = parameter  # type: ignore[index,operator,union-attr]
    else:
        owner._parameters[name] = parameter


def operated_sites(model: nn.Module) -> dict[str, SSpaceLinear]:
    """All adapters of a model by the keys of their sites, in the order of the modules."""
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module, found {type(model).__name__}")
    found: dict[str, SSpaceLinear] = {}
    paths = {id(module): path for path, module in model.named_modules()}
    for path, module in model.named_modules():
        if isinstance(module, SSpaceNode):  # of the model itself, or of a graph module inside
            found[f"{paths[id(module.owner[0])]}.{module.key}".lstrip(".")] = module
        elif isinstance(module, SSpaceWeight):
            owner, _, local = path.rpartition("parametrizations.")
            owner, local = owner.rstrip("."), local.rpartition(".")[0]
            key = owner if local == "weight" and owner else f"{owner}.{local}".lstrip(".")
            found[f"{key}.{module.part}" if module.part else key] = module
        elif isinstance(module, SSpaceLinear):
            found[path] = module
    return found


def weights_of(module: nn.Module) -> list[torch.Tensor | None]:
    """The parameters that a module has itself, among them a weight that a remainder stands in for."""
    own: list[torch.Tensor | None] = list(module._parameters.values())
    if isinstance(module, SSpaceResidual):
        own.append(module.parameter if module.keeps_base else module.W_res)
    return own


def require_bases(model: nn.Module) -> None:
    """Refuse what goes back to the model before surgery, where it has lost its weights.

    Raises:
        SurgeryError: a base weight was not kept.
    """
    if missing := [key for key, site in operated_sites(model).items() if not site.keeps_base]:
        raise SurgeryError(
            f"site {missing[0]!r}: its base weight was not kept (keep_base=False), so what was before surgery is gone; "
            "begin again from the base model"
        )


def host_of(site: SSpaceLinear) -> str:
    """How a site is hosted: "module", "weight" or "graph"."""
    if isinstance(site, SSpaceNode):
        return "graph" if site.kind == "product" else "weight"
    return "weight" if isinstance(site, SSpaceWeight) else "module"


def check_not_operated(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse a second adapter on one site, and one on a part of it.

    Raises:
        TargetError: one of the sites carries an adapter.
    """
    present = operated_sites(model)
    whole = {key.removesuffix(f".{site.part}") for key, site in present.items() if getattr(site, "part", "")}
    if twice := [
        site.key
        for site in sites
        if site.key in (*present, *whole) or (site.rows and site.key.rpartition(".")[0] in present)
    ]:
        raise TargetError(
            f"site {twice[0]!r} already carries an adapter ({len(twice)} such); call undo_surgery or merge first"
        )
