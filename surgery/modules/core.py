"""What an adapter is made of: frozen factors, and a trainable core with its coefficient."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from surgery.support.change_detection import watch
from surgery.variants import Variant


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

    def extra_repr(self) -> str:
        stack = f"stack={self.stack}, " if self.stack else ""
        return f"{stack}d_out={self.shape[-2]}, d_in={self.shape[-1]}, r={self.rank}, dtype={self.S.dtype}"


class Core(nn.Module):
    """Trainable tensors of a site, named as in the variant's table row, and the runtime knob ``coeff``.

    Both stay in float32 or float64 when the model is cast to a half dtype: they are small, and a half ``g`` would lose
    its small gains.
    """

    coeff: torch.Tensor

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
        self.register_buffer("coeff", torch.ones((), dtype=dtype, device=device), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            out = fn(tensor)
            half = out.dtype in (torch.float16, torch.bfloat16) and tensor.dtype != out.dtype
            return tensor.to(device=out.device) if half else out

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and frozen tensors by name: all that the variant's core is, without the knob."""
        buffers = {name: buffer for name, buffer in self.named_buffers() if name != "coeff"}
        return dict(self.named_parameters()) | buffers

    def state(self) -> tuple[torch.Tensor, ...]:
        """Parameters, frozen tensors and the knob: all that the adapter's term depends on beside the factors."""
        if self._modules:  # parametrised
            return (*self.parameters(), *self.buffers())
        return (*self._parameters.values(), *self._buffers.values())  # type: ignore[arg-type]  # none is None

    def trains(self) -> bool:
        """Whether this forward is one that the core's gradient will be taken of."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def plain(self) -> bool:
        """Whether the core's own parameters are what is computed with, and nothing records the operations."""
        if torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        for p in self._parameters.values():  # a loop, as in each forward a generator costs as much as what it asks
            if type(p) is not nn.Parameter:
                return False
        return get_proxy_mode() is None

    def prepared(self, variant: Variant) -> Any:
        """The core, with what the variant prepares from it where no gradient is wanted.

        It is kept until the values of the core change. On the CPU they are compared, since ``.data`` may be written
        unnoticed; on an accelerator, where that would synchronise, the tensors' version counters are, and
        ``surgery.refresh`` and ``eval()`` are for such writes.
        """
        if not variant.prepares or torch.is_grad_enabled():
            return self
        tensors = list(self.parameters())
        if torch.compiler.is_compiling() or not self.plain():
            return self  # what traces must see the computation
        kept = vars(self).get("_prepared")
        if kept is None or not all(same(p) for p, same in zip(tensors, kept[0], strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                made = variant.prepare(self)  # type: ignore[arg-type]
                kept = [watch(p, by_value=True) for p in tensors], SimpleNamespace(**self.tensors(), **made)
            vars(self)["_prepared"] = kept
        return kept[1]

    def forget(self) -> None:
        """Drop what was prepared."""
        vars(self).pop("_prepared", None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_prepared"}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.tensors().items())
