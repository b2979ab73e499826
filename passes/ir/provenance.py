"""Provenance: which inserted node belongs to which site, grouped by instance of an adapter.

It lies in ``node.meta["custom"]``, the one entry that torch carries through ``torch.export``, AOTAutograd and a
retrace, and holds strings alone, since ``torch.export.save`` writes that entry as JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx

KEY = "surgery"


class Provenance(NamedTuple):
    """What a node has to do with a site.

    Attributes:
        key: of the site.
        path: of the adapter's submodule.
        at: name that the product's node had before surgery; one site may stand at several.
        role: "base" (the product), "body" (the adapter), "biased" (base plus what is added to it, where the base cannot
            hold it), "out" (what the rest of the graph reads), "shared" (what several instances read; it belongs to
            none of them, its key names all their sites, and its path the module that holds its tensor).
        form: "delta", "residual" or "weight".
        input: name of the product's input when the adapter was inserted.
        added: name of the node that the product added, or None.
    """

    key: str
    path: str
    at: str
    role: str
    form: str
    input: str
    added: str | None = None


def provenance_entry(node: fx.Node) -> object:
    """What stands in a node's metadata, whatever it is; None where there is nothing."""
    return (node.meta.get("custom") or {}).get(KEY)


def provenance_of(node: fx.Node) -> Provenance | None:
    """The provenance of a node, also of one that was read from a file, as a list; None where it has none."""
    entry = provenance_entry(node)
    if isinstance(entry, list) and len(entry) == len(Provenance._fields):
        return Provenance(*entry)
    return entry if isinstance(entry, Provenance) else None


def set_provenance(node: fx.Node, provenance: Provenance) -> None:
    """Write a node's provenance; the entry is replaced and never written to, since copies of a graph share it."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), KEY: provenance}


def clear_provenance(node: fx.Node) -> None:
    """Remove a node's provenance."""
    rest = {name: value for name, value in (node.meta.pop("custom", None) or {}).items() if name != KEY}
    if rest:
        node.meta["custom"] = rest


@dataclass
class AdapterInstance:
    """The nodes of one adapter at one product (or at one read of a weight), in order."""

    provenance: Provenance
    nodes: list[fx.Node] = field(default_factory=list)

    def of_role(self, role: str) -> fx.Node | None:
        """The node of a role that at most one node has."""
        return next((node for node in self.nodes if (p := provenance_of(node)) and p.role == role), None)

    @property
    def base(self) -> fx.Node:
        """The node of the product."""
        base = self.of_role("base")
        assert base is not None
        return base

    @property
    def out(self) -> fx.Node:
        """The node that the rest of the graph reads."""
        out = self.of_role("out")
        assert out is not None
        return out

    @property
    def input(self) -> fx.Node:
        """The node that is multiplied, as it is now."""
        node = self.base.args[0]
        assert isinstance(node, fx.Node)
        return self._uncast(node)

    @property
    def added(self) -> fx.Node | None:
        """The node that the product adds, as it is now; None where it adds nothing."""
        biased = self.of_role("biased")
        inside = (*self.base.args, None, None)[2]
        node = biased.args[1] if biased else inside
        return self._uncast(node) if isinstance(node, fx.Node) else None

    def _uncast(self, node: fx.Node) -> fx.Node:
        while node in self.nodes and node.target is torch.ops.aten.to.dtype:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node = source
        return node


def adapter_instances(graph: fx.Graph, keys: Iterable[str] | None = None) -> list[AdapterInstance]:
    """All instances of adapters in a graph, in the order of execution.

    Args:
        keys: sites to keep to.
    """
    chosen = None if keys is None else set(keys)
    instances: dict[tuple[str, str], AdapterInstance] = {}
    for node in graph.nodes:
        provenance = provenance_of(node)
        if provenance is None or provenance.role == "shared" or (chosen is not None and provenance.key not in chosen):
            continue
        instance = instances.setdefault((provenance.path, provenance.at), AdapterInstance(provenance))
        instance.nodes.append(node)
        if provenance.role == "out":
            instance.provenance = provenance
    return list(instances.values())


def sites_by_product(graph: fx.Graph, keys: Iterable[str] | None = None) -> dict[str, str]:
    """The key of the site of each product with an adapter, by the name that the product's node had before surgery."""
    return {p.at: p.key for p in (instance.provenance for instance in adapter_instances(graph, keys))}
