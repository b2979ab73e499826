"""Read the adapter of one site from a file, and check it against the base weight that it was made for."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from safetensors import SafetensorError

from passes.analysis.linear_sites import Site
from passes.errors import SurgeryError
from surgery.errors import AdapterError
from surgery.modules.base_weights import BaseWeight, Held, base_weight_of
from surgery.modules.core import Core, Factors
from surgery.modules.factor_fit import why_not_of
from surgery.planning.adapter_init import as_factors
from surgery.storage.adapter_file import StoredTensors
from surgery.storage.factor_digest import SUMS, recompute_stored
from surgery.support.fingerprint import DTYPES
from surgery.support.untrusted_files import JsonObject
from surgery.variants import Variant, variant_from_dict

FACTORS = ("U", "S", "Vh")
SITE_FIELDS = {
    "weight": str, "layout": str, "host": str, "shape": list, "r": int, "seed": int, "dtype": str, "fingerprint": str,
    "casts": dict,
}  # fmt: skip


def variant_of(entry: JsonObject) -> Variant:
    """The variant that an adapter's configuration, or that of one of its sites, names.

    Raises:
        AdapterError: there is none such.
    """
    return _variant(entry["variant"], entry.get("hyperparameters", {}))


def _variant(name: str, values: JsonObject) -> Variant:
    try:
        return variant_from_dict(name, values)
    except AdapterError:
        raise
    except (SurgeryError, TypeError, ValueError) as error:
        raise AdapterError(f"adapter of variant {name!r:.80}: {error}") from error


def check_entry(where: str, found: object, parameters: Collection[str]) -> JsonObject:
    """Check what the configuration says of a site by itself and against the names of a model's parameters; gives it.

    Raises:
        AdapterError: a field is missing or unknown, or the model has no such parameter.
    """
    entry: JsonObject = found if isinstance(found, dict) else {}
    for name, kind in SITE_FIELDS.items():
        value = entry.get(name)
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
    return entry


def read_parts(
    where: str,
    key: str,
    entry: JsonObject,
    default: Variant,
    base: BaseWeight,
    tensors: StoredTensors,
    *,
    host: str,
    stored: str,
) -> tuple[Variant, Factors, Core, set[str]]:
    """Read the adapter of one site, and check that its base weight is the one that it was made for.

    On a weight of another dtype the adapter is what a cast of the operated model would have made of it.

    Args:
        entry: what the configuration says of the site.
        default: the variant of the adapter's first site.
        base: the base weight, see :func:`base_of`.
        tensors: the opened tensor file.
        stored: what the adapter holds of factors: "exact", or "recompute" for a digest of them.

    Returns:
        The variant, the factors, the core, and the names of their tensors.

    Raises:
        AdapterError: the weight is another one, or a tensor is missing, damaged or does not fit.
    """
    shape = base.matrix_shape
    if not base.is_that_of(entry):
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
        dtypes = (wanted, saved)  # a cast of the model casts its factors, and leaves a float64 core as it is
        of_factors = zip(FACTORS, [(*lead, d_out, r), (*lead, r), (*lead, r, d_in)], strict=True)
        shapes |= {f"factors.{name}": (sizes, dtypes) for name, sizes in of_factors}
    else:
        shapes["digest"] = (*lead, 3, SUMS), (torch.float64,)
    values = {name: read_tensor(where, tensors, f"{key}.{name}", *expected) for name, expected in shapes.items()}
    if stored == "exact":
        factors = Factors(*(values[f"factors.{name}"].to(base.device) for name in FACTORS))
    else:
        factors = as_factors(recompute_stored(where, entry, variant, base, values["digest"]), wanted, base.device)
    tensors_of_core = {n.removeprefix("core."): v for n, v in values.items() if n.startswith("core.")}
    core_dtype = next((tensor.dtype for tensor in tensors_of_core.values()), core_dtype)
    if base.dtype != saved:
        wanted = DTYPES[variant.factors_dtype] if variant.factors_dtype else base.dtype
        factors = as_factors(factors, wanted, base.device)
        core_dtype = base.dtype if base.dtype in (torch.float32, torch.float64) else core_dtype
    if not all(torch.isfinite(factor).all() for factor in factors.buffers()):
        raise AdapterError(f"{where}: its factors overflow {wanted}; load it on the model in {entry['dtype']}")
    if stored == "exact":
        _check_factors(where, entry, variant, factors, base, (saved, wanted))
    core = Core(tensors_of_core, core_dtype, base.device, variant.frozen)
    return variant, factors, core, {f"{key}.{name}" for name in shapes}


def _check_factors(
    where: str, entry: JsonObject, variant: Variant, factors: Factors, base: BaseWeight, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Check that stored factors are those of the weight, by :func:`surgery.modules.factor_fit.why_not_of`.

    Of a weight that was trained beside its adapter, they are those of the weight before: only what holds of the basis
    itself is checked.

    Raises:
        AdapterError: they are not.
    """
    trained = entry.get("trained", False)
    if not isinstance(trained, bool):
        raise AdapterError(f"{where}: 'trained' must be true or false, found {trained!r:.40}")
    matrix = None if trained else base.matrix().detach()
    if reason := why_not_of(matrix, factors, variant, (base.dtype, *dtypes)):
        raise AdapterError(
            f"{where}: its factors are not those of its base weight: {reason}. The file was changed, or written "
            "wrongly; save the adapter again where it was made"
        )


