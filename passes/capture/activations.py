"""See what a model feeds its linear sites while it runs: by hooks where a module is called, else by its products.

A product is told by its operand: a view, a transpose or a cast of the site's weight. PyTorch's fused fast paths, which
show no products, are off meanwhile; they compute the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from passes.analysis.linear_sites import Site
from passes.ir.torch_internals import Convolution, OpOverload, TorchDispatchMode, storage_address

aten = torch.ops.aten
See = Callable[[str, torch.Tensor], None]

# where the two operands stand among the arguments
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.matmul: 0, aten.mv: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addmv: 1}
VIEWS = (aten.view, aten._unsafe_view, aten.reshape)
CASTS = (aten._to_copy, aten.to, aten.clone, aten.contiguous)


@contextlib.contextmanager
def observed(model: nn.Module, sites: Sequence[Site], called: Container[str], see: See) -> Iterator[None]:
    """Call ``see(key, x)`` with the input x (..., d_in) of a site whenever the model computes its product.

    Args:
        called: keys of the sites whose module is called for every product; the others are recognised by their weight.
    """
    owners = {site.key: model.get_submodule(site.weight.rpartition(".")[0]) for site in sites}
    hooked = [key for key, module in owners.items() if key in called and not isinstance(module, Convolution)]
    watch = _Products([site for site in sites if site.key not in hooked], model, see)
    handles = []
    for key in hooked:
        handles.append(owners[key].register_forward_pre_hook(_hook(key, watch), with_kwargs=True))
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"), watch if watch.weights else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()


def _hook(key: str, watch: _Products) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        watch.show(key, args[0] if args else next(iter(kwargs.values())))

    return hook


def unfold(
    x: torch.Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> torch.Tensor:
    """What a convolution's weight multiplies: (batch, *positions, channels * kernel) of x (batch, channels, ...)."""
    around = [size for size in reversed(padding) for _ in range(2)]
    x = torch.nn.functional.pad(x, around) if any(around) else x
    for at, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(at, gap * (size - 1) + 1, step)[..., ::gap]  # the entries of the window are the last dimension
    positions = len(kernel)
    return x.movedim(1, 1 + positions).flatten(1 + positions)


@dataclass(frozen=True)
class _Weight:
    """A weight to look for: its memory, its site, and whether its inputs have the sequence first."""

    start: int
    stop: int
    site: Site
    sequence_first: bool


class _Products(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, sites: Sequence[Site], model: nn.Module, see: See) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.see, self.quiet = see, False
        self.weights: dict[int, list[_Weight]] = {}
        self.alive: dict[int, StorageWeakRef] = {}
        self.leads: WeakIdKeyDictionary = WeakIdKeyDictionary()  # shape of a matrix before it was flattened
        for site in sites:
            weight = site.weight_of(model)
            owner = model.get_submodule(site.weight.rpartition(".")[0])
            parent = model.get_submodule(site.weight.rpartition(".")[0].rpartition(".")[0])  # of out_proj
            self._watch(weight, site, any(isinstance(m, nn.MultiheadAttention) for m in (owner, parent)))

    def _watch(self, tensor: torch.Tensor, site: Site, sequence_first: bool) -> None:
        storage, start = tensor.untyped_storage(), tensor.data_ptr()
        known = _Weight(start, start + tensor.numel() * tensor.element_size(), site, sequence_first)
        address = storage_address(tensor)
        if address not in self.alive or self.alive[address].expired():
            self.weights[address] = []
            self.alive[address] = StorageWeakRef(storage)  # while it is held, the address means this storage
        self.weights[address].append(known)

    def _known(self, tensor: object) -> list[_Weight]:
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.numel() == 0:
            return []
        address = storage_address(tensor)
        if address not in self.weights or self.alive[address].expired():
            return []
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        return [known for known in self.weights[address] if known.start < stop and start < known.stop]

    def show(self, key: str, x: torch.Tensor) -> None:
        """Pass an input on; what is computed with it meanwhile is not looked at."""
        before, self.quiet = self.quiet, True
        try:
            self.see(key, x.detach())
        finally:
            self.quiet = before

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", None)
        if self.quiet or packet is None:
            return out
        if packet in PRODUCTS:
            first = PRODUCTS[packet]
            self._product(*args[first : first + 2])
        elif packet is aten.linear:
            self._product(args[0], args[1].t())
        elif packet is aten.convolution:
            for known in self._known(args[1]):
                self.show(known.site.key, unfold(args[0], args[1].shape[2:], *args[3:6]))
        elif packet in VIEWS and isinstance(out, torch.Tensor) and out.dim() == 2 and args[0].dim() > 2:
            if out.shape[-1] == args[0].shape[-1]:
                self.leads[out] = args[0].shape[:-1]
            elif args[0].shape[0] and out.shape[0] % args[0].shape[0] == 0:  # heads that are put side by side
                self.leads[out] = (args[0].shape[0], out.shape[0] // args[0].shape[0])
        elif packet in CASTS:
            for known in self._known(args[0]):
                if out is not args[0] and not self._known(out):
                    self._watch(out, known.site, known.sequence_first)
        return out

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        for weight, x in ((right, left), (left, right)):
            for known in self._known(weight):
                x = x.mT if x is right and x.dim() > 1 else x
                if x.shape[-1] != known.site.d_in:
                    continue
                lead = self.leads.get(x)
                x = x if lead is None else x.reshape(*lead, x.shape[-1])
                turned = known.sequence_first and x.dim() > 2
                self.show(known.site.key, x.flatten(1, -2).transpose(0, 1) if turned else x)
