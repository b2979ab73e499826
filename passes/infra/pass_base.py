"""The contract of a graph pass: ``requires -> call -> ensures``, an honest ``modified``, a linted graph.

A pass is one file with one subclass of :class:`Pass`, which needs no more than ``call``. :meth:`Pass.run` is the only
way to run one, so that no pass can forget a check.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from passes.errors import PassError
from passes.infra.dialect import check_graph
from passes.infra.translation_validation import Reference, Validation, Values


@dataclass(frozen=True)
class PassResult:
    """What a pass did: the graph module it worked on (in place) and whether anything changed.

    Attributes:
        nodes_before, nodes: of the graph.
        seconds: of the pass itself, without checks and validation.
        error: largest relative error that validation found; None where nothing was validated.
        stages: results of the passes that a sequence ran.
    """

    graph_module: fx.GraphModule
    modified: bool
    name: str = ""
    nodes_before: int = 0
    nodes: int = 0
    seconds: float = 0.0
    error: float | None = None
    stages: tuple[PassResult, ...] = ()


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector: a pass allocates many long-lived nodes, and the full collections that they
    trigger cost several times the pass itself."""
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


class Pass(ABC):
    """A transformation of a :class:`torch.fx.GraphModule`, in place.

    Attributes:
        name: of the stage; that of the class, in lower case, unless it says another.
    """

    name: str

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()

    def requires(self, graph_module: fx.GraphModule) -> str | None:
        """Say what is wrong with the input, or None; any graph will do by default."""
        return None

    @abstractmethod
    def call(self, graph_module: fx.GraphModule) -> bool:
        """Transform in place and return whether anything changed."""

    def ensures(self, graph_module: fx.GraphModule) -> str | None:
        """Say what is wrong with the result, or None."""
        return None

    def comparison_points(self, graph_module: fx.GraphModule) -> Mapping[str, str] | None:
        """What translation validation compares beside the outputs: keys of sites by the name of the product's node.

        None, the default, is for a pass that changes no value: then nothing is compared.
        """
        return None

    def references(self, graph_module: fx.GraphModule) -> Mapping[str, tuple[str, Reference]]:
        """What a node should give after the pass: the name of its input, and the function of the input and the value
        before; by the node's name, and only where it is not what it gave before."""
        return {}

    def constants(self, graph_module: fx.GraphModule) -> Collection[str]:
        """Names of tensors whose values the pass takes over, so that validation must not change them."""
        return ()

    def run(
        self,
        graph_module: fx.GraphModule,
        *,
        validation: Validation | None = None,
        debug: bool | None = None,
        recompile: bool = True,
    ) -> PassResult:
        """Run the pass under its contract; the graph is linted and recompiled only if it changed.

        Args:
            validation: inputs to compare the graph on before and after.
            debug: check the specification of the dialect too; by default where ``SURGERY_DEBUG`` is set.
            recompile: generate the module's code; without, the caller does so before the module is called.

        Raises:
            PassError: the precondition or the result is violated, or the pass changed what the model computes; names
                the pass and, where there is one, the site and the node.
        """
        if problem := self.requires(graph_module):
            raise PassError(f"pass {self.name!r} cannot run: {problem}")
        points = None if validation is None else self.comparison_points(graph_module)
        before: list[Values] = []
        frozen: Collection[str] = ()
        if validation is not None and points is not None:
            frozen, references = self.constants(graph_module), self.references(graph_module)
            before = validation.observe(graph_module, points, references=references, frozen=frozen)
        nodes, started = len(graph_module.graph.nodes), time.perf_counter()
        with _collector_paused():
            modified = self.call(graph_module)
        if modified:
            try:
                graph_module.graph.lint()
            except RuntimeError as failure:
                raise PassError(f"pass {self.name!r} left a graph that does not lint: {failure}") from failure
            if recompile:
                graph_module.recompile()
        seconds = time.perf_counter() - started
        if problem := self.ensures(graph_module):
            raise PassError(f"pass {self.name!r} left a wrong graph: {problem}")
        if (debugging() if debug is None else debug) and (problems := check_graph(graph_module)):
            raise PassError(f"pass {self.name!r} left a graph outside of the dialect: {'; '.join(problems[:5])}")
        if validation is not None and points is not None:
            try:
                after = validation.observe(graph_module, points, forced=before, frozen=frozen)
            except Exception as failure:
                raise PassError(f"after pass {self.name!r} the graph does not run: {failure}") from failure
            validation.compare(self.name, before, after, points)
        error = None if validation is None else validation.error
        return PassResult(graph_module, modified, self.name, nodes, len(graph_module.graph.nodes), seconds, error)
