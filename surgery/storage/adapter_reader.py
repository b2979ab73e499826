"""Read an adapter directory, and check all of it against a model before the model is touched."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from passes.analysis.linear_sites import Site
from passes.capture.inspect_model import graph_products
from surgery.errors import AdapterError, WeightError
from surgery.hosting.attach import AdapterPlan
from surgery.hosting.choose import why_not_called
from surgery.hosting.graph_surgery import original_graph
from surgery.hosting.state import adapters_of, module_paths, parameter_names
from surgery.storage.adapter_file import open_adapter
from surgery.storage.format_migration import Config
from surgery.storage.saved_names import SavedNames
from surgery.storage.site_entry import base_of, check_entry, overlap, read_parts, scale_of, variant_of
from surgery.support.fingerprint import DTYPES
from surgery.support.progress_bar import track


def read_adapter(model: nn.Module, path: Path, *, progress: bool = False) -> tuple[list[AdapterPlan], dict[str, Any]]:
    """Read an adapter into the adapter states of a model's sites.

    Args:
        progress: show a progress bar where factors are recomputed.

    Returns:
        The adapter states, and the record of each site's factorisation.

    Raises:
        AdapterError: the directory is missing, damaged, or of another base model.
    """
    present = adapters_of(model)
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    paths = module_paths(model)
    for site in present.values():  # a hosted weight is named as it was before surgery
        parameters[parameter_names(paths, site)[0]] = site.host.parameter()
    products: Collection[str] = ()
    names_of = SavedNames(model, parameters)
    if isinstance(model, fx.GraphModule):
        products = graph_products(model, original_graph(model))[0]
    with opened_adapter(path) as (config, tensors):
        expected: set[str] = set()
        grafts: list[AdapterPlan] = []
        notes: dict[str, Any] = {}
        of_weight: dict[str, list[Site]] = {}
        progress &= config["factors"] == "recompute"
        for saved_key, entry in track(list(config["sites"].items()), "factorising", enabled=progress):
            entry, key = _named_as_in(names_of, saved_key, entry)
            where = f"{str(path)!r}: site {saved_key!r}"
            graft, names = _read_site(model, where, (key, saved_key), entry, config, products, parameters, tensors)
            others = of_weight.setdefault(graft.site.weight, [])
            if any(overlap(graft.site, other) for other in others):
                raise AdapterError(f"{where} has the weight {graft.site.weight!r} of another site")
            grafts.append(graft)
            others.append(graft.site)
            expected |= names
            notes[key] = {"seed": entry["seed"]}
        if extra := sorted(set(tensors.keys()) - expected):
            raise AdapterError(f"{str(path)!r}: unexpected tensor {extra[0]!r} ({len(extra)} such)")
    return grafts, notes


def _named_as_in(names: SavedNames, key: str, entry: Any) -> tuple[Any, str]:
    """What a file says of a site, with the names that its parameters have in the model, and its key there."""
    if not isinstance(entry, dict) or not isinstance(entry.get("weight"), str):
        return entry, key
    named = {name: names.in_model(entry[name]) for name in ("weight", "bias") if isinstance(entry.get(name), str)}
    return entry | named, names.key_in_model(key, entry["weight"])


@contextlib.contextmanager
def opened_adapter(path: Path) -> Iterator[tuple[Config, Any]]:
    """Open an adapter directory without a model: its configuration, and its tensors by name.

    Raises:
        AdapterError: the directory is missing or damaged.
    """
    with open_adapter(path) as file, file.opened() as tensors:
        yield file.config, tensors


def _read_site(
    model: nn.Module,
    where: str,
    keys: tuple[str, str],
    entry: Any,
    config: Config,
    products: Collection[str],
    parameters: Mapping[str, torch.Tensor],
    tensors: Any,
) -> tuple[AdapterPlan, set[str]]:
    """The adapter state of a site, whose key in the model and in the file are given, and the names of its tensors."""
    check_entry(where, entry, parameters)
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
