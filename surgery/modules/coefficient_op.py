"""The coefficient in compiled training: an operator, which a recomputation in backward runs again as eager code does.

A compiled block that is checkpointed runs none of a site's own code when it is recomputed; its input ``coeff`` is what
is in force then. The operator looks up what the block's own forward ran with.
"""

from __future__ import annotations

import torch

from passes.errors import SurgeryError
from surgery.modules.recorded_coefficient import STEERINGS

OPERATORS = torch.library.Library("surgery", "FRAGMENT")
OPERATORS.define(
    "coefficient(Tensor coeff, Tensor handle, int stream) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # replay would use the coefficient of the recording
)


def _coefficient(coeff: torch.Tensor, handle: torch.Tensor, stream: int) -> torch.Tensor:
    """A copy of the coefficient of a forward, or of the forward that is recomputed."""
    recalled = STEERINGS[int(handle)].recall()
    if recalled is None:
        return coeff.clone()
    value = recalled.now.value(stream, coeff.device).to(coeff.dtype)
    if value.shape != coeff.shape or recalled.cores.scales:
        found = "a set_scale" if recalled.cores.scales else f"coeff of shape {tuple(coeff.shape)}"
        raise SurgeryError(
            f"compiled code is recomputed in backward (gradient checkpointing): its forward ran with coeff of shape "
            f"{tuple(value.shape)}, and {found} has been set since, for which it was not compiled; call backward() "
            "before that, or compile the checkpointed function as a whole"
        )
    recalled.check(None, "of compiled code")
    return value.clone()


def _coefficient_shape(coeff: torch.Tensor, handle: torch.Tensor, stream: int) -> torch.Tensor:
    return torch.empty_like(coeff)


OPERATORS.impl("coefficient", _coefficient, "CompositeExplicitAutograd")
torch.library.register_fake("surgery::coefficient", _coefficient_shape, lib=OPERATORS)
