"""The contract of a graph pass: ``requires -> call -> ensures``, an honest ``modified``, a linted graph.

A pass is one file with one class that has ``name``, ``requires``, ``call`` and ``ensures``; :func:`run_pass` is the
only way to run one, so no pass can forget a check.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import fx

from passes.errors import PassError


@dataclass(frozen=True)
class PassResult:
    """What a pass did: the graph module it worked on (in place) and whether anything changed."""

    graph_module: fx.GraphModule
    modified: bool


class Pass(Protocol):
    """A transformation of a :class:`torch.fx.GraphModule`, in place."""

    name: str

    def requires(self, graph_module: fx.GraphModule) -> str | None:
        """Say what is wrong with the input, or None."""

    def call(self, graph_module: fx.GraphModule) -> bool:
        """Transform in place and return whether anything changed."""

    def ensures(self, graph_module: fx.GraphModule) -> str | None:
        """Say what is wrong with the result, or None."""


def run_pass(graph_pass: Pass, graph_module: fx.GraphModule) -> PassResult:
    """Run one pass under its contract; the graph is linted and recompiled only if it changed.

    Raises:
        PassError: the precondition or the result is violated, naming the pass.
    """
    problem = graph_pass.requires(graph_module)
    if problem:
        raise PassError(f"pass {graph_pass.name!r} cannot run: {problem}")
    modified = graph_pass.call(graph_module)
    if modified:
        try:
            graph_module.graph.lint()
        except RuntimeError as error:
            raise PassError(f"pass {graph_pass.name!r} left a graph that does not lint: {error}") from error
        graph_module.recompile()
    problem = graph_pass.ensures(graph_module)
    if problem:
        raise PassError(f"pass {graph_pass.name!r} left a wrong graph: {problem}")
    return PassResult(graph_module, modified)
