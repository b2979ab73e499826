"""What an adapter is made of: frozen factors, and a trainable core."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Self

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from passes.ir.torch_internals import function_transforms, script_tracing_state
from surgery.modules.steering import keeping_precision


class Factors(nn.Module):
    """Frozen singular factors of a site: ``U`` (d_out, r), ``S`` (r,), ``Vh`` (r, d_in); of a stack, stacked."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor

    def __init__(self, U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("U", U)
        self.register_buffer("S", S)
        self.register_buffer("Vh", Vh)

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.S.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(d_out, d_in)``, or of a stack of matrices ``(stack, d_out, d_in)``."""
        return (*self.S.shape[:-1], self.U.shape[-2], self.Vh.shape[-1])

    @property
    def stack(self) -> int | None:
        """Number of matrices, or None for a single one."""
        return None if self.S.dim() == 1 else len(self.S)

    def forward(self) -> dict[str, torch.Tensor]:
        """The factors; a call runs the hooks that bring in what accelerate has offloaded."""
        return {"U": self.U, "S": self.S, "Vh": self.Vh}

    def extra_repr(self) -> str:
        stack = f"stack={self.stack}, " if self.stack else ""
        return f"{stack}d_out={self.shape[-2]}, d_in={self.shape[-1]}, r={self.rank}, dtype={self.S.dtype}"


class Core(nn.Module):
    """Trainable tensors of a site, named as in the variant's table row, and a lasting factor of its coefficient.

    They stay in float32 or float64 when the model is cast to a half dtype: they are small, and a half ``g`` would lose
    its small gains.

    Attributes:
        scale: multiplies the coefficient at this site, before any clamp of the variant; None stands for 1.
    """

    scale: torch.Tensor | None

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
        frozen: Collection[str] = (),
    ) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            tensor = tensor.to(device=device, dtype=dtype, copy=True)
            if name in frozen:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))
        self._buffers["scale"] = None

    def __setattr__(self, name: str, value: torch.Tensor | nn.Module) -> None:
        super().__setattr__(name, value)
        if name == "scale":  # accelerate moves every buffer that is named there, and cannot move None
            names = self._non_persistent_buffers_set
            names.discard(name) if value is None else names.add(name)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors, float32 or float64."""
        for table in (self._parameters, self._buffers):
            for tensor in table.values():
                if tensor is not None:
                    return tensor.dtype
        return next(self.parameters()).dtype  # parametrised

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(keeping_precision(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and frozen tensors by name: all that the variant's core is."""
        buffers = {name: buffer for name, buffer in self.named_buffers() if name != "scale"}
        return dict(self.named_parameters()) | buffers

    def forward(self) -> dict[str, torch.Tensor]:
        """The parameters and buffers by name; a call runs the hooks that bring in what accelerate has offloaded."""
        tables = (self._parameters, self._buffers)
        return {name: t for table in tables for name, t in table.items() if t is not None}

    def trains(self) -> bool:
        """Whether autograd records this forward, and the core requires a gradient."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def plain(self) -> bool:
        """Whether the core's own parameters are what is computed with, and nothing records the operations."""
        if script_tracing_state() is not None or function_transforms() is not None:
            return False
        for p in self._parameters.values():  # a loop, as in each forward a generator costs as much as what it asks
            if type(p) is not nn.Parameter:
                return False
        return get_proxy_mode() is None

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.tensors().items())
