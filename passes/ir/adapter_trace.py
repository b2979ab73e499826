"""Trace the forward of an adapter once into plain ATen nodes that fit every site of its kind.

The sizes that differ between sites (rows, tokens, ``d_in``, ``d_out``) are symbols while tracing, so that a graph never
holds one of them as a number, and one trace serves all sites with the same :attr:`InlinableAdapter.signature`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Protocol, TypeGuard

import torch
from torch import fx, nn
from torch.func import functional_call

from passes.ir.torch_internals import fake_mode_with_symbols

aten = torch.ops.aten
INPUT = "input"


class InlinableAdapter(Protocol):
    """What an ``nn.Module`` must tell to be inlined in a graph, and to be taken out of it.

    Its forward takes the input of the product as (rows, tokens, d_in) and gives what is added to the product's output,
    (rows, tokens, d_out). An adapter of a weight takes the weight and gives the weight to use instead.

    Attributes:
        signature: adapters of equal signature have the same forward but for free sizes.
        free_sizes: dimensions of the tensors (and of ``"input"``) that the signature leaves open.
        coefficient_name: of the tensor with one entry per row of the batch, or a single one for all.
        base: name of the tensor to multiply by in place of the weight (a remainder), or None for the weight itself.
        weight, weight_name, weight_dtype, device: of the base.
        features: ``(d_in, d_out)`` of the product.
        batched: whether the forward uses ``vmap``, which is then traced away.
        keeps_base: whether the graph module still holds the weight.
        rows: first row, and the one after the last, of an adapter of a part of the weight; None for all of it.
    """

    keeps_base: bool

    @property
    def signature(self) -> Hashable: ...
    @property
    def free_sizes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def coefficient_name(self) -> str: ...
    @property
    def base(self) -> str | None: ...
    @property
    def weight(self) -> torch.Tensor: ...
    @property
    def weight_name(self) -> str: ...
    @property
    def weight_dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def features(self) -> tuple[int, int]: ...
    @property
    def batched(self) -> bool: ...
    @property
    def rows(self) -> tuple[int, int] | None: ...

    def merged_weight(self) -> torch.Tensor:
        """The dense weight that has the adapter's effect at its present values."""

    def reference(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What an input and its product should become."""

    def use_base(self) -> None:
        """From now on, add to the product of the weight itself, and to that of the remainder no more."""

    def get_buffer(self, target: str, /) -> torch.Tensor: ...
    def get_submodule(self, target: str, /) -> nn.Module: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]: ...


_TRACES: dict[Hashable, fx.Graph] = {}
_MOST = 64


def trace_adapter(
    adapter: InlinableAdapter, shape: tuple[int, ...], dtype: torch.dtype, *, rows: bool = True
) -> fx.Graph:
    """Trace an adapter into a graph whose placeholders are ``input`` and the names of the adapter's tensors.

    Args:
        shape: of an example input, (rows, tokens, d_in) or the weight's; its sizes are free.
        dtype: of the input.
        rows: whether the coefficient has one entry for each row of the input; it has none of a weight.

    Returns:
        A graph of ATen overloads with one output; it may be shared, and must not be changed.
    """
    key = (adapter.signature, dtype, adapter.device, len(shape), rows)
    if key not in _TRACES:
        if len(_TRACES) >= _MOST:
            _TRACES.pop(next(iter(_TRACES)))
        _TRACES[key] = _trace(adapter, shape, dtype, rows)
    return _TRACES[key]


def is_adapter(module: object) -> TypeGuard[InlinableAdapter]:
    """Whether a module tells what :class:`InlinableAdapter` asks for."""
    cls = type(module)
    return all(hasattr(cls, name) for name in ("signature", "free_sizes", "reference", "merged_weight"))


def adapter_at(root: nn.Module, path: str) -> InlinableAdapter:
    """The adapter that is a submodule."""
    adapter = root.get_submodule(path)
    assert is_adapter(adapter), path
    return adapter


def adapter_tensors(adapter: InlinableAdapter) -> dict[str, torch.Tensor]:
    """Parameters and buffers of an adapter by name."""
    return dict(adapter.named_parameters()) | dict(adapter.named_buffers())


def _trace(adapter: InlinableAdapter, shape: tuple[int, ...], dtype: torch.dtype, rows: bool) -> fx.Graph:
    # here, since sympy takes a third of a second to import
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    tensors, device = adapter_tensors(adapter), adapter.device
    mode = fake_mode_with_symbols()
    free = {INPUT: tuple(range(len(shape))), **adapter.free_sizes}

    def fake(name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        open_sizes = free.get(name, ())
        if name == adapter.coefficient_name and rows:
            open_sizes, sizes = (0,), shape[:1]
        # a free size of 1 would be taken to be fixed
        sizes = tuple(2 if i in open_sizes and size == 1 else size for i, size in enumerate(sizes))
        kinds = [DimDynamic.DYNAMIC if i in open_sizes else DimDynamic.STATIC for i in range(len(sizes))]
        stand_in = torch.empty(sizes, dtype=dtype, device=device)  # never written: no memory is touched
        return mode.from_tensor(stand_in, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    names = list(tensors)

    def forward(x: torch.Tensor, *values: torch.Tensor) -> object:
        assert isinstance(adapter, nn.Module)
        return functional_call(adapter, dict(zip(names, values, strict=True)), (x,))

    inputs = [fake(INPUT, shape, dtype), *(fake(name, tuple(t.shape), t.dtype) for name, t in tensors.items())]
    kinds = {kind for kind in ("cpu", device.type) if torch.amp.is_autocast_available(kind)}  # not of "meta"
    with contextlib.ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.no_grad(), mode):
            stack.enter_context(context)
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        # what vmap batches shows only below the dispatch of its levels
        graph = make_fx(forward, tracing_mode="real", pre_dispatch=not adapter.batched)(*inputs).graph
    for node, name in zip(list(graph.nodes), [INPUT, *names], strict=False):
        node.target = name
    _drop_idle_casts(graph)
    graph.eliminate_dead_code()
    return graph


def _drop_idle_casts(graph: fx.Graph) -> None:
    """Remove casts to the dtype that a tensor has, which ``Tensor.to`` leaves in a trace."""
    for node in list(graph.nodes):
        if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
            source = node.args[0]
            if source.meta["val"].dtype == node.args[1]:
                node.replace_all_uses_with(source)
                graph.erase_node(node)


def inline(
    graph: fx.Graph,
    traced: fx.Graph,
    values: Mapping[str, Callable[[], fx.Node]],
    prefix: str,
    tag: Callable[[fx.Node], fx.Node],
) -> fx.Node:
    """Copy a traced forward to the graph's insertion point.

    Args:
        values: makes the node of each placeholder when it is first needed.
        prefix: of the new nodes' names.
        tag: called with each new node, to write its provenance.

    Returns:
        The node of the result.
    """
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.nodes:
        if node.op == "placeholder":
            if node.users:
                copies[node] = values[str(node.target)]()
        elif node.op == "output":
            return copies[node.args[0]]
        else:
            args, kwargs = (fx.map_arg(a, copies.__getitem__) for a in (node.args, node.kwargs))
            copies[node] = tag(graph.create_node(node.op, node.target, args, kwargs, f"{prefix}_{node.name}"))
    raise AssertionError("a graph ends with its output")
