"""What a base weight is known by in files, also when it is loaded in another dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(tensor: torch.Tensor) -> str:
    """The name of a tensor's dtype, as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def fingerprint(weight: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{weight.dtype}{tuple(weight.shape)}".encode())
    data = weight.detach().cpu().contiguous().view(torch.uint8)
    digest.update(data.flatten().numpy().data)
    return f"sha256:{digest.hexdigest()}"


def cast_fingerprints(weight: torch.Tensor) -> dict[str, str]:
    """Fingerprints of a weight in each other dtype that holds less of it, by the dtype's name.

    A wider dtype needs none: cast back, such a weight is the same again.
    """
    narrower = [name for name, dtype in DTYPES.items() if name != dtype_name(weight) and _is_lossy(weight.dtype, dtype)]
    return {name: fingerprint(weight.detach().to(DTYPES[name])) for name in narrower}


def can_be_cast(weight: torch.Tensor, entry: Mapping[str, Any]) -> bool:
    """Whether a weight of this dtype can be compared with the one that an adapter's file describes."""
    name = dtype_name(weight)
    return name in (entry["dtype"], *entry["casts"]) or (
        weight.dtype in DTYPES.values() and not _is_lossy(DTYPES[entry["dtype"]], weight.dtype)
    )


def is_base(weight: torch.Tensor, entry: Mapping[str, Any]) -> bool:
    """Whether a weight is the one that an adapter's file describes, or that weight in another dtype."""
    name = dtype_name(weight)
    if name in entry["casts"]:
        return bool(fingerprint(weight) == entry["casts"][name])
    return bool(fingerprint(weight.detach().to(DTYPES[entry["dtype"]])) == entry["fingerprint"])


def _is_lossy(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether values of a dtype are rounded in another one."""
    return bool(torch.promote_types(dtype, other) != other)
