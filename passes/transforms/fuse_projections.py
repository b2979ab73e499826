"""Fuse: one down-projection for the adapters of all sites that read the same input (q, k and v; gate and up).

    linear(rows(x), Vh_i) for each i     ->     wide = linear(x, [Vh_1; ...; Vh_n]),     rows(wide[..., a_i:b_i])

``rows`` sees a tensor as (rows, tokens, ...), with one row for each entry of the site's own coefficient, so it
stays with the site and the product comes before it: scalar and per-row coefficients go on working, and sizes stay free.
The concatenated matrix is stored once: the buffers that it is made of become views of its rows.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Self

import torch
from torch import fx, nn
from torch.fx.node import Argument, Target

from passes.infra.pass_base import Pass
from passes.ir.module_utils import tensor_at
from passes.ir.provenance import Provenance, adapter_instances, provenance_of, set_provenance, sites_by_product
from passes.ir.torch_internals import HigherOrderOperator, storage_address

aten = torch.ops.aten
HOLDER = "fused"
STALE = ("val", "tensor_meta", "example_value")
WRITING = {operator.setitem, operator.delitem, *(getattr(operator, n) for n in dir(operator) if n[0] == "i" and n[1:] in
           ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"))}  # fmt: skip


class StackedRows(nn.Module):
    """The matrices of several modules below one another in ``rows``; the modules' own buffers are views of it.

    Args:
        parts: modules, each with the name of its buffer (r_i, d_in).
    """

    rows: torch.Tensor

    def __init__(self, parts: Sequence[tuple[nn.Module, str]]) -> None:
        super().__init__()
        self.parts = tuple(parts)  # in a tuple, so that they are not registered here too
        self.register_buffer("rows", None, persistent=False)  # a state_dict has the parts under their own names
        self._tie()

    def bounds(self) -> list[tuple[int, int]]:
        """First row of each part, and the one after its last."""
        stops = [0]
        for module, name in self.parts:
            stops.append(stops[-1] + module.get_buffer(name).shape[0])
        return list(pairwise(stops))

    def _tie(self, rows: torch.Tensor | None = None) -> None:
        bounds = self.bounds()
        with torch.inference_mode(False), torch.no_grad():
            parts = [module.get_buffer(name) for module, name in self.parts]
            self._buffers["rows"] = rows = torch.cat(parts) if rows is None else rows
            for (module, name), (start, stop) in zip(self.parts, bounds, strict=True):
                module._buffers[name] = rows[start:stop]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie(self.rows)  # a move to another device or dtype copies each view by itself
        return self

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        parts = [module.get_buffer(name) for module, name in self.parts]
        if any(storage_address(part) != storage_address(self.rows) for part in parts):
            self._tie()  # assign=True put other tensors in; parts are loaded first, since they are registered first


@dataclass(frozen=True)
class Head:
    """How an adapter begins: ``product = linear(tokens, matrix)``, where tokens show x and matrix shows a tensor."""

    product: fx.Node
    tokens: fx.Node
    split: fx.Node
    matrix: fx.Node
    tensor: fx.Node

    @property
    def x(self) -> fx.Node:
        """The input of the site's product."""
        node = self.split.args[0]
        assert isinstance(node, fx.Node)
        return node

    @property
    def first(self) -> fx.Node:
        """The first node that reads the tokens: the product, or one that asks for their sizes."""
        return min(self.tokens.users)

    @property
    def target(self) -> str:
        """Name of the tensor."""
        return str(self.tensor.target)


