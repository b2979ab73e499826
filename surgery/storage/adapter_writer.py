"""The content of an adapter's files, made of an operated model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from passes.capture.capture import is_pretrained
from surgery.errors import AdapterError
from surgery.hosting.beside_cores import beside_cores
from surgery.hosting.state import adapters_in, check_there, module_paths, parameter_names, record_of
from surgery.modules.adapter import Adapter
from surgery.storage.adapter_config import FORMAT, mirror
from surgery.storage.adapter_file import CONFIG, TENSORS, encode
from surgery.storage.factor_digest import check_follows, recompute
from surgery.storage.format_migration import VERSION
from surgery.storage.model_card import card
from surgery.storage.saved_names import SavedNames
from surgery.storage.saved_values import SavedValues
from surgery.storage.site_entry import FACTORS
from surgery.storage.trained_parameters import trained_entries
from surgery.support.atomic_directory import Content
from surgery.support.hf_config import base_model_name
from surgery.support.progress_bar import track
from surgery.support.untrusted_files import JsonObject


@dataclass(frozen=True)
class AdapterContent:
    """What is written of an adapter.

    Attributes:
        files: the adapter and its mirror, by name; the first file is the one that counts.
        page: a model card.
    """

    files: dict[str, Content]
    page: bytes


def adapter_content(
    model: nn.Module, values: SavedValues, optional: JsonObject, *, factors: str = "exact", progress: bool = False
) -> AdapterContent:
    """The content of an adapter's files; the same adapter gives the same bytes.

    Args:
        optional: further fields of the configuration.
        factors: "exact" or "recompute".

    Raises:
        AdapterError: the adapter would not load: a tensor is not finite, factors do not follow from their weight.
    """
    notes, paths = record_of(model).factorisation, module_paths(model)
    present = adapters_in(paths)
    first = next(iter(present.values())).variant
    names = SavedNames(model, ())
    entries: dict[str, JsonObject] = {}
    tensors: dict[str, torch.Tensor] = {}
    size = 0
    for key, site in track(list(present.items()), "saving", enabled=progress):
        check_there(key, site)
        seed = notes.get(key, {}).get("seed", 0)
        weight, bias = parameter_names(paths, site)
        saved_key = names.saved_key(key, weight)
        entries[saved_key] = _entry(key, site, seed, values) | {
            "weight": names.saved(weight),
            "bias": names.saved(bias) if bias and _is_registered(site) else None,
        }
        if site.variant != first:
            entries[saved_key] |= {"variant": site.variant.name, "hyperparameters": site.variant.hyperparameters()}
        for name, tensor in site.core.tensors().items():
            tensors[f"{saved_key}.core.{name}"] = values.of(tensor).detach().to("cpu", tensor.dtype).contiguous()
        size += sum(parameter.numel() for parameter in site.core.parameters())
        if factors == "recompute":
            tensors[f"{saved_key}.digest"] = _digest(key, site, seed)
            continue
        for name in FACTORS:
            tensors[f"{saved_key}.factors.{name}"] = getattr(site.factors, name).detach().cpu().contiguous()
    beside = beside_cores(model)
    trained, more = trained_entries(beside, names, values.of)
    if twice := sorted(tensors.keys() & more.keys()):
        raise AdapterError(f"{twice[0]!r} would be the name of two tensors in the file: rename the module")
    written = {*trained, *(name for others in trained.values() for name in others)}
    for entry in entries.values():
        if entry["weight"] in written:  # its factors are those of the weight before it was trained
            entry["trained"] = True
    values.check_frozen(model, {id(t) for t in (*_core_parameters(present), *beside.values())})
    tensors |= more
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise AdapterError(f"tensor {bad[0]!r} is not finite: an adapter like this would not load; nothing was written")
    config, content = encode(
        {
            "format": FORMAT,
            "format_version": VERSION,
            "variant": first.name,
            "hyperparameters": first.hyperparameters(),
            "factors": factors,
            "base_model_name_or_path": base_model_name(model),
            "targets": sorted(entries),
            "sites": entries,
            **({"trained": trained} if trained else {}),
            **optional,
        },
        tensors,
    )
    size += sum(tensor.numel() for tensor in more.values())
    page = card(config, type(model).__name__, is_pretrained(model), size)
    return AdapterContent({TENSORS: content, CONFIG: [mirror(config)]}, page)


def _core_parameters(present: dict[str, Adapter]) -> list[nn.Parameter]:
    return [parameter for site in present.values() for parameter in site.core.parameters()]


def _is_registered(site: Adapter) -> bool:
    """Whether the bias of a site is a parameter by its own name, and not computed from others, as when it is pruned."""
    return site.host.bias_name in site.host.owner._parameters or site.host.inlined


def _entry(key: str, site: Adapter, seed: int, values: SavedValues) -> JsonObject:
    """What a file says of a site, but for the names of its weight and bias."""
    if site.host.cast:
        raise AdapterError(f"site {key!r} was cast after its base was dropped, and so fits no base any more")
    fixed = site.host.base_fingerprint
    entry: JsonObject = {
        "weight": None,
        "bias": None,
        "layout": site.layout,
        "host": site.host.in_place,
        "shape": list(site.factors.shape),
        "r": site.factors.rank,
        "seed": seed,
    }
    dropped: JsonObject = {
        "dtype": str(site.base_weight.dtype).removeprefix("torch."),
        "fingerprint": fixed,
        "casts": {},
    }
    entry |= dropped if fixed else values.known_by(site)
    entry |= {} if site.rows is None else {"rows": list(site.rows)}
    entry |= {"trained": True} if site.record.trained else {}
    return entry | ({} if site.core.scale is None else {"scale": float(site.core.scale)})


def _digest(key: str, site: Adapter, seed: int) -> torch.Tensor:
    """The digest of a site's factors, which have to follow from its weight."""
    where, factors = f"site {key!r}", site.factors
    recomputed, numbers = recompute(where, site.variant, site.base_weight.matrix(), factors.rank, seed)
    check_follows(where, recomputed, factors)
    return numbers