def rows_of(where: str, entry: JsonObject, weight: torch.Tensor) -> tuple[int, int] | None:
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


def base_of(where: str, key: str, weight: torch.Tensor, entry: JsonObject, host: str) -> BaseWeight:
    """The weight that a site in a file is of: a matrix (d_out, d_in) or, where it is read, perhaps a stack of them.

    Args:
        weight: the parameter of a model, or a tensor of a checkpoint.

    Raises:
        AdapterError: it has another shape, or a dtype that it cannot be compared in.
        WeightError: it is of no supported kind.
    """
    rows, wanted = rows_of(where, entry, weight), entry["shape"]
    is_shape = len(wanted) in (2, 3) and all(type(n) is int and n > 0 for n in wanted)
    base = base_weight_of(key, Held(weight), entry["layout"], tuple(wanted) if is_shape else (1, 1), rows)
    stored = tuple(weight.shape) if rows is None else (rows[1] - rows[0], *weight.shape[1:])
    stored = stored if base.holds_entries else tuple(base.shape)
    shape = stored if entry["layout"] == "out_in" or len(stored) < 2 else (*stored[:-2], stored[-1], stored[-2])
    fits = list(shape) == wanted and len(stored) == 2
    if (
        (host == "weight" or base.kind == "convolution")
        and len(stored) >= 2
        and len(wanted) in (2, 3)
        and (len(stored), len(wanted)) != (2, 2)
    ):
        fits = is_shape and math.prod(wanted) == math.prod(stored)
    if not fits or not base.comparable(entry):
        raise AdapterError(
            f"{where}: the adapter is for a weight of shape {wanted} and {entry['dtype']}, "
            f"the model's is {list(shape)} and {str(base.dtype).removeprefix('torch.')}"
        )
    return base


def read_tensor(
    where: str, tensors: StoredTensors, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> torch.Tensor:
    """Read a tensor of an opened file.

    Raises:
        AdapterError: it is missing, not finite, or of another shape or dtype.
    """
    try:
        present = tuple(tensors.get_slice(name).get_shape())
    except SafetensorError as error:
        raise AdapterError(f"{where}: tensor {name!r} is missing") from error
    if present != shape:
        raise AdapterError(f"{where}: tensor {name!r} has shape {present}, expected {shape}")
    tensor: torch.Tensor = tensors.get_tensor(name)
    if tensor.dtype not in dtypes:
        raise AdapterError(f"{where}: tensor {name!r} has dtype {tensor.dtype}, expected {dtypes[0]}")
    tensor = tensor.clone()
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{where}: tensor {name!r} is not finite")
    return tensor


def scale_of(where: str, entry: JsonObject, core: Core) -> torch.Tensor | None:
    """The lasting factor of a site's coefficient, like its core; None where the file has none.

    Raises:
        AdapterError: it is no finite number.
    """
    scale = entry.get("scale")
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise AdapterError(f"{where}: 'scale' must be a finite number, found {scale!r:.40}")
    device = next((t.device for t in core.tensors().values()), None)
    return torch.tensor(float(scale), dtype=core.dtype, device=device)
