"""Tensors that lie in shards on several processes, as ``torch.distributed.fsdp.fully_shard`` makes them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from surgery.errors import AdapterError


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a distributed one."""
    module = sys.modules.get("torch.distributed.tensor")  # while nobody has imported it, there is no such tensor
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of a distributed one; every process has to take part in that."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def by_first_process(tensors: Iterable[torch.Tensor], write: Callable[[], None]) -> None:
    """Have something written once: by the first process where one of the tensors is distributed, and else here.

    Raises:
        AdapterError: the first process could not write.
    """
    sharded = next((tensor for tensor in tensors if is_sharded(tensor)), None)
    if sharded is None:
        write()
        return
    failed = torch.ones((), device=sharded.device)
    try:
        if dist.get_rank() == 0:
            write()
        failed.zero_()
    finally:
        dist.broadcast(failed, 0)
    if failed:
        raise AdapterError("the first process could not write the adapter; it says why")
