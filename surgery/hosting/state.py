"""What an operated model remembers, and which modules of a tree are operated on.

The module that was given to ``apply_surgery`` is a *root*. It holds one plain object, ``vars(root)["_surgery"]``, and
nothing else of the user's is written to but the sites themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from passes.capture.inspect_model import Inspection
from passes.errors import InputError, SurgeryError
from passes.ir.forward_context import Call
from passes.ir.torch_internals import uncompiled
from surgery.errors import WeightError
from surgery.hosting.called_module import ATTRIBUTE
from surgery.hosting.coefficient import Coefficient
from surgery.hosting.row_record import RowRecord
from surgery.hosting.staleness import Staleness
from surgery.modules.adapter import Adapter
from surgery.modules.steering import Steering
from surgery.support.untrusted_files import JsonObject

if TYPE_CHECKING:
    from surgery.hosting.graph_surgery import GraphState

STATE = "_surgery"
T = TypeVar("T")


@dataclass
class Replaced:
    """A parameter or buffer that a load has brought, and the one that it stands for.

    Attributes:
        owner: the module that registers it, under ``name``.
        before: the model's own.
        brought: from the file.
        dtype: that it was brought in; it has another one where the model was cast since.
    """

    owner: nn.Module
    name: str
    before: torch.Tensor
    brought: torch.Tensor
    dtype: torch.dtype


@dataclass
class State:
    """What a root remembers.

    Attributes:
        requires_grad: flags of the parameters before surgery.
        inspection: of the model, or None where an adapter file said how each site is hosted.
        factorisation: what is noted of each site's factors, by key.
        original: of a graph, its graph, modules and parameters before surgery.
        steering: the coefficient that all adapters follow.
        coefficient: what was set, where it is more than a number; see :mod:`surgery.hosting.coefficient`.
        number: the coefficient that was set, as it was given.
        staleness: finds out whether a core was written to.
        replaced: what a load brought, with what it stands for.
        brought_in_place: names of frozen parameters that a checkpoint of what was trained has written to.
        buffers: fingerprints of the small persistent buffers at surgery, by name.
        rows: where the rows of a batch lie in the inputs of the sites.
        captured_call: of a graph, what ``to_graph`` captured it with.
    """

    requires_grad: dict[str, bool]
    inspection: Inspection | None = None
    factorisation: dict[str, JsonObject] = field(default_factory=dict)
    original: GraphState | None = None
    steering: Steering = field(default_factory=Steering)
    coefficient: Coefficient | None = None
    number: float = 1.0
    staleness: Staleness = field(default_factory=Staleness)
    replaced: list[Replaced] = field(default_factory=list)
    brought_in_place: set[str] = field(default_factory=set)
    buffers: dict[str, set[str]] = field(default_factory=dict)
    rows: RowRecord = field(default_factory=RowRecord)
    captured_call: Call | None = None


def unwrap(model: T) -> T:
    """The module behind ``torch.compile``'s wrapper."""
    return uncompiled(model)


def state_of(model: nn.Module) -> State | None:
    """The state of a root, or None; a user's module may have anything under the same name."""
    found = vars(model).get(STATE)
    return found if isinstance(found, State) else None