class Fuse(Pass):
    """Fuse the down-projections of adapters in delta form.

    Args:
        keys: sites to keep to; all by default.
    """

    def __init__(self, keys: Collection[str] | None = None) -> None:
        self.keys = keys

    def requires(self, graph_module: fx.GraphModule) -> str | None:
        """The sites to keep to stand in the graph."""
        standing = {instance.provenance.key for instance in adapter_instances(graph_module.graph)}
        missing = sorted(set(self.keys or ()) - standing)
        return f"site {missing[0]!r} is not in the graph" if missing else None

    def comparison_points(self, graph_module: fx.GraphModule) -> dict[str, str]:
        """What translation validation compares: the output of each site."""
        return sites_by_product(graph_module.graph, self.keys)

    def call(self, graph_module: fx.GraphModule) -> bool:
        """Fuse what can be fused."""
        fusions = fusible(graph_module, self.keys)
        for targets, groups in fusions:
            parts = [(graph_module.get_submodule(t.rpartition(".")[0]), t.rpartition(".")[2]) for t in targets]
            name = next(n for i in count() if not hasattr(graph_module, n := f"{HOLDER}_{i}"))
            rows = StackedRows(parts)
            graph_module.add_module(name, rows)
            bounds = dict(zip(targets, rows.bounds(), strict=True))
            for heads in groups:
                _fuse(name, heads, bounds)
        return bool(fusions)

    def ensures(self, graph_module: fx.GraphModule) -> str | None:
        """Nothing is left to fuse."""
        left = fusible(graph_module, self.keys)
        return f"{', '.join(left[0][0])} could be fused and are not" if left else None


def fusible(
    graph_module: fx.GraphModule, keys: Collection[str] | None = None
) -> list[tuple[list[str], list[list[Head]]]]:
    """Tensors that can stand in one, each list with the groups of adapters that multiply the same input by them.

    A tensor that is also read elsewhere is left alone, and so is one that meets other tensors at one call of its module
    than at another: it would have to be stored twice.
    """
    groups: dict[Hashable, list[Head]] = defaultdict(list)
    reads: dict[str, int] = defaultdict(int)
    writes = 0  # a value may have changed after one
    for node in graph_module.graph.nodes:
        writes += _may_write(graph_module, node)
        if node.op == "get_attr":
            reads[node.target] += 1
        elif (head := _head(graph_module, node, keys)) is not None:
            tensor, cast = tensor_at(graph_module, head.target), head.matrix.args[1:]
            groups[head.x, tensor.dtype, tensor.device, cast, writes].append(head)
    met: dict[str, list[Hashable]] = defaultdict(list)
    for group, heads in groups.items():
        for head in heads:
            met[head.target].append(group)
    together: dict[Hashable, list[str]] = defaultdict(list)
    for target, where in met.items():
        if len(where) == reads[target]:
            together[tuple(dict.fromkeys(where))].append(target)
    return [
        (targets, [[head for head in groups[group] if head.target in targets] for group in where])
        for where, targets in together.items()
        if len(targets) > 1 and isinstance(where, tuple)
    ]


def shared_factor_names(graph_module: fx.GraphModule) -> set[str]:
    """Names of the frozen tensors that several sites read."""
    shared = (node for node in graph_module.graph.nodes if node.op == "get_attr" and _is_shared(node))
    return {str(node.target) for node in shared}


def parts_of(product: fx.Node) -> Iterator[tuple[int, int | None, fx.Node]]:
    """The rows that each part of a down-projection is made by, and the node of that part, ``h``."""
    if not _is_shared(product):
        yield 0, None, product
        return
    for part in product.users:
        (split,) = part.users
        (h,) = split.users
        _, _, start, stop = part.args
        assert isinstance(start, int)
        assert isinstance(stop, int)
        yield start, stop, h


def forget_rows(graph_module: nn.Module) -> None:
    """Remove concatenated tensors of which no part is left in the module tree."""
    alive = set(graph_module.modules())
    for name, module in list(graph_module._modules.items()):
        if isinstance(module, StackedRows) and not any(part in alive for part, _ in module.parts):
            del graph_module._modules[name]


def _is_shared(node: fx.Node) -> bool:
    provenance = provenance_of(node)
    return provenance is not None and provenance.role == "shared"


