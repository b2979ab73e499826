"""Every core's ``delta(h)`` in float64 numpy, written from the design's table: textbook formulas, solves and a QR.

Nothing here is shared with the library: where that avoids a cancellation, a solve or a QR, this one has it. A core that
has no formula here is compared with its own delta in float64, one input at a time and with a scalar coefficient; what
else there is to say of it, ``tests/contracts/test_bases_and_cores.py`` says by finite differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

Array = np.ndarray
Core = Mapping[str, Array]


def elu(z: Array) -> Array:
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0)))


def gain(S: Array, g: Array, coeff: float, suppress_only: bool) -> Array:
    return S * elu(coeff * (np.minimum(g, 0) if suppress_only else g))


def diagonal(config: Any, h: Array, S: Array, core: Core, coeff: float) -> Array:
    return h * gain(S, core["g"], coeff, config.suppress_only)


def cayley(p: Array | None, r: int, coeff: float, max_angle: float) -> Array:
    """The whole rotation (r, r) of upper triangles p (n, bs(bs-1)/2): ``(I - X)^-1 (I + X)`` in every block."""
    R = np.eye(r)
    if p is None:
        return R
    bs, a = r // len(p), 2 * np.tan(max_angle / 2)
    for block, parameters in enumerate(p):
        A = np.zeros((bs, bs))
        A[np.triu_indices(bs, 1)] = parameters / 2
        A = a * np.tanh((A - A.T) / a)
        X = coeff * A / 2
        place = slice(block * bs, (block + 1) * bs)
        R[place, place] = np.linalg.solve(np.eye(bs) - X, np.eye(bs) + X)
    return R


def rotation(config: Any, h: Array, S: Array, core: Core, coeff: float) -> Array:
    r = len(S)
    R_v = cayley(core.get("rot_v"), r, coeff, config.max_rotation_angle)
    R_u = cayley(core.get("rot_u"), r, coeff, config.max_rotation_angle)
    return ((S + coeff * core["delta_s"]) * (h @ R_v.T)) @ R_u - S * h


def ablation(config: Any, h: Array, S: Array, core: Core, coeff: float) -> Array:
    coeff = coeff if config.allow_amplify else min(max(coeff, 0.0), 1.0)
    C, _ = np.linalg.qr(core["c"])
    return -coeff * (((S * h) @ C) * np.clip(core["alpha"], 0, 1)) @ C.T


def arrow(config: Any, h: Array, S: Array, core: Core, coeff: float) -> Array:
    b = len(core["m"])
    assert b == min(config.block, len(S))
    mixed = coeff * (S * h)[..., :b] @ core["m"].T
    rest = (S * h)[..., b:]
    if b < len(S):
        rest = rest * gain(np.ones(len(S) - b), core["g"], coeff, config.suppress_only)
    return np.concatenate([mixed, rest], axis=-1)


def low_rank(config: Any, h: Array, S: Array, core: Core, coeff: float) -> Array:
    return diagonal(config, h, S, core, coeff) + coeff * (h @ core["a"].T) @ core["b"].T


def full(config: Any, h: Array, S: Array, core: Core, coeff: float) -> Array:
    return coeff * (h * S) @ core["m"].T


def steering(config: Any, h: Array, S: Array, core: Core, coeff: float) -> Array:
    a, d = np.sqrt(S) * h, core["direction"]
    z = a - core["midpoint"] if config.center else a
    length = np.linalg.norm(z, axis=-1, keepdims=True)
    cosine = np.where(length > 0, (z @ d)[..., None] / np.where(length > 0, length, 1), 0)
    gates = {"cosine": cosine, "abs": np.abs(cosine), "norm": length, "none": np.ones_like(length)}
    return coeff * gates[config.gate] * np.sqrt(S) * d


def contrast_scale(config: Any, h: Array, S: Array, core: Core, coeff: float) -> Array:
    exponent = np.clip(coeff * np.abs(core["direction"]) * config.scale, -4, 4)
    return h * S * (np.exp(exponent) - 1)


DELTAS: dict[str, Callable[[Any, Array, Array, Core, float], Array]] = {
    "gain": diagonal,
    "rotation": rotation,
    "ablate": ablation,
    "arrow": arrow,
    "dplr": low_rank,
    "full": full,
    "gated": steering,
    "contrast_scale": contrast_scale,
}


def own_delta(config: Any, h: Array, S: Array, core: Core, coeff: float) -> Array:
    """The delta of a core that has no formula here: its own, in float64, of one input at a time."""
    tensors = SimpleNamespace(**{name: torch.from_numpy(np.array(value)) for name, value in core.items()})
    scalar, values = torch.tensor(coeff, dtype=torch.float64), torch.from_numpy(S)
    with torch.no_grad():
        rows = [config.delta(torch.from_numpy(row.copy()), values, tensors, scalar) for row in h.reshape(-1, len(S))]
    return torch.stack(rows).numpy().reshape(h.shape)


def mirrored(config: Any, tensors: Mapping[str, torch.Tensor], signs: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """The tensors that are to a basis with other signs of its pairs (u_i, v_i) what these are to the basis.

    Args:
        config: of a core.
        signs: (r,), of 1 and -1.

    Returns:
        The tensors by name; None for a core that is not known here, unless what it has is given by the basis.
    """
    first = signs[: len(tensors["m"])] if "m" in tensors else signs
    carried: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "g": lambda t: t,
        "delta_s": lambda t: t,
        "alpha": lambda t: t,
        "m": lambda t: first[:, None] * t * first,
        "a": lambda t: t * signs,
        "b": lambda t: signs[:, None] * t,
        "c": lambda t: signs[:, None] * t,
        "rot_v": lambda t: _mirrored_planes(t, signs),
        "rot_u": lambda t: _mirrored_planes(t, signs),
    }
    carried |= dict.fromkeys(config.frozen, lambda t: signs * t)
    if config.name not in DELTAS and set(tensors) != set(config.frozen):
        return None
    return {name: carried[name](tensor) for name, tensor in tensors.items()}


def _mirrored_planes(p: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Upper triangles (n, bs(bs-1)/2) of matrices whose rows and columns change sign."""
    blocks = signs.reshape(len(p), -1)
    i, j = np.triu_indices(blocks.shape[1], 1)
    return p * blocks[:, i] * blocks[:, j]


