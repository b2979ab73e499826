"""Read an adapter directory and check all of it against a model, before anything is touched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import fx, nn

from passes.errors import AdapterError, SurgeryError
from passes.inspection import graph_products
from passes.sites import Site, original_names, part_of
from surgery.adapter import SSpaceLinear
from surgery.core import Core, Factors
from surgery.fingerprint import fingerprint
from surgery.graphs import original_graph
from surgery.hosts import Graft, is_module_host, operated_sites
from surgery.node import SSpaceNode
from surgery.variants import Variant, resolve_variant, variant_from_dict

FORMAT, VERSION = "sspace-adapter", 1
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_LIMIT = 64 * 2**20
FACTORS = ("U", "S", "Vh")
SITE_FIELDS = {"weight": str, "layout": str, "host": str, "shape": list, "r": int, "dtype": str, "fingerprint": str}


def read_adapter(model: nn.Module, path: Path) -> list[Graft]:
    """Read an adapter into grafts that fit the model.

    Raises:
        AdapterError: the directory is missing, damaged, or of another base model.
    """
    config = read_config(path)
    default = variant_of(config)
    present = operated_sites(model)
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for site in present.values():  # a hosted weight is named as it was before surgery
        weight, _ = parameter_names(model, site)
        parameters[weight] = site.parameter
    products: Collection[str] = ()
    flat = {original: name for name, original in original_names(model).items()}
    if isinstance(model, fx.GraphModule):
        products = graph_products(model, original_graph(model))[0]
    check_digest(path, config)
    with opened(path) as tensors:
        expected: set[str] = set()
        grafts: list[Graft] = []
        for key, entry in config["sites"].items():
            if isinstance(entry, dict):  # a Dynamo graph has flat names
                entry = entry | {name: flat.get(str(entry.get(name)), entry.get(name)) for name in ("weight", "bias")}
            graft, names = _read_site(model, path, key, entry, default, products, parameters, tensors)
            if any(_overlap(graft.site, other.site) for other in grafts):
                raise AdapterError(f"{str(path)!r}: site {key!r} has the weight {graft.site.weight!r} of another site")
            grafts.append(graft)
            expected |= names
        if extra := sorted(set(tensors.keys()) - expected):
            raise AdapterError(f"{str(path)!r}: unexpected tensor {extra[0]!r} ({len(extra)} such)")
    return grafts


@contextlib.contextmanager
def opened_adapter(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """Open an adapter directory without a model: its configuration, and its tensors by name.

    Raises:
        AdapterError: the directory is missing or damaged.
    """
    config = read_config(path)
    check_digest(path, config)
    with opened(path) as tensors:
        yield config, tensors


def parameter_names(model: nn.Module, site: SSpaceLinear) -> tuple[str, str | None]:
    """Names that the weight and bias of a site have, or had before surgery, in the model."""
    if isinstance(site, SSpaceNode):
        return site.weight_name, site.bias_name
    host: nn.Module = getattr(site, "owner", (site,))[0]
    path = next(path for path, module in model.named_modules() if module is host)
    weight = getattr(site, "weight_name", "weight")
    bias = getattr(site, "bias_name", "bias" if site.bias is not None else None)
    join = (lambda name: f"{path}.{name}") if path else (lambda name: name)
    return join(weight), join(bias) if bias else None


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def variant_of(entry: dict[str, Any]) -> Variant:
    """The variant that an adapter's configuration, or that of one of its sites, names.

    Raises:
        AdapterError: there is none such.
    """
    return _variant(entry["variant"], entry.get("hyperparameters", {}))


def _variant(name: Any, values: Any) -> Variant:
    try:
        return variant_from_dict(name, values)
    except AdapterError:
        raise
    except (SurgeryError, TypeError, ValueError) as error:
        raise AdapterError(f"adapter of variant {name!r}: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """Read and check the configuration of an adapter.

    Raises:
        AdapterError: it is missing, damaged, or of another format.
    """
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
        raise AdapterError(
            f"{str(path)!r} is a PEFT adapter; load it with peft. load_adapter reads its own format only"
        )
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


def check_digest(path: Path, config: dict[str, Any]) -> None:
    """Check that the tensor file is the one that the configuration was written with.

    Raises:
        AdapterError: it is missing or another.
    """
    file = path / TENSORS
    try:
        with open(file, "rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(f"cannot read {str(file)!r}: {type(error).__name__}: {error}") from error
    if digest != config["tensors_sha256"]:
        raise AdapterError(f"{str(file)!r} is damaged or not the one that {CONFIG} was written with")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open the tensor file of an adapter.

    Raises:
        AdapterError: it cannot be read.
    """
    file = path / TENSORS
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot read {str(file)!r}: {type(error).__name__}: {error}") from error


