"""Adapter directories: ``adapter_config.json`` and ``adapter_model.safetensors``, atomic, fingerprinted, no pickle.

``adapter_config.json`` (format 2, see ``surgery.storage.format_migration``)::

    {"format": "sspace-adapter", "format_version": 2, "variant": "antipasto", "hyperparameters": {...},
     "factors": "exact", "tensors_sha256": "...", "targets": ["...", ...],
     "sites": {"model.layers.0.mlp.up_proj": {"weight": "...weight", "bias": null, "layout": "out_in", "host": "module",
               "shape": [d_out, d_in], "r": 64, "seed": 0, "dtype": "float32", "fingerprint": "sha256:...",
               "casts": {"bfloat16": "sha256:...", ...}}, ...}}

``adapter_model.safetensors`` holds ``<site>.core.<name>`` and ``<site>.factors.{U,S,Vh}``, or where ``factors`` is
"recompute" ``<site>.digest`` in their place (see ``surgery.storage.factor_digest``). A site of another variant
than the first has ``variant`` and ``hyperparameters`` of its own. The shape of a site on a stack of matrices is
``[stack, d_out, d_in]``, and its tensors have one more dimension in front. A site that is a part of a packed weight
has ``rows``, ``[first, one after the last]``. Everything is checked before the model is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from passes.ir.parameter_names import original_names
from surgery.errors import AdapterError
from surgery.hosting.checks import check_flags
from surgery.hosting.hosts import host_of, operated_sites, require_bases
from surgery.modules.adapter import SSpaceLinear
from surgery.modules.residual_host import SSpaceResidual, base_of
from surgery.storage.adapter_reader import FORMAT, STORED, module_paths, parameter_names, read_adapter
from surgery.storage.factor_digest import check_follows, recompute
from surgery.storage.format_migration import VERSION
from surgery.storage.site_entry import FACTORS
from surgery.storage.tensor_file import CONFIG, TENSORS
from surgery.support.atomic_directory import write_directory
from surgery.support.distributed import by_first_process, whole
from surgery.support.fingerprint import cast_fingerprints, dtype_name, fingerprint
from surgery.support.progress_bar import track
from surgery.support.untrusted_files import path_of
from surgery.verbs.apply import Model, patient_of, record_of, unwrap
from surgery.verbs.replace_adapters import replace_adapters


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, factors: str = "exact", progress: bool = False
) -> Path:
    """Write the adapter of an operated model to a directory; the same adapter always gives the same bytes.

    Of a model in shards (``fully_shard``) every process has to call this; the first one writes.

    Args:
        path: a new directory, or an existing one, whose adapter is replaced and whose other files are kept.
        factors: "exact" stores the factors that were used. "recompute" stores a digest of them, in some hundred bytes
            per site: whoever loads the adapter makes them anew from the weight, in one thread, to within 1e-4.
        progress: show a progress bar.

    Returns:
        The directory.

    Raises:
        AdapterError: the path is a file, or cannot be written; factors that are to be recomputed were chosen by
            calibration. What was there is still there.
        SurgeryError: the model carries no surgery.
    """
    model, path = unwrap(model), path_of(path, AdapterError)
    notes = record_of(model).factorisation
    check_flags(progress=progress)
    if not isinstance(factors, str) or factors not in STORED:
        raise AdapterError(f"factors must be 'exact' or 'recompute', found {factors!r:.80}")
    found = operated_sites(model)
    first = next(iter(found.values())).variant
    paths = module_paths(model)
    names = {key: parameter_names(paths, site) for key, site in found.items()}
    originals = original_names(model)
    entries: dict[str, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, site in track(list(found.items()), "saving", enabled=progress):
        weight, bias = names[key]
        base = whole(site.weight)
        fixed = getattr(site, "base_fingerprint", None)
        if isinstance(site, SSpaceResidual) and base_of(site).cast:
            raise AdapterError(f"site {key!r} was cast after its base was dropped, and so fits no base any more")
        entries[key] = {
            "weight": originals.get(weight, weight),
            "bias": originals.get(str(bias), bias),
            "layout": site.layout,
            "host": getattr(site, "in_place_host", host_of(site)),
            "shape": list(site.factors.shape),
            "r": site.factors.rank,
            "seed": notes.get(key, {}).get("seed", 0),
            "dtype": dtype_name(base),
            "fingerprint": fixed or fingerprint(base),
            "casts": {} if fixed else cast_fingerprints(base),
        }
        if rows := getattr(site, "rows", None):
            entries[key]["rows"] = list(rows)
        if site.variant != first:
            entries[key] |= {"variant": site.variant.name, "hyperparameters": site.variant.hyperparameters()}
        for name, tensor in site.core.tensors().items():
            tensors[f"{key}.core.{name}"] = whole(tensor).detach().cpu().contiguous()
        if factors == "recompute":
            tensors[f"{key}.digest"] = _digest(key, site, base, entries[key]["seed"])
            continue
        for name in FACTORS:
            tensors[f"{key}.factors.{name}"] = getattr(site.factors, name).detach().cpu().contiguous()
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise AdapterError(f"tensor {bad[0]!r} is not finite: an adapter like this would not load; nothing was written")
    data = to_safetensors(tensors)
    config = {
        "format": FORMAT,
        "format_version": VERSION,
        "variant": first.name,
        "hyperparameters": first.hyperparameters(),
        "factors": factors,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "targets": sorted(entries),
        "sites": entries,
    }
    text = json.dumps(config, indent=1).encode() + b"\n"

    def write() -> None:
        try:
            write_directory(path, {TENSORS: data, CONFIG: text})
        except OSError as error:
            raise AdapterError(
                f"cannot write an adapter to {str(path)!r}: {error}; what was there is unchanged"
            ) from error

    by_first_process(model.parameters(), write)
    return path


def _digest(key: str, site: SSpaceLinear, weight: torch.Tensor, seed: int) -> torch.Tensor:
    """The digest of a site's factors, which have to follow from its weight."""
    where, factors = f"site {key!r}", site.factors
    found, made = recompute(where, site.variant, weight, site.layout, factors.shape, factors.rank, seed)
    check_follows(where, found, factors)
    return made


def load_adapter(
    model: Model, path: str | os.PathLike[str], *, example_inputs: Any = None, progress: bool = True
) -> Model:
    """Put a saved adapter on the model it was made for, in place; ``coeff`` is 1.

    The model may be on any device, and in another dtype than the one that the adapter was made in: the adapter is then
    what a cast of the operated model would have made of it. Factors cannot be made anew of weights that were rounded.

    Args:
        example_inputs: to convert a TorchScript module with, which gives a new graph module.
        progress: show a progress bar where factors are made anew.

    An adapter that the model already carries is replaced. Nothing is captured: the file says how each site is hosted.

    Raises:
        AdapterError: the directory is missing, damaged, or of another base model, or factors that are made anew come
            out differently here; the model is untouched.
    """
    given: Model
    check_flags(progress=progress)
    (given, model), path = patient_of(model, example_inputs), path_of(path, AdapterError)
    require_bases(model)
    made = read_adapter(model, path, progress=progress)
    replace_adapters(model, lambda: made)
    return given
