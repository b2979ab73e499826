"""The contract of a graph pass: ``requires -> call -> ensures``, an honest ``modified``, a linted graph.

A pass is one file with one class that has ``name``, ``requires``, ``call`` and ``ensures``; :func:`run_pass` is the
only way to run one, so no pass can forget a check. A pass that changes sites also tells ``places`` (what to compare)
and may give ``references`` (what a site should give) and ``constants`` (names of tensors whose values it takes over),
for translation validation.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx

from passes.errors import PassError
from passes.infra.dialect import check_graph
from passes.infra.translation_validation import Validation


@dataclass(frozen=True)
class PassResult:
    """What a pass did: the graph module it worked on (in place) and whether anything changed.

    Attributes:
        nodes_before, nodes: of the graph.
        seconds: of the pass itself, without checks and validation.
        error: largest relative error that validation found; None where nothing was validated.
    """

    graph_module: fx.GraphModule
    modified: bool
    name: str = ""
    nodes_before: int = 0
    nodes: int = 0
    seconds: float = 0.0
    error: float | None = None


class Pass(Protocol):
    """A transformation of a :class:`torch.fx.GraphModule`, in place."""

    name: str

    def requires(self, graph_module: fx.GraphModule) -> str | None:
        """Say what is wrong with the input, or None."""

    def call(self, graph_module: fx.GraphModule) -> bool:
        """Transform in place and return whether anything changed."""

    def ensures(self, graph_module: fx.GraphModule) -> str | None:
        """Say what is wrong with the result, or None."""


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector: the many nodes that a pass makes live on, and looking through all of them and
    of PyTorch, as their number makes Python do, takes several times as long as the pass."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def debugging() -> bool:
    """Whether ``SURGERY_DEBUG`` asks for the specification to be checked after every pass."""
    return os.environ.get("SURGERY_DEBUG", "") not in ("", "0")


def run_pass(
    graph_pass: Pass,
    graph_module: fx.GraphModule,
    *,
    validation: Validation | None = None,
    debug: bool | None = None,
    recompile: bool = True,
) -> PassResult:
    """Run one pass under its contract; the graph is linted and recompiled only if it changed.

    Args:
        recompile: generate the module's code anew; without, the caller does so before the module is called.
        validation: inputs to compare the graph on before and after.
        debug: check the specification of the dialect too; by default where ``SURGERY_DEBUG`` is set.

    Raises:
        PassError: the precondition or the result is violated, or the pass changed what the model computes; names the
            pass and, where there is one, the site and the node.
    """
    name = graph_pass.name
    problem = graph_pass.requires(graph_module)
    if problem:
        raise PassError(f"pass {name!r} cannot run: {problem}")
    hints: Any = graph_pass
    before, places, frozen = [], {}, ()
    if validation is not None and hasattr(graph_pass, "places"):
        places = hints.places(graph_module)
        frozen = hints.constants(graph_module) if hasattr(graph_pass, "constants") else ()
        references = hints.references(graph_module) if hasattr(graph_pass, "references") else None
        before = validation.observe(graph_module, places, references=references, frozen=frozen)
    nodes = len(graph_module.graph.nodes)
    started = time.perf_counter()
    with _collector_paused():
        modified = graph_pass.call(graph_module)
    if modified:
        try:
            graph_module.graph.lint()
        except RuntimeError as failure:
            raise PassError(f"pass {name!r} left a graph that does not lint: {failure}") from failure
        if recompile:
            graph_module.recompile()
    seconds = time.perf_counter() - started
    problem = graph_pass.ensures(graph_module)
    if problem:
        raise PassError(f"pass {name!r} left a wrong graph: {problem}")
    if (debugging() if debug is None else debug) and (problems := check_graph(graph_module)):
        raise PassError(f"pass {name!r} left a graph outside of the dialect: {'; '.join(problems[:5])}")
    error = None
    if validation is not None:
        if before:
            try:
                after = validation.observe(graph_module, places, forced=before, frozen=frozen)
            except Exception as failure:
                raise PassError(f"after pass {name!r} the graph does not run: {failure}") from failure
            validation.compare(name, before, after, places)
        error = validation.error
    return PassResult(graph_module, modified, name, nodes, len(graph_module.graph.nodes), seconds, error)