def _read_site(
    model: nn.Module,
    path: Path,
    key: str,
    entry: Any,
    default: Variant,
    products: Collection[str],
    parameters: dict[str, torch.Tensor],
    tensors: Any,
) -> tuple[Graft, set[str]]:
    where = f"{str(path)!r}: site {key!r}"
    check_entry(where, entry, parameters)
    host = "graph" if key in products else entry["host"]
    owner = model.get_submodule(entry["weight"].rpartition(".")[0])
    base = getattr(owner, "base_class", type(owner))
    if host == "module" and not is_module_host(base, entry["layout"]):
        raise AdapterError(f"{where}: {base.__name__} is no linear module of layout {entry['layout']!r}")
    rows = rows_of(where, entry, parameters[entry["weight"]])
    weight = part_of(parameters[entry["weight"]], rows)
    variant, factors, core, names = read_parts(where, key, entry, default, weight, tensors, host=host)
    *lead, d_out, d_in = factors.shape
    stack = lead[0] if lead else None
    site = Site(key, entry["weight"], entry.get("bias"), entry["layout"], d_out, d_in, stack=stack, rows=rows)
    return Graft(site, host, variant, factors, core), names


def check_entry(where: str, entry: Any, parameters: Collection[str]) -> None:
    """Check what the configuration says of a site by itself and against the names of a model's parameters.

    Raises:
        AdapterError: a field is missing or unknown, or the model has no such parameter.
    """
    for name, kind in SITE_FIELDS.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
            raise AdapterError(f"{where}: {name!r} must be a {kind.__name__}")
    if entry["weight"] not in parameters:
        raise AdapterError(f"{where}: the model has no parameter {entry['weight']!r}; is it another base model?")
    bias = entry.get("bias")
    if bias is not None and (not isinstance(bias, str) or bias not in parameters):
        raise AdapterError(f"{where}: the model has no parameter {bias!r:.80}; is it another base model?")
    if entry["layout"] not in ("out_in", "in_out") or entry["host"] not in ("module", "weight"):
        raise AdapterError(f"{where}: unknown layout {entry['layout']!r:.40} or host {entry['host']!r:.40}")