def _head(graph_module: fx.GraphModule, product: fx.Node, keys: Collection[str] | None) -> Head | None:
    """Read ``linear(reshape(unflatten(x, 0, [rows, -1]), [rows, -1, d_in]), cast(tensor))``."""
    provenance = provenance_of(product)
    if product.target is not aten.linear.default or len(product.args) != 2 or provenance is None:
        return None
    if (provenance.form, provenance.role) != ("delta", "body") or (keys is not None and provenance.key not in keys):
        return None
    tokens, matrix = product.args
    if not isinstance(tokens, fx.Node) or not isinstance(matrix, fx.Node):
        return None
    split = tokens.args[0] if tokens.target is aten.reshape.default else None
    if not isinstance(split, fx.Node) or split.target is not aten.unflatten.int or split.args[1] != 0:
        return None
    tensor = matrix.args[0] if matrix.target is aten.to.dtype and len(matrix.args) == 2 else matrix
    if not isinstance(tensor, fx.Node):
        return None
    inner = {split: tokens, tokens: product, matrix: product} | ({} if tensor is matrix else {tensor: matrix})
    for node, reader in inner.items():
        own = provenance_of(node)
        readers = [user for user in node.users if node is not tokens or not _asks_rows(user)]
        if own is None or (own.path, own.at) != (provenance.path, provenance.at) or readers != [reader]:
            return None
    if tensor.op != "get_attr":
        return None
    path, _, local = str(tensor.target).rpartition(".")
    value = graph_module.get_submodule(path)._buffers.get(local)
    if value is None or value.dim() != 2 or value.requires_grad:
        return None
    return Head(product, tokens, split, matrix, tensor)


def _asks_rows(node: fx.Node) -> bool:
    """Whether a node asks for one of the sizes that tokens and their product have in common."""
    return node.target is aten.sym_size.int and node.args[1] in (0, 1)


def _may_write(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node might write to a tensor, or change the mode in which later ones run."""
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) for m in graph_module.get_submodule(str(node.target)).modules())
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    in_place = node.target in WRITING or bool(node.kwargs.get("inplace")) or name.endswith("_")
    return in_place or isinstance(node.target, HigherOrderOperator) or node.is_impure()


def _fuse(name: str, heads: Sequence[Head], bounds: dict[str, tuple[int, int]]) -> None:
    """Let adapters go on from their slices of one product, which stands before the first of them."""
    first, x = heads[0], heads[0].x
    graph, at = x.graph, f"{x.name}_{name}"
    keys = dict.fromkeys(_provenance(head.product).key for head in heads)

    def shared(op: str, target: Target, args: tuple[Argument, ...], like: fx.Node, suffix: str) -> fx.Node:
        node = graph.create_node(op, target, args, {}, f"{at}_{suffix}")
        node.meta = _metadata(like)
        set_provenance(node, Provenance(" + ".join(keys), name, at, "shared", "delta", x.name))
        return node

    def own(head: Head, target: Target, args: tuple[Argument, ...], suffix: str) -> fx.Node:
        node = graph.create_node("call_function", target, args, {}, f"{_provenance(head.product).at}_{suffix}")
        node.meta = _metadata(head.product)
        return node

    with graph.inserting_before(min(head.first for head in heads)):
        matrix = shared("get_attr", f"{name}.rows", (), first.tensor, "rows")
        if first.matrix is not first.tensor:
            matrix = shared("call_function", aten.to.dtype, (matrix, *first.matrix.args[1:]), first.matrix, "cast")
        wide = shared("call_function", aten.linear.default, (x, matrix), first.product, "wide")
    for head in heads:
        start, stop = bounds[head.target]
        sizes = head.split.args[2]
        assert isinstance(sizes, (list, tuple))
        with graph.inserting_before(head.first):
            part = own(head, aten.slice.Tensor, (wide, -1, start, stop), "part")
            split = own(head, aten.unflatten.int, (part, 0, sizes), "split")
            h = own(head, aten.reshape.default, (split, [*sizes, stop - start]), "h")
        head.product.replace_all_uses_with(h)
        head.tokens.replace_all_uses_with(h, delete_user_cb=_asks_rows)
        for node in dict.fromkeys((head.product, head.tokens, head.split, head.matrix, head.tensor)):
            graph.erase_node(node)


def _provenance(node: fx.Node) -> Provenance:
    provenance = provenance_of(node)
    assert provenance is not None
    return provenance


def _metadata(node: fx.Node) -> dict[str, object]:
    """Metadata of a node without what tells of its value."""
    return {name: value for name, value in node.meta.items() if name not in STALE}
