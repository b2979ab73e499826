"""An adapter without a model, for its weight's sake."""

from __future__ import annotations

import torch
from torch import nn

from passes.errors import SurgeryError
from surgery.modules.adapter import Adapter
from surgery.modules.base_weights import base_weight_of
from surgery.modules.core import Core, Factors
from surgery.modules.host import Host
from surgery.variants import Variant


class _Nowhere(Host):
    """Host of an adapter that belongs to no model."""

    name = in_place = "weight"
    changes_weight = True

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(nn.Module(), "weight", None)
        self.held = weight

    def parameter(self) -> torch.Tensor:
        return self.held

    def bias(self) -> torch.Tensor | None:
        return None

    def detach(self) -> None:
        raise SurgeryError("this adapter belongs to no model")

    def put_weight(self, weight: torch.Tensor) -> None:
        raise SurgeryError("this adapter belongs to no model")


def detached_adapter(
    weight: torch.Tensor, layout: str, variant: Variant, factors: Factors, core: Core, key: str = ""
) -> Adapter:
    """An adapter that belongs to no model, at coefficient 1."""
    parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    host = _Nowhere(parameter)
    return Adapter(key, host, base_weight_of(key, host, layout, factors.shape), variant, factors, core)
