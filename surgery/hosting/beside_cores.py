"""Parameters that belong to what was trained, beside the cores: a new head, biases, norms, whole embeddings.

What a load brings stands in the place of the model's own parameters, which are never written; undoing puts these back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from surgery.hosting.state import Replaced, State, adapters_of, module_paths, parameter_names, record_of
from surgery.modules.adapter import Adapter


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters but those of adapters, by the names that they have without adapters; a tied one by each name."""
    found = adapters_of(model)
    of_adapters = {id(parameter) for site in found.values() for parameter in site.parameters()}
    hosted = _hosted_names(model, found.values())
    names = {
        hosted.get(name, name): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) not in of_adapters
    }
    paths = module_paths(model)
    for site in found.values():
        if site.host.set_aside is not None:
            names[parameter_names(paths, site)[0]] = site.host.set_aside
    return names


def _hosted_names(model: nn.Module, found: Iterable[Adapter]) -> dict[str, str]:
    """Names that weights had before they were parametrised by an adapter, by the names that they have since."""
    weights: dict[int, set[str]] = {}
    for site in found:
        if site.host.name == "weight":
            weights.setdefault(id(site.host.owner), set()).add(site.host.weight_name)
    names = {}
    for path, module in model.named_modules(remove_duplicate=False) if weights else ():
        prefix = f"{path}." if path else ""
        for local in weights.get(id(module), ()):
            names[f"{prefix}parametrizations.{local}.original"] = prefix + local
    return names


def beside_cores(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that belong to what was trained, by the names that they have without adapters.

    These are those outside the cores that require gradients, and those that a load or a checkpoint has brought.
    """
    state = record_of(model)
    brought = {id(one.brought) for one in state.replaced}
    return {
        name: parameter
        for name, parameter in base_parameters(model).items()
        if parameter.requires_grad or id(parameter) in brought or name in state.brought_in_place
    }


def bring(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> list[Replaced]:
    """Put parameters in the place of a model's own, by name; one under several names is tied."""
    replaced = []
    for name, parameter in trained.items():
        path, _, local = name.rpartition(".")
        owner = model.get_submodule(path)
        before = owner._parameters[local]
        if before is not None and before is not parameter:  # a module may have several paths
            replaced.append(Replaced(owner, local, before, parameter, parameter.dtype))
            owner._parameters[local] = parameter
    return replaced


def put_back(state: State) -> None:
    """Put the model's own parameters back; they follow conversions of the model since they were replaced."""
    for one in reversed(state.replaced):
        dtype = one.before.dtype if one.brought.dtype == one.dtype else one.brought.dtype
        if (one.before.device, one.before.dtype) != (one.brought.device, dtype):
            one.before.data = one.before.detach().to(one.brought.device, dtype)
        one.owner._parameters[one.name] = one.before


def brought_by_name(model: nn.Module, state: State) -> dict[str, nn.Parameter]:
    """What loads have brought to a root, by the names that it has in a model around it, or in the root itself."""
    paths = module_paths(model)
    return {".".join(filter(None, (paths[id(one.owner)], one.name))): one.brought for one in state.replaced}


def trained_in_place(model: nn.Module) -> list[str]:
    """Names of what was trained outside the cores in the model's own parameters, whose old values are gone."""
    brought = {id(one.brought) for one in record_of(model).replaced}
    return [name for name, parameter in beside_cores(model).items() if id(parameter) not in brought]


def say_what_stays(names: list[str]) -> None:
    """Warn that what was trained in place is not undone."""
    if names:
        warnings.warn(
            f"{names[0]!r} ({len(names)} such) could be trained in place, beside the cores: it stays as it is now, "
            "since only what load_adapter brings is replaced; load the base model again to have its old values",
            stacklevel=3,
        )
