"""The input of every linear module, recorded by hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from passes.capture.capture import forward_call


def hooked(model: nn.Module, keys: list[str], inputs: Any) -> dict[str, list[torch.Tensor]]:
    """Every input of the modules at these paths."""
    found: dict[str, list[torch.Tensor]] = {key: [] for key in keys}
    handles = [
        model.get_submodule(key).register_forward_pre_hook(lambda _, args, key=key: found[key].append(args[0].clone()))
        for key in keys
    ]
    args, kwargs = forward_call(inputs)
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found
