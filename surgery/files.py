"""Adapter directories: ``adapter_config.json`` and ``adapter_model.safetensors``, atomic, fingerprinted, no pickle.

``adapter_config.json`` (format 1)::

    {"format": "sspace-adapter", "format_version": 1, "variant": "antipasto", "hyperparameters": {...},
     "factors": "exact", "tensors_sha256": "...", "targets": ["...", ...],
     "sites": {"model.layers.0.mlp.up_proj": {"weight": "...weight", "bias": null, "layout": "out_in", "host": "module",
               "shape": [d_out, d_in], "r": 64, "dtype": "float32", "fingerprint": "sha256:..."}, ...}}

``adapter_model.safetensors`` holds ``<site>.core.<name>`` and ``<site>.factors.{U,S,Vh}``. A site of another variant
than the first has ``variant`` and ``hyperparameters`` of its own. Everything is checked before the model is touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from passes.errors import AdapterError, SurgeryError
from passes.sites import Site
from surgery.adapter import Core, Factors, SSpaceLinear
from surgery.hosts import Graft, attach, detach, host_of, operated_sites
from surgery.operate import Model, check_weight, known_inspection, operate, record_of, restore_flags, unwrap
from surgery.variants import Variant, resolve_variant, variant_from_dict

FORMAT, VERSION = "sspace-adapter", 1
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_LIMIT = 64 * 2**20
FACTORS = ("U", "S", "Vh")
SITE_FIELDS = {"weight": str, "layout": str, "host": str, "shape": list, "r": int, "dtype": str, "fingerprint": str}


def fingerprint(weight: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{weight.dtype}{tuple(weight.shape)}".encode())
    data = weight.detach().cpu().contiguous().view(torch.uint8)
    digest.update(memoryview(data.flatten().numpy()))
    return f"sha256:{digest.hexdigest()}"


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
    names = {key: _parameter_names(model, site) for key, site in found.items()}
    entries, tensors = {}, {}
    for key, site in found.items():
        weight, bias = names[key]
        entries[key] = {
            "weight": weight,
            "bias": bias,
            "layout": site.layout,
            "host": host_of(site),
            "shape": [site.factors.U.shape[0], site.factors.Vh.shape[1]],
            "r": len(site.factors.S),
            "dtype": _dtype_name(site.weight),
            "fingerprint": fingerprint(site.weight),
        }
        if site.variant != first:
            entries[key] |= {"variant": site.variant.name, "hyperparameters": site.variant.hyperparameters()}
        for name, parameter in site.core.named_parameters():
            tensors[f"{key}.core.{name}"] = parameter.detach().cpu().contiguous()
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


def write_directory(path: Path, files: dict[str, bytes]) -> None:
    """Write files into a directory, whole or not at all, the last one last; a new directory appears with all of them.

    Raises:
        OSError: with nothing changed under ``path`` but, at worst, a part of the files of an existing directory renamed
            in: the last file (the configuration) is then the old one and does not fit, so that a reader refuses.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        staging = Path(temporary) / "files"
        staging.mkdir()
        for name, data in files.items():
            with open(staging / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if not path.exists():
            os.rename(staging, path)
            return
        for name in files:
            os.replace(staging / name, path / name)


def load_adapter(model: Model, path: str | os.PathLike[str]) -> Model:
    """Put a saved adapter on the model it was made for, in place; ``coeff`` is 1.

    An adapter that the model already carries is replaced. Nothing is captured: the file says how each site is hosted.

    Raises:
        AdapterError: the directory is missing, damaged, or of another base model; the model is untouched.
    """
    model, path = unwrap(model), Path(path)
    config = _read_config(path)
    default = _variant(config["variant"], config["hyperparameters"])
    present = operated_sites(model)
    parameters = {name: (name, p) for name, p in model.named_parameters(remove_duplicate=False)}
    for site in present.values():  # a hosted weight is named as it was before surgery
        weight, _ = _parameter_names(model, site)
        parameters[weight] = (weight, site.weight)
    with _opened(path, config) as tensors:
        expected: set[str] = set()
        grafts = []
        for key, entry in config["sites"].items():
            graft, names = _read_site(path, key, entry, default, parameters, tensors)
            grafts.append(graft)
            expected |= names
        if extra := sorted(set(tensors.keys()) - expected):
            raise AdapterError(f"{str(path)!r}: unexpected tensor {extra[0]!r} ({len(extra)} such)")
    _replace(model, grafts)
    return model


def _replace(model: nn.Module, grafts: list[Graft]) -> None:
    """Attach the grafts in place of whatever the model carries; on any failure the old adapter is back."""
    record = vars(model).get("_surgery")
    old = [_graft_of(model, key, site) for key, site in operated_sites(model).items()]
    inspection = known_inspection(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for site in operated_sites(model).values():
        detach(site)
    try:
        if record:
            del vars(model)["_surgery"]
            restore_flags(model, record.requires_grad)
        for graft in grafts:
            check_weight(model, graft.site)
        operate(model, grafts, inspection, {})
    except BaseException:
        for graft in old:
            attach(model, graft)
        if record:
            vars(model)["_surgery"] = record
        restore_flags(model, flags)
        raise


def _graft_of(model: nn.Module, key: str, site: SSpaceLinear) -> Graft:
    weight, bias = _parameter_names(model, site)
    d_out, d_in = site.factors.U.shape[0], site.factors.Vh.shape[1]
    place = Site(key, weight, bias, site.layout, d_out, d_in)
    return Graft(place, host_of(site), site.variant, site.factors, site.core)


def _parameter_names(model: nn.Module, site: SSpaceLinear) -> tuple[str, str | None]:
    """Names that the weight and bias of a site have, or had before surgery, in the model."""
    host: nn.Module = getattr(site, "owner", (site,))[0]
    path = next(path for path, module in model.named_modules() if module is host)
    weight = getattr(site, "weight_name", "weight")
    bias = getattr(site, "bias_name", "bias" if site.bias is not None else None)
    join = (lambda name: f"{path}.{name}") if path else (lambda name: name)
    return join(weight), join(bias) if bias else None


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _variant(name: Any, values: Any) -> Variant:
    try:
        return variant_from_dict(name, values)
    except AdapterError:
        raise
    except (SurgeryError, TypeError, ValueError) as error:
        raise AdapterError(f"adapter of variant {name!r}: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise AdapterError(f"{str(path)!r} is not a directory; expected an adapter with {CONFIG} and {TENSORS}")
    file = path / CONFIG
    try:
        if file.stat().st_size > CONFIG_LIMIT:
            raise AdapterError(f"{str(file)!r} is larger than {CONFIG_LIMIT >> 20} MiB")
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot read {str(file)!r}: {type(error).__name__}: {error}") from error
    if isinstance(config, dict) and "peft_type" in config:
        raise AdapterError(f"{str(path)!r} is a PEFT adapter; load it with peft. load_adapter reads its own format only")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise AdapterError(f"{str(file)!r} is no {FORMAT} configuration")
    version = config.get("format_version")
    if version != VERSION:
        hint = "upgrade this package" if isinstance(version, int) and version > VERSION else "save the adapter again"
        raise AdapterError(f"{str(file)!r} has format version {version!r}, expected {VERSION}: {hint}")
    kinds = {"variant": str, "hyperparameters": dict, "sites": dict, "tensors_sha256": str}
    for name, kind in kinds.items():
        if not isinstance(config.get(name), kind):
            raise AdapterError(f"{str(file)!r}: {name!r} must be a {kind.__name__}, found {config.get(name)!r:.80}")
    if not config["sites"]:
        raise AdapterError(f"{str(file)!r} names no site")
    if config.get("factors") != "exact":
        raise AdapterError(f"{str(file)!r}: factors must be 'exact', found {config.get('factors')!r:.80}")
    resolve_known(config["variant"])
    return config


def resolve_known(name: str) -> None:
    """Refuse an adapter of an unknown variant.

    Raises:
        AdapterError: with the known ones.
    """
    try:
        resolve_variant(name)
    except SurgeryError as error:
        raise AdapterError(f"cannot load the adapter: {error}") from error


@contextlib.contextmanager
def _opened(path: Path, config: dict[str, Any]) -> Iterator[Any]:
    """Open the tensor file after checking that it is the one that the configuration was written with."""
    file = path / TENSORS
    try:
        with open(file, "rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        with safe_open(file, framework="pt") as tensors:
            if digest != config["tensors_sha256"]:
                raise AdapterError(f"{str(file)!r} is damaged or not the one that {CONFIG} was written with")
            yield tensors
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot read {str(file)!r}: {type(error).__name__}: {error}") from error


def _read_site(
    path: Path, key: str, entry: Any, default: Variant, parameters: dict[str, Any], tensors: Any
) -> tuple[Graft, set[str]]:
    where = f"{str(path)!r}: site {key!r}"
    for name, kind in SITE_FIELDS.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
            raise AdapterError(f"{where}: {name!r} must be a {kind.__name__}")
    if entry["weight"] not in parameters:
        raise AdapterError(f"{where}: the model has no parameter {entry['weight']!r}; is it another base model?")
    if entry.get("bias") is not None and entry["bias"] not in parameters:
        raise AdapterError(f"{where}: the model has no parameter {entry['bias']!r}; is it another base model?")
    if entry["layout"] not in ("out_in", "in_out") or entry["host"] not in ("module", "weight"):
        raise AdapterError(f"{where}: unknown layout {entry['layout']!r:.40} or host {entry['host']!r:.40}")
    weight = parameters[entry["weight"]][1]
    shape = tuple(weight.shape if entry["layout"] == "out_in" else weight.shape[::-1])
    if weight.dim() != 2 or list(shape) != entry["shape"] or _dtype_name(weight) != entry["dtype"]:
        raise AdapterError(
            f"{where}: the adapter is for a weight of shape {entry['shape']} and {entry['dtype']}, "
            f"the model's is {list(shape)} and {_dtype_name(weight)}"
        )
    if fingerprint(weight) != entry["fingerprint"]:
        raise AdapterError(f"{where}: the base weight is not the one that the adapter was made for (fingerprints differ)")
    variant = _variant(entry["variant"], entry.get("hyperparameters", {})) if "variant" in entry else default
    (d_out, d_in), r = shape, entry["r"]
    if not 1 <= r <= min(d_out, d_in):
        raise AdapterError(f"{where}: rank {r} does not fit a weight of shape {list(shape)}")
    dtype = getattr(torch, variant.factors_dtype) if variant.factors_dtype else weight.dtype
    core_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    shapes = {f"factors.{n}": (s, dtype) for n, s in zip(FACTORS, [(d_out, r), (r,), (r, d_in)], strict=True)}
    for name, tensor in variant.init_core(r, torch.Generator()).items():
        shapes[f"core.{name}"] = (tuple(tensor.shape), core_dtype)
    values = {name: _tensor(where, tensors, f"{key}.{name}", *expected) for name, expected in shapes.items()}
    factors = Factors(*(values[f"factors.{name}"].to(weight.device) for name in FACTORS))
    core = Core({n.removeprefix("core."): v for n, v in values.items() if n.startswith("core.")}, core_dtype, weight.device)
    site = Site(key, entry["weight"], entry.get("bias"), entry["layout"], d_out, d_in)
    return Graft(site, entry["host"], variant, factors, core), {f"{key}.{name}" for name in shapes}


def _tensor(where: str, tensors: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if name not in tensors.keys():
        raise AdapterError(f"{where}: tensor {name!r} is missing")
    found = tuple(tensors.get_slice(name).get_shape())
    if found != shape:
        raise AdapterError(f"{where}: tensor {name!r} has shape {found}, expected {shape}")
    tensor: torch.Tensor = tensors.get_tensor(name)
    if tensor.dtype != dtype:
        raise AdapterError(f"{where}: tensor {name!r} has dtype {tensor.dtype}, expected {dtype}")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{where}: tensor {name!r} is not finite")
    return tensor
