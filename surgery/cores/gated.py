"""Gated: move the input along a contrast direction, as far as a gate says.

With ``a = sqrt(S) h``, ``z = a``, or ``a - m`` with ``center=True``, and ``p = sqrt(S) d``:

    ========  ============================  ===============================================================
    gate      delta(h)                      what it does
    ========  ============================  ===============================================================
    cosine    coeff * cos(z, d) * p         amplifies what points along d already, whichever way: no dial
    abs       coeff * abs(cos(z, d)) * p    moves one way, where there is anything along d
    norm      coeff * |a| * p               moves one way, by a share of the input
    none      coeff * p                     moves one way, by a constant
    ========  ============================  ===============================================================

``d`` is the frozen ``direction`` (r,) that the basis gives, and ``m`` the frozen ``midpoint`` (r,) of both means of a.
The first three are zero where z is. Nothing is trained. None is linear in h: there is no weight of the same effect, so
that it can neither be merged nor become a LoRA; at ``coeff = 0`` all are identities.

Sources: contrastive activation addition (Rimsky et al. 2024, arXiv:2312.06681); representation engineering (Zou et al.
2023, arXiv:2310.01405); here in the singular basis of the weight, with S halved between input and output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from surgery.cores import CoreConfig, CoreTensors
from surgery.errors import VariantError

Gate = Literal["cosine", "abs", "norm", "none"]
CENTRED: tuple[Gate, ...] = ("cosine", "abs")


@dataclass(frozen=True)
class Gated(CoreConfig):
    """Configuration of ``gated``.

    Attributes:
        gate: "cosine", "abs", "norm" or "none".
        center: measure the angle from the midpoint of both means; of the gates "cosine" and "abs".
    """

    gate: Gate = "cosine"
    center: bool = False

    name: ClassVar[str] = "gated"
    linear: ClassVar[bool] = False
    depends_only_on_Sh: ClassVar[bool] = False
    default_targets: ClassVar[str] = "residual-writers"
    middle_layers: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"contrast data"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("gate", get_args(Gate))
        if self.center and self.gate not in CENTRED:
            raise VariantError(f"center=True is of the gates 'cosine' and 'abs'; {self.gate!r} takes no angle")

    @property
    def frozen(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the basis gives."""
        return ("direction", "midpoint") if self.center else ("direction",)

    @property
    def identity_at_init(self) -> bool:
        """It acts as soon as there is a direction."""
        return False

    def init_core(self, r: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``direction`` (r,), and ``midpoint`` (r,) if centred: placeholders for what the contrast gives."""
        return {name: torch.zeros(r) for name in self.frozen}

    def delta(self, h: torch.Tensor, S: torch.Tensor, core: CoreTensors, coeff: torch.Tensor) -> torch.Tensor:
        """The gated direction, in the dtype of S."""
        root = S.sqrt()
        along = root * core.direction
        if self.gate == "none":
            return (coeff * along).expand(h.shape).to(h.dtype)
        if self.gate == "norm":
            scaled, largest = _scaled(h.to(S.dtype))
            length: torch.Tensor = torch.linalg.vector_norm(scaled * root, dim=-1, keepdim=True) * largest
            return (coeff * length * along).to(h.dtype)
        # vectors are scaled by their largest entry, which an angle does not notice
        if self.center:
            z = _scaled(h.to(S.dtype) * root - core.midpoint)[0]
        else:
            z = _scaled(_scaled(h.to(S.dtype))[0] * root)[0]
        squares = z.square().sum(dim=-1, keepdim=True)
        cosine = (z * core.direction).sum(dim=-1, keepdim=True) * torch.where(squares > 0, squares, 1.0).rsqrt()
        return (coeff * (cosine.abs() if self.gate == "abs" else cosine) * along).to(h.dtype)


def _scaled(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows over their largest entry, and that entry, so that no square overflows or vanishes; a row of zeros stays."""
    largest = a.abs().amax(dim=-1, keepdim=True)
    return a / torch.where(largest > 0, largest, 1.0), largest
