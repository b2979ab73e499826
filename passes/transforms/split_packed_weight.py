"""Split the reads of a packed weight into parts that can each carry an adapter: ``W -> cat(W[:a], W[a:b], W[b:])``."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import fx

from passes.ir.parameter_names import tensor_name

aten = torch.ops.aten
META = "part_of"


def split_reads(graph: fx.Graph, weight: str, sizes: int, parts: Iterable[tuple[int, int]]) -> None:
    """Let whatever reads a weight read its parts, put together again; the values are the same.

    Args:
        weight: name of the parameter.
        sizes: number of its rows.
        parts: first row, and the one after the last, of each part that is wanted; they do not overlap.
    """
    cuts = sorted({0, sizes, *(row for part in parts for row in part)})
    for node in [node for node in graph.nodes if tensor_name(node) == weight]:
        readers = list(node.users)
        with graph.inserting_after(node):
            whole = graph.call_function(aten.cat.default, ([], 0))
        with graph.inserting_before(whole):
            slices = [graph.call_function(aten.slice.Tensor, (node, 0, *ends)) for ends in pairwise(cuts)]
        whole.args = (slices, 0)
        for reader in readers:
            reader.replace_input_with(node, whole)
        for made in (*slices, whole):
            made.meta = {name: value for name, value in node.meta.items() if name != "tensor_meta"} | {META: weight}
        value = node.meta.get("val")
        for made in slices if value is not None else ():
            made.meta["val"] = value[slice(*made.args[2:])]


def reads_of_part(graph: fx.Graph, weight: str, rows: tuple[int, int]) -> list[fx.Node]:
    """The nodes that read a part of a weight whose reads were split."""
    return [n for n in graph.nodes if n.meta.get(META) == weight and n.args[1:] == (0, *rows)]


def is_part(node: fx.Node) -> bool:
    """Whether a node is of a split: a part, or the parts put together."""
    return META in node.meta
