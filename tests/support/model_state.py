"""What surgery may not change for good, as lines that can be compared."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


class State(list[str]):
    """Lines that describe a model, and the objects that they identify, kept alive so that no identity is used twice."""

    held: list[Any]


def state_of(model: nn.Module) -> State:
    """Everything that surgery may not change for good: classes, modes, attributes, order, flags, identities, bytes."""
    state = State()
    state.held = [*model.modules(), *model.parameters(), *model.buffers()]
    for path, module in model.named_modules(remove_duplicate=False):
        registered = [list(names) for names in (module._parameters, module._buffers, module._modules)]
        state.append(f"{path} {type(module)} {id(module)} {module.training} {sorted(vars(module))} {registered}")
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        data = b"" if tensor.is_meta else tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        flags = (tensor.requires_grad, tensor.grad is None, tensor.dtype, tensor.shape)
        state.append(f"{name} {id(tensor)} {flags} {hashlib.sha256(data).hexdigest()}")
    return state
