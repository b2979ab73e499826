"""What a lowering may read of a site."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import nn

from surgery.lowerings._weight_cache import WeightCache
from surgery.variants import Variant

Base = Callable[[], torch.Tensor]
"""Computes what a module gives without its adapter, at most once."""


class SiteFactors(Protocol):
    """Frozen factors ``U`` (d_out, r), ``S`` (r,), ``Vh`` (r, d_in)."""

    @property
    def U(self) -> torch.Tensor: ...

    @property
    def S(self) -> torch.Tensor: ...

    @property
    def Vh(self) -> torch.Tensor: ...


class SiteCore(Protocol):
    """A trainable core."""

    @property
    def dtype(self) -> torch.dtype: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def trains(self) -> bool: ...

    def plain(self) -> bool: ...


class SiteHost(Protocol):
    """How the site meets its model; ``exact``: its forward may be added to in place."""

    exact: bool


class SiteWeight(Protocol):
    """The base weight of a site."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def holds_entries(self) -> bool: ...

    def matrix(self) -> torch.Tensor: ...

    def tensor(self) -> torch.Tensor: ...


class SiteSteering(Protocol):
    """The coefficient of a root; ``armed``: within a call of the root, which has checked what is cached."""

    armed: bool
    coeff: torch.Tensor


class LinearSite(Protocol):
    """A linear module that is called, ``y = x W^T + b + delta(x Vh^T) U^T``."""

    key: str
    form: str
    cache: WeightCache

    @property
    def variant(self) -> Variant: ...

    @property
    def factors(self) -> SiteFactors: ...

    @property
    def core(self) -> SiteCore: ...

    @property
    def host(self) -> SiteHost: ...

    @property
    def base_weight(self) -> SiteWeight: ...

    @property
    def layout(self) -> str: ...

    @property
    def weight(self) -> torch.Tensor: ...

    @property
    def bias(self) -> torch.Tensor | None: ...

    @property
    def steering(self) -> SiteSteering: ...

    def core_delta(self, h: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
        """``delta(h)`` (..., r) at the present core and coeff."""

    def adapter_delta(self, x: torch.Tensor) -> torch.Tensor:
        """``delta(x Vh^T)`` (..., r)."""

    def delta_factor(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``U D^T`` (d_out, r)."""

    def get_buffer(self, target: str) -> torch.Tensor:
        """``W_res``, in residual form."""
