"""Adapter directories: ``adapter_config.json`` and ``adapter_model.safetensors``, atomic, fingerprinted, no pickle.

``adapter_config.json`` (format 1)::

    {"format": "sspace-adapter", "format_version": 1, "variant": "antipasto", "hyperparameters": {...},
     "factors": "exact", "tensors_sha256": "...", "targets": ["...", ...],
     "sites": {"model.layers.0.mlp.up_proj": {"weight": "...weight", "bias": null, "layout": "out_in", "host": "module",
               "shape": [d_out, d_in], "r": 64, "dtype": "float32", "fingerprint": "sha256:..."}, ...}}

``adapter_model.safetensors`` holds ``<site>.core.<name>`` and ``<site>.factors.{U,S,Vh}``. A site of another variant
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

from passes.errors import AdapterError
from passes.names import original_names
from surgery.directory import write_directory
from surgery.entries import FACTORS, dtype_name
from surgery.fingerprint import fingerprint
from surgery.hosts import host_of, operated_sites, require_bases
from surgery.operate import Model, patient_of, record_of, unwrap
from surgery.reading import FORMAT, VERSION, parameter_names, read_adapter
from surgery.replace import replace_adapters
from surgery.residual import SSpaceResidual, base_of
from surgery.tensor_file import CONFIG, TENSORS


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, factors: str = "exact") -> Path:
    """Write the adapter of an operated model to a directory; the same adapter always gives the same bytes.

    Args:
        path: a new directory, or an existing one, whose adapter is replaced and whose other files are kept.
        factors: "exact" stores the factors that were used.

    Returns:
        The directory.

    Raises:
        AdapterError: the path is a file, or cannot be written; what was there is still there.
        SurgeryError: the model carries no surgery.
    """
    model, path = unwrap(model), Path(path)
    record_of(model)
    if factors != "exact":
        raise AdapterError(f"factors must be 'exact' ('recompute' is not supported yet), found {factors!r}")
    found = operated_sites(model)
    first = next(iter(found.values())).variant
    names = {key: parameter_names(model, site) for key, site in found.items()}
    originals = original_names(model)
    entries: dict[str, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, site in found.items():
        weight, bias = names[key]
        if isinstance(site, SSpaceResidual) and base_of(site).cast:
            raise AdapterError(f"site {key!r} was cast after its base was dropped, and so fits no base any more")
        entries[key] = {
            "weight": originals.get(weight, weight),
            "bias": originals.get(str(bias), bias),
            "layout": site.layout,
            "host": getattr(site, "in_place_host", host_of(site)),
            "shape": list(site.factors.shape),
            "r": site.factors.rank,
            "dtype": dtype_name(site.weight),
            "fingerprint": getattr(site, "base_fingerprint", None) or fingerprint(site.weight),
        }
        if rows := getattr(site, "rows", None):
            entries[key]["rows"] = list(rows)
        if site.variant != first:
            entries[key] |= {"variant": site.variant.name, "hyperparameters": site.variant.hyperparameters()}
        for name, tensor in site.core.tensors().items():
            tensors[f"{key}.core.{name}"] = tensor.detach().cpu().contiguous()
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
    try:
        write_directory(path, {TENSORS: data, CONFIG: text})
    except OSError as error:
        raise AdapterError(f"cannot write an adapter to {str(path)!r}: {error}; what was there is unchanged") from error
    return path


def load_adapter(model: Model, path: str | os.PathLike[str], *, example_inputs: Any = None) -> Model:
    """Put a saved adapter on the model it was made for, in place; ``coeff`` is 1.

    Args:
        example_inputs: to convert a TorchScript module with, which gives a new graph module.

    An adapter that the model already carries is replaced. Nothing is captured: the file says how each site is hosted.

    Raises:
        AdapterError: the directory is missing, damaged, or of another base model; the model is untouched.
    """
    given: Model
    (given, model), path = patient_of(model, example_inputs), Path(path)
    require_bases(model)
    grafts = read_adapter(model, path)
    replace_adapters(model, lambda: (grafts, {}))
    return given
