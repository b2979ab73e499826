"""The compiler's textbook path in the demo: residual form, fold, merge, each pass validated."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from bench.demo.results import Results, bits
from bench.models.logits import logits
from surgery import fold, merge, steer, to_graph
from surgery.verbs.capture_base import capture_base


def through_the_compiler(model: nn.Module, probe: Tensor, base: Tensor, results: Results) -> None:
    """Take the model through the compiler's textbook path, residual form, fold, merge, each pass validated."""
    steered, inputs = logits(model, probe), {"input_ids": probe}
    effect = float((steered - base).abs().max())
    started = time.perf_counter()
    plain = len(capture_base(model, inputs)[0].graph.nodes)
    graph = to_graph(model, inputs, form="residual", verify=True)
    _stage("to_graph, residual form", graph, probe, steered, effect, results)
    fold(graph, verify=inputs)
    with steer(graph, 0.0):
        same = torch.equal(_graph_logits(graph, probe), base)
    _stage("fold", graph, probe, steered, effect, results, f", at coeff = 0 the base: {bits(same)}", same)
    merge(graph, verify=inputs)
    nodes = len(graph.graph.nodes)
    _stage("merge", graph, probe, steered, effect, results, f", the base's graph has {plain}", nodes == plain)
    results.seconds["graph, fold, merge"] = time.perf_counter() - started


def _graph_logits(graph: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return graph(input_ids=tokens).logits


def _stage(
    name: str,
    graph: Any,
    probe: Tensor,
    steered: Tensor,
    effect: float,
    results: Results,
    more: str = "",
    ok: bool = True,
) -> None:
    """Add the line of one stage of the compiler: nodes, and error against the model with its adapters."""
    nodes, error = len(graph.graph.nodes), float((_graph_logits(graph, probe) - steered).abs().max())
    results.notes.setdefault("graph nodes", {})[name] = nodes
    results.add(f"graph: {name}", f"{nodes:,} nodes{more}; error {error:.1e}", ok and error < 1e-3 * effect)
