"""Save and load adapter directories: atomic, fingerprinted, no pickle.

``adapter_model.safetensors`` is the adapter: its header holds the configuration (format 3, see
``surgery.storage.adapter_file``)::

    {"sha256": "...", "format": "sspace-adapter", "format_version": 3, "variant": "antipasto", "hyperparameters": {...},
     "factors": "exact", "base_model_name_or_path": "Qwen/Qwen3-0.6B", "targets": ["...", ...],
     "sites": {"model.layers.0.mlp.up_proj": {"weight": "...weight", "bias": null, "layout": "out_in", "host": "module",
               "shape": [d_out, d_in], "r": 64, "seed": 0, "dtype": "float32", "fingerprint": "sha256:...",
               "casts": {"bfloat16": "sha256:...", ...}}, ...}}

Its tensors are ``<site>.core.<name>`` and ``<site>.factors.{U,S,Vh}``, or where ``factors`` is "recompute"
``<site>.digest`` in their place (see ``surgery.storage.factor_digest``). A site of another variant than the first has
``variant`` and ``hyperparameters`` of its own. The shape of a site on a stack of matrices is ``[stack, d_out, d_in]``,
and its tensors have one more dimension in front. A site that is a part of a packed weight has ``rows``, ``[first, one
after the last]``. Everything is checked before the model is touched.

``adapter_config.json`` mirrors the configuration for people and other libraries, ``README.md`` is a model card; neither
is read.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from passes.capture.capture import is_pretrained
from passes.ir.forward_context import ExampleInputs
from surgery.errors import AdapterError
from surgery.hosting.checks import check_flags
from surgery.hosting.state import adapters_of, module_paths, parameter_names, record_of, require_bases, unwrap
from surgery.modules.adapter import Adapter
from surgery.storage.adapter_config import FORMAT, STORED, mirror
from surgery.storage.adapter_file import CONFIG, TENSORS, encode
from surgery.storage.adapter_reader import read_adapter
from surgery.storage.factor_digest import check_follows, recompute
from surgery.storage.format_migration import VERSION
from surgery.storage.model_card import CARD, card, may_write
from surgery.storage.saved_names import SavedNames
from surgery.storage.site_entry import FACTORS
from surgery.support.atomic_directory import Content, write_directory
from surgery.support.distributed import by_first_process, whole
from surgery.support.hf_config import base_model_name
from surgery.support.progress_bar import track
from surgery.support.untrusted_files import JsonObject, path_of
from surgery.verbs.apply import Model, resolve_model
from surgery.verbs.replace_adapters import replace_adapters


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, factors: str = "exact", progress: bool = False
) -> Path:
    """Write the adapter of an operated model to a directory; the same adapter always gives the same bytes.

    Of a model in shards (``fully_shard``) every process has to call this; the first one writes.

    A ``README.md`` that somebody wrote or edited there is kept: a card that this package wrote ends with a comment that
    holds its own digest, and only such a card, or none, is replaced.

    Args:
        path: a new directory, or an existing one, whose adapter is replaced and whose other files are kept.
        factors: "exact" stores the factors that were used. "recompute" stores a digest of them, in some hundred bytes
            per site: whoever loads the adapter recomputes them from the weight, in one thread, to within 1e-4.
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
    present = adapters_of(model)
    first = next(iter(present.values())).variant
    paths = module_paths(model)
    names = SavedNames(model, ())
    entries: dict[str, JsonObject] = {}
    tensors: dict[str, torch.Tensor] = {}
    trained = 0
    for key, site in track(list(present.items()), "saving", enabled=progress):
        seed = notes.get(key, {}).get("seed", 0)
        weight, bias = parameter_names(paths, site)
        saved_key = names.saved_key(key, weight)
        entries[saved_key] = _entry(key, site, seed, (names.saved(weight), bias and names.saved(bias)))
        if site.variant != first:
            entries[saved_key] |= {"variant": site.variant.name, "hyperparameters": site.variant.hyperparameters()}
        for name, tensor in site.core.tensors().items():
            tensors[f"{saved_key}.core.{name}"] = whole(tensor).detach().cpu().contiguous()
        trained += sum(parameter.numel() for parameter in site.core.parameters())
        if factors == "recompute":
            tensors[f"{saved_key}.digest"] = _digest(key, site, seed)
            continue
        for name in FACTORS:
            tensors[f"{saved_key}.factors.{name}"] = getattr(site.factors, name).detach().cpu().contiguous()
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
        },
        tensors,
    )
    page = card(config, type(model).__name__, is_pretrained(model), trained)

    def write() -> None:
        files: dict[str, Content] = {TENSORS: content, CONFIG: [mirror(config)]}
        try:
            write_directory(path, files | {CARD: [page]} if may_write(path) else files)
        except OSError as error:
            raise AdapterError(
                f"cannot write an adapter to {str(path)!r}: {error}; what was there is unchanged"
            ) from error

    by_first_process(model.parameters(), write)
    return path


def _entry(key: str, site: Adapter, seed: int, names: tuple[str, str | None]) -> JsonObject:
    """What a file says of a site, whose weight and bias have these names there."""
    if site.host.cast:
        raise AdapterError(f"site {key!r} was cast after its base was dropped, and so fits no base any more")
    fixed = site.host.base_fingerprint
    entry = {
        "weight": names[0],
        "bias": names[1],
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
    entry |= dropped if fixed else site.base_weight.known_by()
    entry |= {} if site.rows is None else {"rows": list(site.rows)}
    return entry | ({} if site.core.scale is None else {"scale": float(site.core.scale)})


def _digest(key: str, site: Adapter, seed: int) -> torch.Tensor:
    """The digest of a site's factors, which have to follow from its weight."""
    where, factors = f"site {key!r}", site.factors
    recomputed, numbers = recompute(where, site.variant, site.base_weight.matrix(), factors.rank, seed)
    check_follows(where, recomputed, factors)
    return numbers


def load_adapter(
    model: Model, path: str | os.PathLike[str], *, example_inputs: ExampleInputs | None = None, progress: bool = True
) -> Model:
    """Put a saved adapter on the model it was made for, in place; ``coeff`` is 1.

    The model may be on any device, and in another dtype than the one that the adapter was made in: the adapter is then
    what a cast of the operated model would have made of it. Factors cannot be recomputed from rounded weights.

    Args:
        example_inputs: to convert a TorchScript module with, which gives a new graph module.
        progress: show a progress bar where factors are recomputed.

    An adapter that the model already carries is replaced. Nothing is captured: the file says how each site is hosted.

    Raises:
        AdapterError: the directory is missing, damaged, or of another base model, or recomputed factors come out
            differently here; the model is untouched.
    """
    given: Model
    check_flags(progress=progress)
    (given, model), path = resolve_model(model, example_inputs), path_of(path, AdapterError)
    require_bases(model)
    loaded = read_adapter(model, path, progress=progress)
    replace_adapters(model, lambda: loaded)
    return given
