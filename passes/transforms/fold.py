"""Fold: let frozen tensors meet, so that the graph computes less and reads less.

* The split ``x W_res^T + (S h + delta) U^T`` of the residual form is recognised and becomes ``x W^T + delta U^T`` with
  the stored ``W``, bit for bit. (Adding ``W_res + U S Vh`` in floating point would give other bits in about 60% of
  float32 entries; it is done, in float64 and rounded once, only where the graph module no longer holds W.)
* What depends on frozen tensors alone is computed once (:mod:`passes.transforms.fold_constants`).
* ``S`` meets its neighbour: ``(x Vh^T) * (S * e)  ->  (x (S Vh)^T) * e``, where every reader of ``x Vh^T`` scales by S;
  in a product that several sites share (:mod:`passes.transforms.fuse_projections`), each site's own rows.
* An adapter whose every tensor is frozen, its coefficient included, becomes a dense weight
  (:mod:`passes.transforms.merge_adapters`): the graph then has the base's nodes and no others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable

import torch
from torch import fx

from passes.infra.pass_base import Pass
from passes.ir.adapter_trace import adapter_at, adapter_tensors
from passes.ir.module_utils import attribute, tensor_at
from passes.ir.provenance import adapter_instances, provenance_of, sites_by_product
from passes.transforms.fold_constants import fold_constants, store
from passes.transforms.fuse_projections import parts_of
from passes.transforms.insert import InsertionPoint, insert_delta
from passes.transforms.merge_adapters import Merge, take_out

aten = torch.ops.aten


class Fold(Pass):
    """Fold the frozen tensors of adapters.

    Args:
        frozen: names of the tensors that may be taken for constants. None that requires a gradient is.
        keys: sites to keep to; all by default.
        untie: give a site that folds completely a weight of its own where others read it too.
    """

    def __init__(self, frozen: Collection[str], keys: Collection[str] | None = None, *, untie: bool = False) -> None:
        self.frozen = frozenset(frozen)
        self.keys = keys
        self.untie = untie

    def requires(self, graph_module: fx.GraphModule) -> str | None:
        """Nothing that is listed as frozen requires a gradient; complete adapters can be merged."""
        for name in sorted(self.frozen):
            tensor = attribute(graph_module, name)
            if not isinstance(tensor, torch.Tensor):
                return f"{name!r} is listed as frozen and is no tensor of the graph module"
            if tensor.requires_grad:
                return f"{name!r} is listed as frozen and requires a gradient"
        return self._dense(graph_module).requires(graph_module)

    def comparison_points(self, graph_module: fx.GraphModule) -> dict[str, str]:
        """What translation validation compares: the output of each site."""
        return sites_by_product(graph_module.graph, self.keys)

    def constants(self, graph_module: fx.GraphModule) -> frozenset[str]:
        """The tensors that are taken for constants."""
        return self.frozen

    def call(self, graph_module: fx.GraphModule) -> bool:
        """Fold until nothing changes."""
        dense = self._dense(graph_module)
        modified = bool(dense.weights) and dense.call(graph_module)
        names = {node.name: node for node in graph_module.graph.nodes}
        for instance in adapter_instances(graph_module.graph, self.keys):
            if instance.provenance.form == "residual":
                adapter = adapter_at(graph_module, instance.provenance.path)
                adapter.use_base()
                provenance, x, added = instance.provenance, instance.input, instance.added
                node = take_out(instance, names)
                insert_delta(
                    InsertionPoint(
                        provenance.key, provenance.path, provenance.at, x.name, added.name if added else None
                    ),
                    adapter,
                    node,
                    x,
                )
                modified = True
        return self._constants(graph_module) or modified

    def ensures(self, graph_module: fx.GraphModule) -> str | None:
        """No site is left in residual form."""
        left = [p for p in adapter_instances(graph_module.graph, self.keys) if p.provenance.form == "residual"]
        return f"site {left[0].provenance.key!r} is still in residual form" if left else None

    def _dense(self, graph_module: fx.GraphModule) -> Merge:
        """The merge of the adapters whose every tensor is frozen."""
        weights = {}
        for instance in adapter_instances(graph_module.graph, self.keys):
            adapter = adapter_at(graph_module, instance.provenance.path)
            if all(f"{instance.provenance.path}.{name}" in self.frozen for name in adapter_tensors(adapter)):
                weights[instance.provenance.key] = adapter.merged_weight()
        return Merge(weights, untie=self.untie)

    def _constants(self, graph_module: fx.GraphModule) -> bool:
        frozen: Collection[str] = self.frozen
        if self.keys is not None:
            paths = tuple(
                {f"{instance.provenance.path}." for instance in adapter_instances(graph_module.graph, self.keys)}
            )
            frozen = {name for name in self.frozen if name.startswith(paths)}
        folded = scale_neighbours(graph_module, frozen)
        return bool(fold_constants(graph_module, frozen) + folded)


def scale_neighbours(graph_module: fx.GraphModule, frozen: Collection[str]) -> int:
    """Fold frozen scales of the rows of ``Vh`` into ``Vh``; returns the number of products that changed."""
    changed = 0
    stored: dict[tuple[Hashable, ...], str] = {}
    for node in list(graph_module.graph.nodes):
        provenance = provenance_of(node)
        if provenance is None or provenance.role not in ("body", "shared"):
            continue
        if node.target is not aten.linear.default or len(node.args) != 2:
            continue
        matrix = node.args[1]
        if matrix.op != "get_attr" or matrix.target not in frozen:
            continue
        Vh = tensor_at(graph_module, matrix.target)
        parts: dict[tuple[int, int | None], list[fx.Node]] = defaultdict(list)
        for start, stop, h in parts_of(node):
            parts[start, stop].append(h)
        product, folds = Vh.to(torch.float64, copy=True), []
        for (start, stop), readers in parts.items():
            S = _common_scale(graph_module, readers, frozen, len(Vh[start:stop]))
            if S is None or Vh.requires_grad:
                continue
            scaled = product[start:stop] * tensor_at(graph_module, S).to(torch.float64)[:, None]
            if torch.isfinite(scaled.to(Vh.dtype)).all():
                product[start:stop] = scaled
                folds.append((start, stop, S))
        if not folds:
            continue
        scaled_by = (matrix.target, *folds)
        if scaled_by in stored:
            matrix.target = stored[scaled_by]
        else:
            stored[scaled_by] = store(graph_module, matrix, product.to(Vh.dtype))
        for start, stop, _ in folds:
            for h in parts[start, stop]:
                for user in list(h.users):
                    scale = _scale(user, h, frozen)
                    assert scale is not None
                    _drop_scale(user, h, *scale)
        changed += 1
    return changed


def _common_scale(
    graph_module: fx.GraphModule, parts: Collection[fx.Node], frozen: Collection[str], length: int
) -> str | None:
    """Name of the frozen vector (length,) by which every reader of some nodes scales, or None."""
    scales = [_scale(user, h, frozen) for h in parts for user in h.users]
    names = {str(scale[0].target) if scale else None for scale in scales}
    name = names.pop() if len(names) == 1 else None
    if name is None:
        return None
    S = tensor_at(graph_module, name)
    return name if S.dim() == 1 and len(S) == length and not S.requires_grad else None


def _scale(user: fx.Node, h: fx.Node, frozen: Collection[str]) -> tuple[fx.Node, list[fx.Node]] | None:
    """Read ``h * cast(s * e)`` or ``h * cast(s)``: the node of the frozen ``s``, and those from it to the factor."""
    if user.target is not aten.mul.Tensor or user.args[0] is user.args[1]:
        return None
    factor, path = user.args[1] if user.args[0] is h else user.args[0], []
    while isinstance(factor, fx.Node) and factor.target is aten.to.dtype and len(factor.users) == 1:
        path.append(factor)
        factor = factor.args[0]
    if not isinstance(factor, fx.Node):
        return None
    if factor.op == "get_attr" and factor.target in frozen:
        return factor, path
    if factor.target is not aten.mul.Tensor or len(factor.users) != 1:
        return None
    scale = next((a for a in factor.args if isinstance(a, fx.Node) and a.op == "get_attr" and a.target in frozen), None)
    return (scale, [*path, factor]) if scale is not None else None


def _drop_scale(user: fx.Node, h: fx.Node, scale: fx.Node, path: list[fx.Node]) -> None:
    """Take a scale out of the factor of h, and the whole product out where the scale was all of the factor."""
    graph = user.graph
    if path and path[-1].target is aten.mul.Tensor:
        inner = path[-1]
        rest = next(a for a in inner.args if a is not scale)
        assert isinstance(rest, fx.Node)
        inner.replace_all_uses_with(rest)
        graph.erase_node(inner)
    else:
        user.replace_all_uses_with(h)
        graph.erase_node(user)
        for node in path:
            graph.erase_node(node)
    if not scale.users:
        graph.erase_node(scale)
