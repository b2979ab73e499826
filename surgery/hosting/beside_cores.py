"""What was trained beside the cores: a new head, biases, norms, whole embeddings, and buffers that forwards write to.

What a load brings stands in the place of the model's own tensors, which are never written; undoing puts these back.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from passes.ir.module_utils import private_module
from surgery.hosting.state import Replaced, State, adapters_in, module_paths, parameter_names, record_of
from surgery.support.fingerprint import cast_fingerprints, fingerprint

LARGEST = 2**16  # entries of a buffer that is watched: running statistics are small


class _Walk:
    """All modules of a model, a shared one by each of its paths, and the adapters among them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.named_modules(remove_duplicate=False))
        self.paths: dict[nn.Module, str] = {}
        for path, module in self.modules:
            self.paths.setdefault(module, path)
        self.adapters = list(adapters_in(self.paths).values())


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters but those of adapters, by the names that they have without adapters; a tied one by each name."""
    return _parameters(_Walk(model))


def base_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers outside adapters, by name; one that is shared, by each name."""
    return _buffers(_Walk(model))


def _parameters(walk: _Walk) -> dict[str, nn.Parameter]:
    of_adapters = {id(parameter) for site in walk.adapters for parameter in site.parameters()}
    hosted = _hosted_names(walk)
    names = {
        hosted.get(name, name): parameter
        for path, module in walk.modules
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False)
        if id(parameter) not in of_adapters
    }
    for site in walk.adapters:
        if site.host.set_aside is not None:
            names[parameter_names(walk.paths, site)[0]] = site.host.set_aside
    return names


def _buffers(walk: _Walk) -> dict[str, torch.Tensor]:
    inside = {id(module) for site in walk.adapters for module in site.modules()}
    return {
        f"{path}.{name}".lstrip("."): buffer
        for path, module in walk.modules
        if id(module) not in inside
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _hosted_names(walk: _Walk) -> dict[str, str]:
    """Names that weights had before they were parametrised by an adapter, by the names that they have since."""
    weights: dict[int, set[str]] = {}
    for site in walk.adapters:
        if site.host.name == "weight":
            weights.setdefault(id(site.host.owner), set()).add(site.host.weight_name)
    names = {}
    for path, module in walk.modules if weights else ():
        prefix = f"{path}." if path else ""
        for local in weights.get(id(module), ()):
            names[f"{prefix}parametrizations.{local}.original"] = prefix + local
    return names


def watched_buffers(model: nn.Module) -> dict[str, set[str]]:
    """Fingerprints of small persistent buffers, as the running statistics of a batch norm: training writes to them.

    They are those of the buffer itself, and of what casts of the model make of it.
    """
    return {
        _uncompiled(name): {
            fingerprint(buffer),
            *(cast_fingerprints(buffer) if buffer.is_floating_point() else {}).values(),
        }
        for name, buffer in base_buffers(model).items()
        if type(buffer) is torch.Tensor and not buffer.is_meta and buffer.numel() <= LARGEST
    }


def _uncompiled(name: str) -> str:
    """The name of a buffer, also where its layer was compiled in place since."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def beside_cores(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that belong to what was trained, by the names that they have without adapters.

    These are the parameters outside the cores that require gradients, the small buffers that were written to since
    surgery, and what a load or a checkpoint has brought.
    """
    state, walk = record_of(model), _Walk(model)
    brought = {id(tensor) for tensor in map(standing, state.replaced)} | {id(one.brought) for one in state.replaced}
    found: dict[str, torch.Tensor] = {
        name: parameter
        for name, parameter in _parameters(walk).items()
        if parameter.requires_grad or id(parameter) in brought or name in state.brought_in_place
    }
    for name, buffer in _buffers(walk).items():
        before = state.buffers.get(_uncompiled(name))
        is_written = before is not None and not buffer.is_meta and fingerprint(buffer) not in before
        if is_written or id(buffer) in brought or name in state.brought_in_place:
            found[name] = buffer
    return found


def _table(owner: nn.Module, tensor: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Where a module registers a tensor of this kind."""
    return owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers  # type: ignore[return-value]


def standing(one: Replaced) -> torch.Tensor:
    """What stands now where a load has brought something: conversions make new buffers."""
    found = _table(one.owner, one.before).get(one.name)
    return one.brought if found is None else found


def bring(model: nn.Module, trained: Mapping[str, torch.Tensor]) -> list[Replaced]:
    """Put tensors in the place of a root's own parameters and buffers, by name; one under several names is tied."""
    replaced, original = [], record_of(model).original
    for name, tensor in trained.items():
        path, _, local = name.rpartition(".")
        owner = model.get_submodule(path)
        if original is not None:  # a module that a graph calls may be another model's too
            owner = private_module(model, path, original.modules)
        table = _table(owner, tensor)
        before = table[local]
        if before is not None and before is not tensor:  # a module may have several paths
            replaced.append(Replaced(owner, local, before, tensor, tensor.dtype))
            table[local] = tensor
    return replaced


def put_back(state: State) -> None:
    """Put the model's own tensors back; they follow conversions of the model since they were replaced."""
    for one in reversed(state.replaced):
        now = standing(one)
        dtype = one.before.dtype if now.dtype == one.dtype else now.dtype
        if (one.before.device, one.before.dtype) != (now.device, dtype):
            one.before.data = one.before.detach().to(now.device, dtype)
        _table(one.owner, one.before)[one.name] = one.before


def brought_by_name(model: nn.Module, state: State) -> dict[str, torch.Tensor]:
    """What loads have brought to a root, by the names that it has in a model around it, or in the root itself."""
    paths = module_paths(model)
    return {".".join(filter(None, (paths[one.owner], one.name))): standing(one) for one in state.replaced}


def trained_in_place(model: nn.Module) -> list[str]:
    """Names of what was trained outside the cores in the model's own tensors, whose old values are gone."""
    brought = {id(standing(one)) for one in record_of(model).replaced}
    return [name for name, tensor in beside_cores(model).items() if id(tensor) not in brought]


def say_what_stays(names: list[str]) -> None:
    """Warn that what was trained in place is not undone."""
    if names:
        warnings.warn(
            f"{names[0]!r} ({len(names)} such) could be trained in place, beside the cores: it stays as it is now, "
            "since only what load_adapter brings is replaced; load the base model again to have its old values",
            stacklevel=3,
        )
