"""Fingerprints of base weights: what files know a weight by, also when it is loaded in another dtype.

A weight is read and hashed once per dtype. Its fingerprints are cached as long as the tensor lives and neither its
version counter, nor its memory, nor a sample of its entries has changed; the sample is there because ``.data`` and
fused optimisers write without counting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch.utils.weak import WeakIdKeyDictionary

from surgery.support.change_detection import version_of
from surgery.support.untrusted_files import JsonObject

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLE = 16  # entries along each dimension that are compared, at least


@dataclass
class _Cached:
    """Fingerprints of a tensor by dtype, and what they are valid for."""

    state: Hashable
    sample: bytes
    fingerprints: dict[torch.dtype, str] = field(default_factory=dict)


_CACHE = WeakIdKeyDictionary()


def dtype_name(tensor: torch.Tensor) -> str:
    """The name of a tensor's dtype, as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def fingerprint(weight: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes.

    Args:
        dtype: of the tensor that a cast to this dtype would give; its own if None.
    """
    dtype = weight.dtype if dtype is None else dtype
    cached = _cached(weight)
    if dtype not in cached.fingerprints:
        cached.fingerprints[dtype] = _hashed(weight.detach().to(dtype))
    return cached.fingerprints[dtype]


def _hashed(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(_bytes(tensor))
    return f"sha256:{digest.hexdigest()}"


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _cached(weight: torch.Tensor) -> _Cached:
    """What is cached of a tensor as it is now."""
    if weight.is_inference():  # it counts no versions
        return _Cached(None, b"")
    state = (version_of(weight), weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), weight.device)
    sample = bytes(_bytes(weight.detach()[tuple(slice(None, None, max(1, n // SAMPLE)) for n in weight.shape)]))
    cached: _Cached | None = _CACHE.get(weight)
    if cached is None or (cached.state, cached.sample) != (state, sample):
        cached = _CACHE[weight] = _Cached(state, sample)
    return cached


def forget_fingerprints(weight: torch.Tensor) -> None:
    """Hash a tensor again when it is asked for, whatever it looks like."""
    _CACHE.pop(weight, None)


def cast_fingerprints(weight: torch.Tensor) -> dict[str, str]:
    """Fingerprints of a weight in each other dtype that holds less of it, by the dtype's name.

    A wider dtype needs none: cast back, such a weight is the same again.
    """
    narrower = [name for name, dtype in DTYPES.items() if name != dtype_name(weight) and _is_lossy(weight.dtype, dtype)]
    return {name: fingerprint(weight, DTYPES[name]) for name in narrower}


def can_be_cast(weight: torch.Tensor, entry: JsonObject) -> bool:
    """Whether a weight of this dtype can be compared with the one that an adapter's file describes."""
    name = dtype_name(weight)
    return name in (entry["dtype"], *entry["casts"]) or (
        weight.dtype in DTYPES.values() and not _is_lossy(DTYPES[entry["dtype"]], weight.dtype)
    )


def is_base(weight: torch.Tensor, entry: JsonObject) -> bool:
    """Whether a weight is the one that an adapter's file describes, or that weight in another dtype."""
    name = dtype_name(weight)
    if name in entry["casts"]:
        return bool(fingerprint(weight) == entry["casts"][name])
    return bool(fingerprint(weight, DTYPES[entry["dtype"]]) == entry["fingerprint"])


def _is_lossy(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether values of a dtype are rounded in another one."""
    return bool(torch.promote_types(dtype, other) != other)
