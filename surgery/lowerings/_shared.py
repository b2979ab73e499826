"""What several lowerings share: how a term is added, and how a gradient is passed on without its value."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from surgery.lowerings._site import LinearSite


def add_term(site: LinearSite, y: torch.Tensor, d: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """``y + d left^T`` in the dtype of y, (..., d_out) with d (..., r) and left (d_out, r).

    Without gradients it is one product that adds to y in place, where the base's own forward has just made y and
    nobody else has seen it.
    """
    left = left.to(y.dtype)
    in_place = site.host.exact and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not (in_place and y.is_contiguous() and site.core.plain()):
        return y + F.linear(d.to(y.dtype), left)
    y.view(-1, y.shape[-1]).addmm_(d.reshape(-1, d.shape[-1]).to(y.dtype), left.T)
    return y


class _WithGradientOf(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: torch.Tensor, d: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        _, d, U = inputs
        ctx.save_for_backward(U)
        ctx.dtype = d.dtype

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (U,) = ctx.saved_tensors
        return grad, (grad @ U.to(grad.dtype)).to(ctx.dtype), None


def with_gradient_of(site: LinearSite, y: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """y, whose gradient is also passed to d as if ``d U^T`` had been added to what y was without it."""
    return _WithGradientOf.apply(y, d, site.factors.U)  # type: ignore[no-any-return,no-untyped-call]
