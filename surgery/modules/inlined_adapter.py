"""What an adapter tells the passes that inline it in a graph; see :class:`passes.ir.adapter_trace.InlinableAdapter`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from passes.ir.adapter_trace import INPUT
from surgery.modules.weight_change import WeightChange

COEFF = "steering.coeff"


class InlinedAdapter(WeightChange):
    """The part of an adapter that passes read."""

    @property
    def base(self) -> str | None:
        """Name of the tensor that a graph multiplies by in place of the weight."""
        return "W_res" if self.form == "residual" else None

    @property
    def coefficient_name(self) -> str:
        """Name of the tensor that steers."""
        return COEFF

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.factors.U.device

    @property
    def features(self) -> tuple[int, int]:
        """``(d_in, d_out)``."""
        return self.factors.shape[-1], self.factors.shape[-2]

    @property
    def weight_name(self) -> str:
        """Name of the base weight in the model that the host knows."""
        return self.host.weight_name

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype that the base weight has, or had."""
        return self.host.weight_dtype

    @property
    def signature(self) -> Hashable:
        """Sites of equal signature have the same forward but for d_in and d_out."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        dtypes = tuple((name, tensor.dtype) for name, tensor in tensors if name != "W_res")
        fixed = None if self._has_free_sizes else (self.factors.shape, tuple(self.weight.shape))
        host = self.host.changes_weight
        return type(self), self.variant, self.factors.rank, self.layout, host, self.form, dtypes, fixed

    @property
    def batched(self) -> bool:
        """Whether the forward runs under ``vmap``."""
        return self.factors.stack is not None

    @property
    def _has_free_sizes(self) -> bool:
        """Whether the weight is its own matrix; any other is reshaped, by numbers."""
        return len(self.factors.shape) == len(self.weight.shape) == 2

    @property
    def free_sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Dimensions that the signature leaves open."""
        if not self._has_free_sizes:
            return {INPUT: ()}
        return {"factors.U": (0,), "factors.Vh": (1,), "W_res": (0, 1)}