def record_of(model: nn.Module) -> State:
    """The state of a root.

    Raises:
        SurgeryError: the model is none.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module, found {type(model).__name__}")
    state = state_of(model)
    if state is None:
        inner = next((path for path, module in model.named_modules() if state_of(module) is not None), None)
        where = "" if inner is None else f" itself; its module {inner!r} does: give that one"
        advice = ": call apply_surgery or load_adapter first" if inner is None else ""
        raise SurgeryError(f"{type(model).__name__} carries no surgery{where}{advice}")
    return state


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """All adapters of a model by the keys of their sites, in the order of the modules."""
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module, found {type(model).__name__}")
    return adapters_in(module_paths(model))


def adapters_in(paths: Mapping[nn.Module, str]) -> dict[str, Adapter]:
    """All adapters of the model of these paths, by the keys of their sites."""
    return {_key(path, module, paths): module for module, path in paths.items() if isinstance(module, Adapter)}


def sites_of(root: nn.Module, state: State) -> dict[str, Adapter]:
    """The adapters of a root, found once: after each verb that puts adapters on or takes them off."""
    if state.staleness.sites is None:
        state.staleness.watch(adapters_of(root), state.steering)
    assert state.staleness.sites is not None
    return state.staleness.sites


def _key(path: str, adapter: Adapter, paths: Mapping[nn.Module, str]) -> str:
    """The key of a site in the model of these paths, where its adapter has a path."""
    if adapter.host.inlined:  # of the model itself, or of a graph module inside
        return f"{paths[adapter.host.owner]}.{adapter.key}".lstrip(".")
    if adapter.host.name == "module":
        return path.rpartition(".")[0]
    owner, _, local = path.rpartition("parametrizations.")
    owner, local = owner.rstrip("."), local.rpartition(".")[0]
    key = owner if local == "weight" and owner else f"{owner}.{local}".lstrip(".")
    part = adapter.key.rpartition(".")[2] if adapter.rows else ""
    return f"{key}.{part}" if part else key


def module_paths(model: nn.Module) -> dict[nn.Module, str]:
    """The path of every module, by the module."""
    return {module: path for path, module in model.named_modules()}


def parameter_names(paths: Mapping[nn.Module, str], site: Adapter) -> tuple[str, str | None]:
    """Names that the weight and bias of a site have, or had before surgery, in the model of these paths."""
    host = site.host
    path = "" if host.inlined else paths[host.owner]
    join = (lambda name: f"{path}.{name}") if path else (lambda name: name)
    return join(host.weight_name), join(host.bias_name) if host.bias_name else None


def own_tensors(module: nn.Module) -> list[torch.Tensor | None]:
    """The parameters that a module has itself, among them a weight that a remainder stands in for."""
    own: list[torch.Tensor | None] = list(module._parameters.values())
    site = residual_site(module)
    if site is not None:
        own.append(site.host.set_aside if site.host.keeps_base else site.get_buffer("W_res"))
    return own


def residual_site(module: nn.Module) -> Adapter | None:
    """The adapter of a called module in residual form, or None."""
    site = module._modules.get(ATTRIBUTE)
    return site if isinstance(site, Adapter) and site.form == "residual" and not site.host.inlined else None


def shared_tensors(modules: Iterable[nn.Module]) -> dict[int, torch.Tensor]:
    """Every tensor of some modules by identity, as the memo of a ``deepcopy`` that shares them."""
    found = list(modules)
    tensors = [tensor for m in found for tensor in (*own_tensors(m), *m._buffers.values())]
    states = [state for state in map(state_of, found) if state is not None]
    tensors += [one.before for state in states for one in state.replaced]
    return {id(tensor): tensor for tensor in tensors if tensor is not None}


def check_there(key: str, site: Adapter) -> None:
    """Refuse a site whose values are gone, or not loaded yet, where they are to be read.

    Raises:
        WeightError: some of its tensors are on the meta device.
    """
    held = (site.host.registered(), *site.core.parameters(), *site.factors.buffers())
    if any(tensor is not None and tensor.is_meta for tensor in held):
        raise WeightError(
            f"site {key!r}: its tensors are offloaded, or were never loaded: they are on the meta device, where there "
            "are no values to read; load them first, or bring back what accelerate offloads with "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )


def check_weights(adapters: Mapping[str, Adapter]) -> None:
    """Refuse base weights that are not those that the factors were made for; of a sharded model in every process.

    Raises:
        SurgeryError: names the first site, and says what to do.
        WeightError: its tensors are offloaded, or not loaded.
    """
    for key, site in adapters.items():
        check_there(key, site)
        if site.host.keeps_base:
            site.record.require(site)


def require_bases(adapters: Mapping[str, Adapter]) -> None:
    """Refuse what goes back to the model before surgery, where it has lost the weights of some sites.

    Raises:
        SurgeryError: a base weight was not kept.
    """
    if missing := [key for key, site in adapters.items() if not site.host.keeps_base]:
        raise SurgeryError(
            f"site {missing[0]!r}: its base weight was not kept (keep_base=False), so what was before surgery is gone; "
            "begin again from the base model"
        )


def restore_flags(
    model: nn.Module, flags: Mapping[str, bool], replaced: Iterable[tuple[str, torch.Tensor]] = ()
) -> None:
    """Set ``requires_grad`` by parameter name.

    Args:
        replaced: parameters that the model no longer has, and that another model may share, by name.
    """
    for name, parameter in (*model.named_parameters(), *replaced):
        if name in flags:
            parameter.requires_grad_(flags[name])


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters, a shared one counted once."""
    model = unwrap(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module, found {type(model).__name__}")
    unique = {id(p): p for module in model.modules() for p in own_tensors(module) if p is not None}
    sizes = [(p.numel(), p.requires_grad) for p in unique.values()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)
