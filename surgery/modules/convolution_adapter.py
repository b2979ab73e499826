"""The adapter of a convolution that is called: the term is a convolution by ``Vh``, the core, and one of 1x1 by ``U``.

The weight (d_out, channels, *kernel) is a matrix (d_out, channels * kernel) for unfolded inputs, as PEFT has it, and
nothing is unfolded: ``Vh`` in the shape of r kernels has the module's own strides, padding and dilation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from passes.ir.torch_internals import convolve
from surgery.lowerings import ALWAYS, Schedule
from surgery.modules.adapter import Adapter


class ConvolutionAdapter(Adapter):
    """An adapter on a convolution of one group."""

    def lower(self, x: torch.Tensor, base: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The output of the module, (batch, d_out, ...) for x (batch, channels, ...), or both without the batch."""
        y = base()
        return y + self.adapter_term(x).to(y.dtype)

    def reschedule(self, lowering: str | None = None) -> None:
        """Use the low-rank form: a convolution has no other, whatever is asked for elsewhere."""
        always = ((0, ALWAYS),)
        self.schedule = Schedule(always, always, always, always)

    def adapter_term(self, x: torch.Tensor, *, whole: bool = False) -> torch.Tensor:
        """What is added to the output for x; rows and tokens of coefficients belong to the batch and the positions."""
        module, factors = self.host.owner, self.factors
        batched = x if x.dim() == self.weight.dim() else x[None]
        kernels = factors.Vh.to(x.dtype).reshape(factors.rank, *self.weight.shape[1:])
        h = convolve(module, batched, kernels)  # (batch, r, *positions)
        positions = h.shape[2:]
        d = self.core_delta(h.flatten(2).mT, factors.S)
        term: torch.Tensor = F.linear(d, factors.U.to(d.dtype)).mT.unflatten(2, positions)  # type: ignore[no-untyped-call]
        return term if batched is x else term[0]