def read_parts(
    where: str, key: str, entry: dict[str, Any], default: Variant, weight: torch.Tensor, tensors: Any, *, host: str
) -> tuple[Variant, Factors, Core, set[str]]:
    """Read the adapter of one site, and check that its base weight is the one that it was made for.

    Args:
        entry: what the configuration says of the site.
        default: the variant of the adapter's first site.
        tensors: the opened tensor file.

    Returns:
        The variant, the factors, the core, and the names of their tensors.

    Raises:
        AdapterError: the weight is another one, or a tensor is missing, damaged or does not fit.
    """
    shape = matrix_shape(where, weight, entry, host)
    if fingerprint(weight) != entry["fingerprint"]:
        raise AdapterError(
            f"{where}: the base weight is not the one that the adapter was made for (fingerprints differ)"
        )
    variant = variant_of(entry) if "variant" in entry else default
    if host == "weight" and not variant.linear:
        raise AdapterError(f"{where}: {variant.name} is not linear, and the product reads its weight without a call")
    (*lead, d_out, d_in), r = shape, entry["r"]
    if lead and variant.needs_calibration:
        raise AdapterError(f"{where}: {variant.name} has no factors for a stack of matrices")
    if not 1 <= r <= min(d_out, d_in) or variant.rank(r) != r:
        raise AdapterError(f"{where}: rank {r} does not fit a weight of shape {list(shape)}")
    dtype = getattr(torch, variant.factors_dtype) if variant.factors_dtype else weight.dtype
    core_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    kept = (dtype, weight.dtype)  # a cast of the model casts its factors, and leaves a float64 core as it is
    shapes = {
        f"factors.{n}": (s, kept)
        for n, s in zip(FACTORS, [(*lead, d_out, r), (*lead, r), (*lead, r, d_in)], strict=True)
    }
    for name, tensor in variant.init_core(r, torch.Generator()).items():
        shapes[f"core.{name}"] = ((*lead, *tensor.shape), (core_dtype, torch.float64))
    values = {name: _tensor(where, tensors, f"{key}.{name}", *expected) for name, expected in shapes.items()}
    factors = Factors(*(values[f"factors.{name}"].to(weight.device) for name in FACTORS))
    tensors_of_core = {n.removeprefix("core."): v for n, v in values.items() if n.startswith("core.")}
    core_dtype = next((tensor.dtype for tensor in tensors_of_core.values()), core_dtype)
    core = Core(tensors_of_core, core_dtype, weight.device, variant.frozen)
    return variant, factors, core, {f"{key}.{name}" for name in shapes}


def rows_of(where: str, entry: dict[str, Any], weight: torch.Tensor) -> tuple[int, int] | None:
    """The rows of a packed weight that a site is, or None for the whole.

    Raises:
        AdapterError: they are no part of the weight.
    """
    rows = entry.get("rows")
    if rows is None:
        return None
    fits = isinstance(rows, list) and len(rows) == 2 and all(type(row) is int for row in rows)
    if not fits or not 0 <= rows[0] < rows[1] <= len(weight) or weight.dim() != 2 or entry["host"] != "weight":
        raise AdapterError(f"{where}: rows {rows!r:.80} are no part of a weight of shape {list(weight.shape)}")
    return rows[0], rows[1]


def _overlap(one: Site, other: Site) -> bool:
    """Whether two sites share an entry of a weight."""
    if one.weight != other.weight:
        return False
    return not (one.rows and other.rows) or (one.rows[0] < other.rows[1] and other.rows[0] < one.rows[1])


def matrix_shape(where: str, weight: torch.Tensor, entry: dict[str, Any], host: str) -> tuple[int, ...]:
    """The shape of a weight as a matrix (d_out, d_in) or, where it is hosted as a weight, as a stack of them."""
    stored, wanted = tuple(weight.shape), entry["shape"]
    shape = stored if entry["layout"] == "out_in" or len(stored) < 2 else (*stored[:-2], stored[-1], stored[-2])
    fits = list(shape) == wanted and weight.dim() == 2
    if host == "weight" and weight.dim() >= 2 and len(wanted) in (2, 3) and (weight.dim(), len(wanted)) != (2, 2):
        fits = all(type(n) is int and n > 0 for n in wanted) and math.prod(wanted) == weight.numel()
    if not fits or dtype_name(weight) != entry["dtype"]:
        raise AdapterError(
            f"{where}: the adapter is for a weight of shape {wanted} and {entry['dtype']}, "
            f"the model's is {list(shape)} and {dtype_name(weight)}"
        )
    return tuple(wanted)


def _tensor(
    where: str, tensors: Any, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> torch.Tensor:
    if name not in set(tensors.keys()):
        raise AdapterError(f"{where}: tensor {name!r} is missing")
    found = tuple(tensors.get_slice(name).get_shape())
    if found != shape:
        raise AdapterError(f"{where}: tensor {name!r} has shape {found}, expected {shape}")
    tensor: torch.Tensor = tensors.get_tensor(name).clone()
    if tensor.dtype not in dtypes:
        raise AdapterError(f"{where}: tensor {name!r} has dtype {tensor.dtype}, expected {dtypes[0]}")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{where}: tensor {name!r} is not finite")
    return tensor
