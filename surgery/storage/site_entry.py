"""What an adapter's configuration says of one site, read and checked against the base weight."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from safetensors import SafetensorError

from passes.analysis.linear_sites import Site
from passes.errors import SurgeryError
from surgery.errors import AdapterError
from surgery.factors.svd import Factorisation
from surgery.modules.core import Core, Factors
from surgery.planning.adapter_init import as_factors
from surgery.storage.factor_digest import SUMS, check_recomputed, recompute
from surgery.support.fingerprint import DTYPES, can_be_cast, dtype_name, is_base
from surgery.variants import Variant, variant_from_dict

FACTORS = ("U", "S", "Vh")
SITE_FIELDS = {
    "weight": str, "layout": str, "host": str, "shape": list, "r": int, "seed": int, "dtype": str, "fingerprint": str,
    "casts": dict,
}  # fmt: skip


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
        raise AdapterError(f"adapter of variant {name!r:.80}: {error}") from error


def check_entry(where: str, entry: Any, parameters: Collection[str]) -> None:
    """Check what the configuration says of a site by itself and against the names of a model's parameters.

    Raises:
        AdapterError: a field is missing or unknown, or the model has no such parameter.
    """
    for name, kind in SITE_FIELDS.items():
        value = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise AdapterError(f"{where}: {name!r} must be a {kind.__name__}")
    if entry["weight"] not in parameters:
        raise AdapterError(f"{where}: the model has no parameter {entry['weight']!r}; is it another base model?")
    bias = entry.get("bias")
    if bias is not None and (not isinstance(bias, str) or bias not in parameters):
        raise AdapterError(f"{where}: the model has no parameter {bias!r:.80}; is it another base model?")
    if entry["layout"] not in ("out_in", "in_out") or entry["host"] not in ("module", "weight"):
        raise AdapterError(f"{where}: unknown layout {entry['layout']!r:.40} or host {entry['host']!r:.40}")
    if entry["dtype"] not in DTYPES or not -(2**63) <= entry["seed"] < 2**64:
        raise AdapterError(f"{where}: unknown dtype {entry['dtype']!r:.40}, or seed {entry['seed']!r:.40}")


def check_key(where: str, key: str, entry: Any) -> None:
    """Check that a site is named after its weight, as every site is.

    Raises:
        AdapterError: it is not.
    """
    weight = entry.get("weight") if isinstance(entry, dict) else None
    if isinstance(weight, str):
        owner = weight.removesuffix(".weight")
        named = (f"{owner}.{part}" for part in "qkv") if entry.get("rows") is not None else (owner,)
        if key not in named:
            raise AdapterError(f"{where} has the weight {weight!r}, which is of site {owner!r}")


def read_parts(
    where: str,
    key: str,
    entry: dict[str, Any],
    default: Variant,
    weight: torch.Tensor,
    tensors: Any,
    *,
    host: str,
    stored: str,
) -> tuple[Variant, Factors, Core, set[str]]:
    """Read the adapter of one site, and check that its base weight is the one that it was made for.

    On a weight of another dtype the adapter is what a cast of the operated model would have made of it.

    Args:
        entry: what the configuration says of the site.
        default: the variant of the adapter's first site.
        tensors: the opened tensor file.
        stored: what the adapter holds of factors: "exact", or "recompute" for a digest of them.

    Returns:
        The variant, the factors, the core, and the names of their tensors.

    Raises:
        AdapterError: the weight is another one, or a tensor is missing, damaged or does not fit.
    """
    shape = matrix_shape(where, weight, entry, host)
    if not is_base(weight, entry):
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
    saved = DTYPES[entry["dtype"]]
    core_dtype = torch.float64 if saved == torch.float64 else torch.float32
    with torch.device("meta"):  # a hyperparameter may ask for more than there is memory
        initial = variant.init_core(r, torch.Generator())
    shapes: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        f"core.{name}": ((*lead, *tensor.shape), (core_dtype, torch.float64)) for name, tensor in initial.items()
    }
    wanted = DTYPES[variant.factors_dtype] if variant.factors_dtype else saved
    if stored == "exact":
        kept = (wanted, saved)  # a cast of the model casts its factors, and leaves a float64 core as it is
        of_factors = zip(FACTORS, [(*lead, d_out, r), (*lead, r), (*lead, r, d_in)], strict=True)
        shapes |= {f"factors.{name}": (sizes, kept) for name, sizes in of_factors}
    else:
        shapes["digest"] = (*lead, 3, SUMS), (torch.float64,)
    values = {name: _tensor(where, tensors, f"{key}.{name}", *expected) for name, expected in shapes.items()}
    if stored == "exact":
        factors = Factors(*(values[f"factors.{name}"].to(weight.device) for name in FACTORS))
    else:
        factors = as_factors(_made_anew(where, entry, variant, weight, shape, values["digest"]), wanted, weight.device)
    tensors_of_core = {n.removeprefix("core."): v for n, v in values.items() if n.startswith("core.")}
    core_dtype = next((tensor.dtype for tensor in tensors_of_core.values()), core_dtype)
    if weight.dtype != saved:
        wanted = DTYPES[variant.factors_dtype] if variant.factors_dtype else weight.dtype
        factors = as_factors(factors, wanted, weight.device)
        core_dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else core_dtype
    if not all(torch.isfinite(factor).all() for factor in factors.buffers()):
        raise AdapterError(f"{where}: its factors overflow {wanted}; load it on the model in {entry['dtype']}")
    core = Core(tensors_of_core, core_dtype, weight.device, variant.frozen)
    return variant, factors, core, {f"{key}.{name}" for name in shapes}


def _made_anew(
    where: str,
    entry: dict[str, Any],
    variant: Variant,
    weight: torch.Tensor,
    shape: tuple[int, ...],
    stored: torch.Tensor,
) -> Factorisation:
    """Factors that are not stored, checked by their digest."""
    if dtype_name(weight) in entry["casts"]:
        raise AdapterError(
            f"{where}: factors of a {entry['dtype']} weight cannot be made anew of it in {dtype_name(weight)}; load "
            f"the adapter on the model in {entry['dtype']}, and cast that"
        )
    wide = weight.to(DTYPES[entry["dtype"]])
    found, digest = recompute(where, variant, wide, entry["layout"], shape, entry["r"], entry["seed"])
    check_recomputed(where, digest, stored)
    return found


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


def overlap(one: Site, other: Site) -> bool:
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
    if not fits or not can_be_cast(weight, entry):
        raise AdapterError(
            f"{where}: the adapter is for a weight of shape {wanted} and {entry['dtype']}, "
            f"the model's is {list(shape)} and {dtype_name(weight)}"
        )
    return tuple(wanted)


def _tensor(
    where: str, tensors: Any, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> torch.Tensor:
    try:
        found = tuple(tensors.get_slice(name).get_shape())
    except SafetensorError as error:
        raise AdapterError(f"{where}: tensor {name!r} is missing") from error
    if found != shape:
        raise AdapterError(f"{where}: tensor {name!r} has shape {found}, expected {shape}")
    tensor: torch.Tensor = tensors.get_tensor(name)
    if tensor.dtype not in dtypes:
        raise AdapterError(f"{where}: tensor {name!r} has dtype {tensor.dtype}, expected {dtypes[0]}")
    tensor = tensor.clone()
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{where}: tensor {name!r} is not finite")
    return tensor
