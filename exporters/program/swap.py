"""Another adapter in a program that is already exported: same base, same shapes, other numbers; nothing is rebuilt.

With torch alone, by the names that ``state_dict`` has (nothing is checked: AOTInductor takes a wrong shape silently)::

    program = torch._inductor.aoti_load_package("model.pt2")
    program.load_constants({"coeff": torch.tensor(0.5)}, check_full_update=False)
    program.load_constants({"model.layers.0.mlp.up_proj.core.g": g}, check_full_update=False)

    program = torch.export.load("model.pt2").module()
    with torch.no_grad():
        program.coeff.fill_(0.5)
        program.get_parameter("model.layers.0.mlp.up_proj.core.g").copy_(g)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from passes.errors import InputError
from surgery.errors import AdapterError, ExportError
from surgery.storage.adapter_reader import opened_adapter
from surgery.storage.site_entry import SITE_FIELDS, variant_of
from surgery.support.fingerprint import dtype_name, fingerprint
from surgery.support.untrusted_files import parse_json, path_of
from surgery.variants import Variant
from surgery.verbs.steer_and_merge import sites

KNOB = "coeff"
FORMAT, VERSION = "sspace-program", 1
PARTS = ("core", "factors")
Tensors = dict[str, dict[str, torch.Tensor]]  # by part and name


def contents(model: nn.Module, knob: torch.Tensor, read: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What a live program holds for each site, for :func:`swap` to check an adapter against.

    Args:
        knob: the buffer that steers.
        read: the tensors that the program reads, by its names; others cannot be replaced.
    """
    names: dict[Any, list[str]] = {}  # by identity: a module that is registered twice has several names
    for name, tensor in read.items():
        names.setdefault(_place(tensor), []).append(name)
    entries = {}
    for key, site in sites(model).items():
        entries[key] = _entry(site)
        for part, tensors in _tensors(site).items():
            entries[key][part] = {n: {"names": names.get(_place(t), []), **_kind(t)} for n, t in tensors.items()}
        for name, tensor in _tensors(site)["factors"].items():
            entries[key]["factors"][name]["fingerprint"] = fingerprint(tensor)
    return {"version": VERSION, "knob": KNOB, "dtype": dtype_name(knob), "device": str(knob.device), "sites": entries}


def names_in(meta: Mapping[str, Any]) -> set[str]:
    """Names of all tensors of a live program that can be replaced, from the metadata of its graph."""
    held = meta.get("custom", {}).get(FORMAT, {"sites": {}})
    tensors = [tensor for entry in held["sites"].values() for part in PARTS for tensor in entry[part].values()]
    return {held["knob"] for _ in tensors[:1]} | {name for tensor in tensors for name in tensor["names"]}


def swap(loaded: Any, adapter: nn.Module | str | os.PathLike[str] | None = None, *, coeff: float | None = None) -> None:
    """Put another adapter of the same base into a loaded live program, in place and all or nothing; set its knob.

    Args:
        loaded: what ``torch._inductor.aoti_load_package`` or ``torch.export.load`` gave, or the latter's ``module()``.
        adapter: an adapter directory, or a model that is operated on; None to set the knob alone.
        coeff: the knob's new value; as it is if None.

    Raises:
        ExportError: the program is not a live one of this library.
        AdapterError: the adapter is of another base model, variant, rank or set of sites.
        InputError: coeff is not a finite number.
    """
    held = _contents_of(loaded)
    values: dict[str, torch.Tensor] = {}
    if adapter is not None:
        values = _values(held["sites"], _adapter(adapter))
    if coeff is not None:
        if not isinstance(coeff, int | float) or not math.isfinite(coeff):
            raise InputError(f"coeff of a program must be a finite number, found {coeff!r}")
        values[held["knob"]] = torch.tensor(float(coeff), dtype=getattr(torch, held["dtype"]))
    _put(loaded, {name: tensor.detach().to(held["device"]) for name, tensor in values.items()})


def _contents_of(loaded: Any) -> dict[str, Any]:
    if hasattr(loaded, "get_metadata"):
        try:
            held = parse_json(loaded.get_metadata().get(FORMAT, "null"))
        except ValueError as error:
            raise ExportError(f"the program's description of its adapter is damaged: {error}") from error
    else:
        graph = loaded.graph_module if isinstance(loaded, ExportedProgram) else loaded
        held = getattr(graph, "meta", {}).get("custom", {}).get(FORMAT)
    if held is None:
        raise ExportError(
            f"this {type(loaded).__name__} holds no adapter that can be replaced: export with mode='live', and give "
            "what aoti_load_package or torch.export.load returned"
        )
    version = held.get("version") if isinstance(held, dict) else None
    if type(version) is not int or version != VERSION:
        raise ExportError(f"the program has format version {version!r:.80}, expected {VERSION}: export it again")
    if not _whole(held):
        raise ExportError("the program's description of its adapter is damaged: export it again")
    return held  # type: ignore[no-any-return]


