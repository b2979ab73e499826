"""Tensors over a run of somebody else's code: what is written to in place is copied just before, and put back after.

Every operation of torch passes the dispatcher, and its schema says what it writes to. Kernels that do not say it (batch
normalisation's), and views of NumPy, write past that: small tensors that are no parameters are copied before the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from passes.ir.torch_internals import (
    OpOverload,
    TorchDispatchMode,
    inner_tensors,
    is_fake,
    put_tensor_hooks,
    schema_of,
    set_versions,
    storage_address,
    tensor_hooks,
    tree_iter,
    without_modes,
    without_torch_function,
)

AHEAD = 2**16  # bytes, at most, of a tensor that is copied before the run


class TensorStates:
    """What tensors are and hold, to be put back."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        with without_torch_function(), torch.inference_mode(False), torch.no_grad():
            self.before = [_Before.of(tensor) for tensor in tensors]
        self.watch = Watch(before.alias for before in self.before if before.alias is not None)

    def put_back(self) -> list[torch.Tensor]:
        """Put it all back; gives the tensors that were written to unseen, whose values are not known any more."""
        with without_torch_function(), torch.inference_mode(False), torch.no_grad():
            written = [before for before in self.before if before.is_written]
            lost = [before.tensor for before in self.before if before.is_lost(self.watch)]
            self.watch.put_back()
            for before in self.before:
                before.put_back_values()
            set_versions([before.tensor for before in written], [before.version or 0 for before in written])
            for before in self.before:
                before.put_back_flags()
        return lost


class Watch(TorchDispatchMode):
    """Copies memory just before an operation writes to it."""

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memories = {storage_address(t): t.untyped_storage() for t in tensors if not t.is_meta}
        self.sizes = {address: memory.nbytes() for address, memory in self.memories.items()}
        self.copies: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        places = _WRITES.get(func)
        if places is None:
            places = _WRITES[func] = _written(func)
        if places:
            for tensor in _arguments(places, args, kwargs):
                self._copy(tensor)
        return func(*args, **kwargs)

    def _copy(self, tensor: torch.Tensor) -> None:
        for inner in inner_tensors(tensor):
            self._copy(inner)
        if is_fake(tensor) or tensor.is_meta or tensor.layout is not torch.strided or inner_tensors(tensor):
            return
        address = storage_address(tensor)
        if address in self.memories and address not in self.copies:
            with without_modes():
                self.copies[address] = self.memories[address].clone()

    def shrunk(self, address: int) -> bool:
        """Whether memory was given back, and with it what it held."""
        return self.memories[address].nbytes() < self.sizes[address]

    def put_back(self) -> None:
        """Give every memory its size, and what it held."""
        for address, memory in self.memories.items():
            if memory.nbytes() != self.sizes[address]:
                memory.resize_(self.sizes[address])
            copy = self.copies.pop(address, None)
            if copy is not None and copy.nbytes() == memory.nbytes():
                memory.copy_(copy)


_WRITES: dict[OpOverload, tuple[tuple[int, str], ...]] = {}  # by operation: what it writes to, by position and name
_ALL = ((-1, ""),)


def _written(func: OpOverload) -> tuple[tuple[int, str], ...]:
    schema = schema_of(func)
    if schema is None:  # one of higher order: what runs inside is not seen
        return _ALL
    arguments = enumerate(schema.arguments)
    return tuple((i, one.name) for i, one in arguments if one.alias_info is not None and one.alias_info.is_write)


def _arguments(
    places: tuple[tuple[int, str], ...], args: tuple[object, ...], kwargs: dict[str, object]
) -> Iterator[torch.Tensor]:
    given = (args, kwargs) if places is _ALL else [args[i] if i < len(args) else kwargs.get(n) for i, n in places]
    return (leaf for leaf in tree_iter(given) if isinstance(leaf, torch.Tensor))


@dataclass(frozen=True, eq=False)
class _Before:
    """A tensor as it was.

    Attributes:
        alias: another tensor on the same memory; None of a wrapper of other tensors, or of one that is not strided.
        copy: its values, where they were copied.
        version: None of a tensor of inference mode.
    """

    tensor: torch.Tensor
    alias: torch.Tensor | None
    copy: torch.Tensor | None
    version: int | None
    leaf: bool
    requires_grad: bool
    grad: torch.Tensor | None
    hooks: tuple[dict[int, object] | None, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> _Before:
        alias = copy = None
        if tensor.layout is not torch.strided:
            copy = tensor.detach().clone()
        elif not inner_tensors(tensor):
            alias = tensor.data
            if not isinstance(tensor, nn.Parameter) and not alias.is_meta and alias.nbytes <= AHEAD:
                copy = alias.clone()
        version = None if tensor.is_inference() else tensor._version
        grad = tensor.grad if tensor.is_leaf else None
        return _Before(
            tensor, alias, copy, version, tensor.is_leaf, tensor.requires_grad, grad, tensor_hooks(tensor)
        )  # fmt: skip

    @property
    def is_written(self) -> bool:
        return self.version is not None and self.tensor._version != self.version

    def is_lost(self, watch: Watch) -> bool:
        """Whether the values have changed and are not known."""
        if self.alias is None or self.alias.is_meta or self.copy is not None:
            return False
        address = storage_address(self.alias)
        written = self.is_written and storage_address(self.tensor) == address  # not one that was given other memory
        return address not in watch.copies and (written or watch.shrunk(address))

    def put_back_values(self) -> None:
        """Give the tensor its memory, and where they were copied its values."""
        tensor, alias, copy = self.tensor, self.alias, self.copy
        if alias is None:
            if copy is not None and self.is_written:
                tensor.copy_(copy)
            return
        if storage_address(tensor) != storage_address(alias) or _form(tensor) != _form(alias):
            tensor.data = alias
        if copy is not None and not torch.equal(alias, copy):
            with torch.inference_mode(alias.is_inference()):  # nowhere else may a tensor of that mode be written
                alias.copy_(copy)

    def put_back_flags(self) -> None:
        """Give the tensor its gradient, its hooks, and no history where it had none."""
        tensor = self.tensor
        if self.leaf and not tensor.is_leaf:
            tensor.detach_()
        if tensor.is_leaf and tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if self.leaf and tensor.grad is not self.grad:
            tensor.grad = self.grad
        put_tensor_hooks(tensor, self.hooks)


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()