def core_config_of(config: Any) -> Any:
    """The core's configuration, of a variant or itself."""
    return getattr(config, "core_config", config)


def reference_delta(config: Any, h: Array, S: Array, core: Core, coeff: float | Array) -> Array:
    """``delta(h)`` of a variant or of a core, by its configuration.

    Args:
        h: (..., r); S: (r,); core: the core's tensors by name; all float64.
        coeff: a number, or (rows,) for as many equal parts of the first dimension of h.
    """
    config = core_config_of(config)
    function, coeff = DELTAS.get(config.name, own_delta), np.asarray(coeff, dtype=np.float64)
    if coeff.ndim == 0:
        return function(config, h, S, core, float(coeff))
    parts = np.split(h, len(coeff))
    return np.concatenate([function(config, part, S, core, float(c)) for part, c in zip(parts, coeff, strict=True)])


def array(tensor: torch.Tensor) -> Array:
    return tensor.detach().to(torch.float64).numpy()


def arrays(site: Any) -> tuple[Array, Array, Array, dict[str, Array]]:
    """The stored factors U, S, Vh and the core of a site."""
    factors = (array(t) for t in (site.factors.U, site.factors.S, site.factors.Vh))
    return *factors, {name: array(tensor) for name, tensor in site.core.tensors().items()}


def reference_term(site: Any, x: torch.Tensor, coeff: float | Array) -> torch.Tensor:
    """``delta(x Vh^T) U^T`` of a site's stored factors and core, in float64."""
    U, S, Vh, core = arrays(site)
    return torch.from_numpy(reference_delta(site.variant, array(x) @ Vh.T, S, core, coeff) @ U.T)


def reference_output(site: Any, x: torch.Tensor, coeff: float | Array) -> torch.Tensor:
    """``x W^T + b + delta(x Vh^T) U^T``, in float64."""
    W = array(site.weight)
    y = array(x) @ (W.T if site.layout == "out_in" else W)
    return torch.from_numpy(y + (0 if site.bias is None else array(site.bias))) + reference_term(site, x, coeff)


def reference_delta_weight(site: Any, coeff: float) -> torch.Tensor:
    """``U D^T Vh`` with ``D = delta(I)``, in float64 and the layout of the weight."""
    U, S, Vh, core = arrays(site)
    D = reference_delta(site.variant, np.eye(len(S)), S, core, coeff)
    change = torch.from_numpy(U @ D.T @ Vh)
    return change if site.layout == "out_in" else change.T