def _whole(held: dict[str, Any]) -> bool:
    """Whether what a program says of its adapter is what :func:`contents` makes."""
    kinds = {"variant": str, "hyperparameters": dict, "r": int, "fingerprint": str, "core": dict, "factors": dict}
    sites: dict[str, Any] = held.get("sites") or {}
    if not _has(held, {"knob": str, "dtype": str, "device": str, "sites": dict}):
        return False
    if not all(_has(entry, kinds) for entry in sites.values()) or held["dtype"] not in ("float32", "float64"):
        return False
    try:
        torch.device(held["device"])
    except RuntimeError:
        return False
    tensors = [tensor for entry in sites.values() for part in PARTS for tensor in entry[part].values()]
    shaped = all(_has(tensor, {"names": list, "shape": list, "dtype": str}) for tensor in tensors)
    return shaped and all(isinstance(name, str) for tensor in tensors for name in tensor["names"])


def _has(value: Any, kinds: Mapping[str, type]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def _adapter(adapter: nn.Module | str | os.PathLike[str]) -> dict[str, tuple[dict[str, Any], Tensors]]:
    """What each site of an adapter says of itself, and its tensors."""
    if isinstance(adapter, nn.Module):
        return {key: (_entry(site), _tensors(site)) for key, site in sites(adapter).items()}
    found = {}
    with opened_adapter(path_of(adapter, AdapterError)) as (config, tensors):
        if config["factors"] != "exact":
            raise AdapterError(
                f"{str(adapter)!r} holds no factors, and a program has no weights to make them of: load it on the "
                "model, and give that, or save it with factors='exact'"
            )
        names = sorted(tensors.keys())
        for key, entry in config["sites"].items():
            if not isinstance(entry, dict) or any(not isinstance(entry.get(n), k) for n, k in SITE_FIELDS.items()):
                raise AdapterError(f"{str(adapter)!r}: the configuration of site {key!r} is damaged")
            variant = variant_of(entry if "variant" in entry else config)
            parts: Tensors = {}
            for part in PARTS:
                start = f"{key}.{part}."
                parts[part] = {n.removeprefix(start): tensors.get_tensor(n) for n in names if n.startswith(start)}
            found[key] = ({**entry, **_variant_entry(variant)}, parts)
    return found


def _values(held: Mapping[str, Any], adapter: Mapping[str, tuple[dict[str, Any], Tensors]]) -> dict[str, torch.Tensor]:
    """New values by the program's names, after every check."""
    if odd := sorted(set(held) ^ set(adapter)):
        where, other = ("program", "adapter") if odd[0] in held else ("adapter", "program")
        raise AdapterError(f"site {odd[0]!r} is in the {where} and not in the {other} ({len(odd)} such)")
    values: dict[str, torch.Tensor] = {}
    for key, (entry, parts) in adapter.items():
        mine = held[key]
        if entry["fingerprint"] != mine["fingerprint"]:
            raise AdapterError(f"site {key!r}: the adapter was made for another base weight (fingerprints differ)")
        for name in ("variant", "r"):
            if entry[name] != mine[name]:
                raise AdapterError(f"site {key!r}: {name} is {entry[name]!r}, the program has {mine[name]!r}")
        own, wanted = entry["hyperparameters"], mine["hyperparameters"]
        if odd := sorted(name for name in own | wanted if name != "r" and own.get(name) != wanted.get(name)):
            raise AdapterError(
                f"site {key!r}: {odd[0]} is {own.get(odd[0])!r}, the program has {wanted.get(odd[0])!r} in its code"
            )
        for part in PARTS:
            if parts[part].keys() != mine[part].keys():
                raise AdapterError(f"site {key!r}: {part} has {sorted(parts[part])}, expected {sorted(mine[part])}")
            for name, tensor in parts[part].items():
                values |= _value(f"site {key!r}: {part}.{name}", tensor, mine[part][name])
    return values


def _value(where: str, tensor: torch.Tensor, wanted: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    kind = _kind(tensor)
    if kind != {name: wanted[name] for name in kind}:
        raise AdapterError(f"{where} is {kind['dtype']} {kind['shape']}, expected {wanted['dtype']} {wanted['shape']}")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{where} is not finite")
    if wanted.get("fingerprint") == fingerprint(tensor):
        return {}  # the same factors
    if "fingerprint" in wanted and not wanted["names"]:
        raise AdapterError(f"{where} differs from the program's, which has folded it: export the adapter anew")
    return dict.fromkeys(wanted["names"], tensor)  # none of a core that no product of the program reads


def _put(loaded: Any, values: dict[str, torch.Tensor]) -> None:
    if hasattr(loaded, "load_constants"):
        if missing := sorted(set(values) - set(loaded.get_constant_fqns())):
            raise ExportError(f"the package has no constant {missing[0]!r} ({len(missing)} such): export it again")
        loaded.load_constants(values, check_full_update=False)
        return
    tensors = loaded.state_dict if isinstance(loaded, ExportedProgram) else loaded.state_dict(keep_vars=True)
    for name, value in values.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise ExportError(f"the program has no tensor {name!r} of shape {list(value.shape)}: export it again")
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)


def _entry(site: Any) -> dict[str, Any]:
    own = getattr(site, "base_fingerprint", None) or fingerprint(site.weight)
    return {**_variant_entry(site.variant), "r": site.factors.rank, "fingerprint": own}


def _variant_entry(variant: Variant) -> dict[str, Any]:
    return {"variant": variant.name, "hyperparameters": json.loads(json.dumps(variant.hyperparameters()))}


def _tensors(site: Any) -> Tensors:
    return {"core": site.core.tensors(), "factors": {name: getattr(site.factors, name) for name in ("U", "S", "Vh")}}


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where the numbers of a tensor are."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _kind(tensor: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor)}
