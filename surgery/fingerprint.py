"""What a base weight is known by in files."""

from __future__ import annotations

import hashlib

import torch


def fingerprint(weight: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{weight.dtype}{tuple(weight.shape)}".encode())
    data = weight.detach().cpu().contiguous().view(torch.uint8)
    digest.update(data.flatten().numpy().data)
    return f"sha256:{digest.hexdigest()}"
