"""The change of a weight that an adapter stands for, ``dW = U D^T Vh`` with ``D = delta(I)``, and the split."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from passes.errors import InputError
from passes.ir.torch_internals import is_exporting, script_tracing_state
from surgery.errors import VariantError
from surgery.modules.merged_weight import merged_weight
from surgery.modules.remainder import rebuilt, remainder
from surgery.modules.site_module import SiteModule
from surgery.support.strides import laid_out_like


class CoreView:
    """The tensors of a core as attributes; Dynamo traces its construction, and not that of a ``SimpleNamespace``."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def __getattr__(self, name: str) -> torch.Tensor:
        raise AttributeError(name)


class WeightChange(SiteModule):
    """The part of an adapter that computes weights."""

    def delta_factor(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``U D^T`` (d_out, r) with ``D = delta(I)`` at the present core and coeff: the weight changes by ``U D^T Vh``.

        Args:
            dtype: to compute in and return; the core's by default.

        Returns:
            A matrix, or of a stack (stack, d_out, r).

        Raises:
            VariantError: the variant is not linear in h.
            InputError: coeff steers rows or tokens, so that there is not one weight.
        """
        core, factors = self.core, self.factors
        if not self.variant.linear:
            raise VariantError(f"{self.variant.name} is not linear in its input: no weight has the same effect")
        if self.steering.coeff.numel() > 1:
            raise InputError("coeff steers the rows of a batch, or its tokens, differently: set a scalar coeff first")
        dtype = dtype or core.dtype
        tensors = {name: p.to(dtype) for name, p in core.tensors().items()}
        U, S = factors.U.to(dtype), factors.S.to(dtype)
        coeff = self.steering.value(self.stream, U.device).to(dtype).reshape(())
        if core.scale is not None:
            coeff = coeff * core.scale.to(dtype)

        def factor(U: torch.Tensor, S: torch.Tensor, core: dict[str, torch.Tensor]) -> torch.Tensor:
            D = self.variant.delta(torch.eye(len(S), dtype=dtype, device=S.device), S, CoreView(core), coeff)
            return U @ D.T

        if factors.stack is None:
            return factor(U, S, tensors)
        if is_exporting() or script_tracing_state() is not None:
            # levels of vmap neither decompose nor trace
            each = [{name: p[i] for name, p in tensors.items()} for i in range(factors.stack)]
            return torch.stack([factor(*parts) for parts in zip(U, S, each, strict=True)])
        return torch.func.vmap(factor)(U, S, tensors)

    def delta_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The change of the weight at the present core and coeff, ``U D^T Vh``, in the weight's shape and layout.

        The arguments and errors are those of :meth:`delta_factor`.
        """
        left = self.delta_factor(dtype)
        return self.base_weight.stored(left @ self.factors.Vh.to(left.dtype))

    def changed_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """``W + dW``, summed in the core's dtype and rounded once to the weight's."""
        delta = self.delta_weight()
        return laid_out_like((weight.to(delta.dtype) + delta).to(weight.dtype), weight)

    def merged_weight(self) -> torch.Tensor:
        """The dense weight ``W + dW``, summed in float64 and rounded once."""
        return merged_weight(self, self.key)

    def split(self) -> float:
        """Hold the remainder ``W_res = W - U S Vh`` of the stored factors, in float32 or better.

        Returns:
            The error of the weight that the stored tensors give back, relative to its largest entry.
        """
        self.register_buffer("W_res", remainder(self))
        self.form = "residual"
        W = self.weight.detach().to(torch.float64)
        back = self.rebuilt_weight(self.weight.dtype).to(torch.float64)
        return float((back - W).abs().max() / W.abs().max().clamp(1e-300))

    def rebuilt_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """``W_res + U S Vh`` in the weight's layout, summed in float64 and rounded once."""
        return rebuilt(self.get_buffer("W_res"), self, dtype)

    def use_base(self) -> None:
        """Go over to delta form, in a graph."""
        self.host.use_base()
