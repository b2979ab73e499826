"""The two hosts of an adapter: a linear module that is called, and a weight that is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from passes.analysis.linear_sites import part_of
from passes.errors import InputError
from surgery.errors import VariantError
from surgery.lowerings import REGISTRY, Schedule, step
from surgery.lowerings._cost_model import schedule_of
from surgery.lowerings._weight_cache import Kept
from surgery.lowerings.dense import give_handle
from surgery.modules.core import Core, Factors
from surgery.variants import Variant


class _Tensors:
    """The tensors of a core as attributes; Dynamo traces its making, and not that of a ``SimpleNamespace``."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def __getattr__(self, name: str) -> torch.Tensor:
        raise AttributeError(name)


class SSpaceLinear(nn.Module):
    """A linear module with an S-space adapter: ``y = x W^T + b + delta(x Vh^T) U^T``.

    Surgery makes one out of an ``nn.Linear`` (or GPT-2's ``Conv1D``) by changing the module's class in place, as FSDP2
    does: the parameters, hooks, aliases and every reference to the module stay what they were, and undoing it is
    changing the class back.

    Attributes:
        variant: the variant's configuration.
        factors: the frozen factors ``.U``, ``.S``, ``.Vh``.
        core: the trainable core.
        weight, bias: the frozen base parameters, in their own layout.
        layout: "out_in" or "in_out".
        base_class: the class that the module had.
        keeps_base: whether the base weight is there; in residual form it need not be.
        form: "delta"; "residual" where ``W_res`` stands in the weight's place.
        lowering: "auto", or the name of the one lowering to use.
        schedule: which lowering runs from how many tokens on.
    """

    variant: Variant
    factors: Factors
    core: Core
    layout: str
    base_class: type[nn.Module]
    weight: torch.Tensor
    bias: torch.Tensor | None
    keeps_base: bool = True
    form: str = "delta"
    lowering: str = "auto"
    schedule: Schedule
    handle: torch.Tensor
    _kept: dict[str, Kept]

    @property
    def parameter(self) -> torch.Tensor:
        """The parameter that holds the weight; of a part of a packed weight, the whole."""
        return self.weight

    @property
    def weight_shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.weight.shape

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """The base's product and the adapter's term in one of the lowerings, (..., d_out) for x (..., d_in)."""
        x = args[0] if args else next(iter(kwargs.values()))
        return REGISTRY[self.chosen(x)].run(self, x, args, kwargs)

    def chosen(self, x: torch.Tensor) -> str:
        """Name of the lowering for an input; what is traced or exported always shows the low-rank form."""
        core = self.core
        if torch.compiler.is_compiling():
            if _is_exporting() or torch.is_autocast_enabled(x.device.type):
                return "lowrank"
        elif not core.plain() or type(x) not in (torch.Tensor, nn.Parameter):
            return "lowrank"
        if self.weight.requires_grad:  # the base is trained too: it has to be in the product
            return "lowrank"
        steps = self.schedule.case(training=core.trains(), rows=core.coeff.dim() > 0)
        return step(steps, x.numel() // self.factors.Vh.shape[1]) if len(steps) > 1 else steps[0][1]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.forget()
        if "schedule" in vars(self) and self.lowering == "auto" and not self.weight.is_meta:
            self.schedule = schedule_of(self, "auto")  # for the dtype and the device that it has now
        return self

    def train(self, mode: bool = True) -> Any:
        """Change the mode; on an accelerator, where values are not compared, ``eval()`` drops what is kept."""
        if self.factors.U.device.type != "cpu" and not mode:
            self.forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_kept", "handle")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        give_handle(self)

    def forget(self) -> None:
        """Drop what is kept of the core and of what was made with it."""
        self.core.forget()
        vars(self).get("_kept", {}).clear()  # those that are not called have none

    def core_delta(self, h: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
        """``delta(h)`` (..., r) at the present core and coeff."""
        coeff = self.core.coeff.clone() if torch.is_grad_enabled() else self.core.coeff  # may be set before backward
        return self.variant.delta(h, S.to(coeff.dtype), self.core.prepared(self.variant), rows_like(coeff, h))

    def adapter_delta(self, x: torch.Tensor) -> torch.Tensor:
        """``delta(x Vh^T)`` (..., r) in the dtype of x."""
        return self.core_delta(F.linear(x, self.factors.Vh.to(x.dtype)), self.factors.S)

    def adapter_term(self, x: torch.Tensor, *, whole: bool = False) -> torch.Tensor:
        """``delta(x Vh^T) U^T``, (..., d_out), by two thin products in the dtype of x.

        Args:
            whole: add the base's own part in the factors' span, ``(S h + delta) U^T``, as the residual form wants it.
        """
        h = F.linear(x, self.factors.Vh.to(x.dtype))
        coeff = self.core.coeff
        S = self.factors.S.to(coeff.dtype)
        d = self.variant.delta(h, S, self.core.prepared(self.variant), rows_like(coeff, h))
        if whole:
            d = h * S.to(h.dtype) + d
        return F.linear(d, self.factors.U.to(x.dtype))

    def delta_factor(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``U D^T`` (d_out, r) with ``D = delta(I)`` at the present core and coeff: the weight changes by ``U D^T Vh``.

        Args:
            dtype: to compute in and return; the core's by default.

        Returns:
            A matrix, or of a stack (stack, d_out, r).

        Raises:
            VariantError: the variant is not linear in h.
            InputError: coeff steers the rows of a batch, so that there is not one weight.
        """
        core, factors = self.core, self.factors
        if not self.variant.linear:
            raise VariantError(f"{self.variant.name} is not linear in its input: no weight has the same effect")
        if core.coeff.dim():
            raise InputError("coeff steers the rows of a batch differently: set a scalar coeff first")
        dtype = dtype or core.coeff.dtype
        tensors = {name: p.to(dtype) for name, p in core.tensors().items()}
        U, S, coeff = factors.U.to(dtype), factors.S.to(dtype), core.coeff.to(dtype)

        def factor(U: torch.Tensor, S: torch.Tensor, core: dict[str, torch.Tensor]) -> torch.Tensor:
            D = self.variant.delta(torch.eye(len(S), dtype=dtype, device=S.device), S, _Tensors(core), coeff)
            return U @ D.T

        if factors.stack is None:
            return factor(U, S, tensors)
        if _is_exporting() or torch._C._get_tracing_state() is not None:
            # levels of vmap neither decompose nor trace
            each = [{name: p[i] for name, p in tensors.items()} for i in range(factors.stack)]
            return torch.stack([factor(*parts) for parts in zip(U, S, each, strict=True)])
        return torch.func.vmap(factor)(U, S, tensors)

    def delta_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The change of the weight at the present core and coeff, ``U D^T Vh``, in the weight's shape and layout.

        The arguments and errors are those of :meth:`delta_factor`.
        """
        left = self.delta_factor(dtype)
        return of_weight(left @ self.factors.Vh.to(left.dtype), self.layout, self.weight_shape)

    def extra_repr(self) -> str:
        shape = tuple(self.weight.shape)
        return f"{self.variant.name}, weight={shape}, r={self.factors.rank}, bias={self.bias is not None}"


class SSpaceWeight(SSpaceLinear):
    """The same adapter as a parametrisation of a weight, ``W -> W + dW``, for products made without calling a module.

    Such weights are read by their owner (``nn.MultiheadAttention.in_proj_weight``, a raw ``nn.Parameter``), so that
    only the weight itself can be intercepted. The base weight and bias are found through the owner. Of a packed weight,
    several parts may be sites, each some rows of it.
    """

    def __init__(
        self, owner: nn.Module, weight_name: str, bias_name: str | None, key: str, rows: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.owner = (owner,)  # in a tuple, since a registered owner would make the module tree a cycle
        self.weight_name = weight_name
        self.bias_name = bias_name
        self.rows = rows
        self.part = "" if rows is None else key.rpartition(".")[2]
        siblings = [m for m in owner.modules() if isinstance(m, SSpaceWeight) and m.owner[0] is owner]
        self.order: tuple[str, ...] = siblings[0].order if siblings else tuple(owner._parameters)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The frozen base weight."""
        return part_of(self.parameter, self.rows)

    @property
    def parameter(self) -> torch.Tensor:
        """The parameter that holds it."""
        return getattr(self.owner[0].parametrizations, self.weight_name).original  # type: ignore[no-any-return]

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """The frozen bias that is added to the product, or None."""
        return part_of(getattr(self.owner[0], self.bias_name), self.rows) if self.bias_name else None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return ``W + dW``, summed in the core's dtype and rounded once."""
        if self.rows is None:
            return changed_weight(self, weight)
        start, stop = self.rows
        return torch.cat([weight[:start], changed_weight(self, weight[start:stop]), weight[stop:]])


def _is_exporting() -> bool:
    """Whether ``torch.export`` runs: Dynamo of torch 2.11 takes ``torch.compiler.is_exporting()`` for always true."""
    return torch.compiler._is_exporting_flag


def matrices_of(weight: torch.Tensor, layout: str, shape: tuple[int, ...]) -> torch.Tensor:
    """See a weight in its own layout as a matrix (d_out, d_in) or a stack of them (stack, d_out, d_in)."""
    if layout == "out_in":
        return weight if weight.shape == shape else weight.reshape(shape)
    stored = (*shape[:-2], shape[-1], shape[-2])
    return (weight if weight.shape == stored else weight.reshape(stored)).mT


def of_weight(matrices: torch.Tensor, layout: str, shape: torch.Size) -> torch.Tensor:
    """The inverse of :func:`matrices_of`: matrices in the layout and shape of a weight."""
    stored = matrices if layout == "out_in" else matrices.mT
    return stored if stored.dim() == len(shape) else stored.reshape(shape)


def remainder(site: SSpaceLinear) -> torch.Tensor:
    """``W_res = W - U S Vh`` (d_out, d_in) of the stored factors, in float32 or better."""
    with torch.no_grad():
        weight = site.weight.detach().to(device=site.factors.U.device)
        W = matrices_of(weight, site.layout, site.factors.shape).to(torch.float64)
        return (W - _top(site.factors)).to(torch.promote_types(weight.dtype, torch.float32))


def rebuilt(W_res: torch.Tensor, site: SSpaceLinear, dtype: torch.dtype) -> torch.Tensor:
    """``W_res + U S Vh`` in the layout of the weight, summed in float64 and rounded once."""
    with torch.no_grad():
        weight = (W_res.to(torch.float64) + _top(site.factors)).to(dtype)
        return weight if site.layout == "out_in" else weight.T.contiguous()


def _top(factors: Factors) -> torch.Tensor:
    U, S, Vh = (factor.to(torch.float64) for factor in (factors.U, factors.S, factors.Vh))
    return (U * S) @ Vh


def changed_weight(site: SSpaceLinear, weight: torch.Tensor) -> torch.Tensor:
    """``W + dW``, summed in the core's dtype and rounded once to the weight's."""
    delta = site.delta_weight()
    return (weight.to(delta.dtype) + delta).to(weight.dtype)


def rows_like(coeff: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Shape a per-row coeff to multiply h: dimension 0 is the batch, or the row-major flattened one.

    Args:
        coeff: 0-d, or (batch,).
        h: (batch, ..., r), or (batch * n, ..., r).

    Returns:
        0-d, or (rows, 1, ..., 1) with as many dimensions as h.

    Raises:
        InputError: the rows do not divide the batch.
    """
    if coeff.dim() == 0:
        return coeff
    rows, batch = coeff.shape[0], h.shape[0]
    if rows > 1 and (h.dim() < 2 or batch % rows):
        raise InputError(f"coeff has {rows} rows, but a site got an input of shape {(*h.shape[:-1], 'd_in')}")
    if rows not in (1, batch):
        coeff = coeff[:, None].expand(rows, batch // rows)
    return coeff.reshape(-1, *[1] * (h.dim() - 1))
