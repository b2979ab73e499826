"""Read an adapter directory, and check all of it against a model before the model is touched."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from passes.analysis.linear_sites import Site
from surgery.errors import AdapterError, WeightError
from surgery.hosting.attach import AdapterPlan
from surgery.hosting.beside_cores import base_buffers, standing
from surgery.hosting.choose import why_not_called
from surgery.hosting.state import state_of
from surgery.storage.adapter_file import StoredTensors, open_adapter
from surgery.storage.saved_names import SavedNames
from surgery.storage.site_entry import base_of, check_entry, overlap, read_parts, scale_of, variant_of
from surgery.storage.trained_parameters import read_trained
from surgery.support.fingerprint import DTYPES
from surgery.support.progress_bar import track
from surgery.support.untrusted_files import JsonObject


@dataclass(frozen=True)
class LoadedAdapter:
    """What was read for a model, which is not touched yet.

    Attributes:
        config: the configuration.
        plans: the adapter of each site.
        notes: of each site's factorisation, by key.
        trained: what was trained beside the cores, by every name that it has in the model.
    """

    config: JsonObject
    plans: list[AdapterPlan]
    notes: JsonObject
    trained: dict[str, torch.Tensor]


def read_adapter(
    model: nn.Module,
    path: Path,
    hosted: Mapping[str, torch.Tensor],
    products: Collection[str],
    *,
    progress: bool = False,
) -> LoadedAdapter:
    """Read an adapter for a model.

    Args:
        hosted: the weights of the model that adapters host, by the names that they had before surgery.
        products: of a graph, keys of those that an adapter can be written beside.
        progress: show a progress bar where factors are recomputed.

    Raises:
        AdapterError: the directory is missing, damaged, or of another base model.
    """
    parameters, buffers = _own_tensors(model, hosted)
    names_of = SavedNames(model, {**parameters, **buffers})
    with opened_adapter(path) as (config, tensors):
        trained, expected = read_trained(model, repr(str(path)), config, names_of, parameters, buffers, tensors)
        parameters |= {name: tensor for name, tensor in trained.items() if name in parameters}
        plans: list[AdapterPlan] = []
        notes: JsonObject = {}
        of_weight: dict[str, list[Site]] = {}
        progress &= config["factors"] == "recompute"
        for saved_key, entry in track(list(config["sites"].items()), "factorising", enabled=progress):
            found, key = _named_as_in(names_of, saved_key, entry)
            where = f"{str(path)!r}: site {saved_key!r}"
            entry = check_entry(where, found, _with_computed_bias(model, found, parameters))
            plan, names = _read_site(model, where, (key, saved_key), entry, config, products, parameters, tensors)
            others = of_weight.setdefault(plan.site.weight, [])
            if any(overlap(plan.site, other) for other in others):
                raise AdapterError(f"{where} has the weight {plan.site.weight!r} of another site")
            plans.append(plan)
            others.append(plan.site)
            expected |= names
            notes[key] = {"seed": entry["seed"]}
        if extra := sorted(set(tensors.keys()) - expected):
            raise AdapterError(f"{str(path)!r}: unexpected tensor {extra[0]!r} ({len(extra)} such)")
    return LoadedAdapter(config, plans, notes, trained)


def _own_tensors(
    model: nn.Module, hosted: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The parameters and the buffers that a model would have without adapters, by every name."""
    parameters: dict[str, torch.Tensor] = {**dict(model.named_parameters(remove_duplicate=False)), **hosted}
    state = state_of(model)
    before = {id(standing(one)): one.before for one in state.replaced} if state else {}
    return tuple(  # type: ignore[return-value]
        {name: before.get(id(tensor), tensor) for name, tensor in table.items()}
        for table in (parameters, base_buffers(model))
    )


def _named_as_in(names: SavedNames, key: str, entry: object) -> tuple[object, str]:
    """What a file says of a site, with the names that its parameters have in the model, and its key there."""
    if not isinstance(entry, dict) or not isinstance(entry.get("weight"), str):
        return entry, key
    named = {name: names.in_model(entry[name]) for name in ("weight", "bias") if isinstance(entry.get(name), str)}
    return entry | named, names.key_in_model(key, entry["weight"])


@contextlib.contextmanager
def opened_adapter(path: Path) -> Iterator[tuple[JsonObject, StoredTensors]]:
    """Open an adapter directory without a model: its configuration, and its tensors by name.

    Raises:
        AdapterError: the directory is missing or damaged.
    """
    with open_adapter(path) as file, file.opened() as tensors:
        yield file.config, tensors


def _with_computed_bias(model: nn.Module, entry: object, parameters: Mapping[str, torch.Tensor]) -> Collection[str]:
    """Names of parameters, and that of a site's bias where a module computes it, as a pruned one does."""
    bias = entry.get("bias") if isinstance(entry, dict) else None
    if isinstance(bias, str) and bias not in parameters and bias.rpartition(".")[2] == "bias":
        owner = dict(model.named_modules()).get(bias.rpartition(".")[0])
        if isinstance(getattr(owner, "bias", None), torch.Tensor):
            return {*parameters, bias}
    return parameters


def _read_site(
    model: nn.Module,
    where: str,
    keys: tuple[str, str],
    entry: JsonObject,
    config: JsonObject,
    products: Collection[str],
    parameters: Mapping[str, torch.Tensor],
    tensors: StoredTensors,
) -> tuple[AdapterPlan, set[str]]:
    """The adapter state of a site, whose key in the model and in the file are given, and the names of its tensors."""
    key, saved_key = keys
    host = "graph" if key in products else entry["host"]
    owner = model.get_submodule(entry["weight"].rpartition(".")[0])
    if host == "module" and "forward" in vars(owner):  # accelerate's hooks call the forward that was there
        host = "weight"
    base = base_of(where, key, parameters[entry["weight"]], entry, host)
    if reason := base.why_not_there():
        raise WeightError(f"site {key!r}: {reason}")
    if host == "module" and (reason := why_not_called(owner, entry["layout"])) is not None:
        raise AdapterError(f"{where}: {type(owner).__name__} cannot host it as a called module: {reason}")
    default, stored = variant_of(config), config["factors"]
    parts = read_parts(where, saved_key, entry, default, base, tensors, host=host, stored=stored)
    variant, factors, core, names = parts
    core.scale = scale_of(where, entry, core)
    *lead, d_out, d_in = factors.shape
    stack = lead[0] if lead else None
    site = Site(key, entry["weight"], entry.get("bias"), entry["layout"], d_out, d_in, stack=stack, rows=base.rows)
    trained, dtypes = entry.get("trained", False), frozenset({DTYPES[entry["dtype"]]})
    return AdapterPlan(site, host, variant, factors, core, trained=trained, dtypes=dtypes), names
