"""The parts of one site: host, base weight, variant, factors, core, and the coefficient that it follows."""

from __future__ import annotations

import torch
from torch import nn

from surgery.modules.base_weights import BaseWeight
from surgery.modules.core import Core, Factors
from surgery.modules.host import Host
from surgery.modules.steering import Steering
from surgery.modules.weight_record import WeightRecord
from surgery.variants import Variant


class SiteModule(nn.Module):
    """What an adapter holds; see :class:`surgery.modules.adapter.Adapter`."""

    factors: Factors
    core: Core

    def __init__(
        self, key: str, host: Host, base_weight: BaseWeight, variant: Variant, factors: Factors, core: Core
    ) -> None:
        super().__init__()
        self.key, self.host, self.base_weight, self.variant = key, host, base_weight, variant
        self.factors, self.core = factors, core
        self.form, self.lowering, self.stream = "delta", "auto", 0
        self.coeff_is_folded = False
        self.record = WeightRecord()
        self._steering = (Steering(core.dtype, factors.U.device),)

    @property
    def weight(self) -> torch.Tensor:
        """The frozen base weight as it is stored; if it was not kept, what the factors and the remainder give."""
        return self.base_weight.tensor()

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias that is added to the product, or None."""
        return self.host.bias()

    @property
    def layout(self) -> str:
        """How the weight is stored, "out_in" or "in_out"."""
        return self.base_weight.layout

    @property
    def rows(self) -> tuple[int, int] | None:
        """Of a part of a packed weight, its first row and the one after the last."""
        return self.base_weight.rows

    @property
    def keeps_base(self) -> bool:
        """Whether the base weight is there; in residual form it need not be."""
        return self.host.keeps_base

    @keeps_base.setter
    def keeps_base(self, keeps: bool) -> None:
        self.host.keeps_base = keeps

    @property
    def base_error(self) -> float | None:
        """Of the weight that the tensors of the residual form give back; None in delta form."""
        return self.host.base_error

    @property
    def steering(self) -> Steering:
        """The coefficient, which all adapters of a root share."""
        return self._steering[0]

    def share(self, steering: Steering, *, register: bool) -> None:
        """Follow a coefficient.

        Args:
            register: whether it becomes a submodule: in the first adapter of a root, and in all of a graph.
        """
        self._modules.pop("steering", None)
        self._steering = (steering,)
        if register:
            self._modules["steering"] = steering
