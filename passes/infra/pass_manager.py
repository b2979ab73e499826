"""Sequences of passes: a sequence is a pass itself; it can stop early, leave stages out, and be bisected."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import fx

from passes.errors import PassError
from passes.infra.pass_base import Pass, PassResult
from passes.infra.translation_validation import Validation

Stages = Sequence[Pass]


class Sequential(Pass):
    """Passes in order, each one under its own contract.

    Args:
        passes: the stages; one of them may be a sequence too.
        name: of the sequence, where it is a stage of another.
        stop_after: name of the last stage to run.
        disable: names of stages to leave out.

    Raises:
        PassError: a name is no stage.
    """

    def __init__(
        self, *passes: Pass, name: str = "sequential", stop_after: str | None = None, disable: Collection[str] = ()
    ) -> None:
        self.passes, self.name, self.stop_after, self.disable = passes, name, stop_after, disable
        names = [stage.name for stage in passes]
        if unknown := [stage for stage in (stop_after, *disable) if stage not in (None, *names)]:
            raise PassError(f"no stage is named {unknown[0]!r}; stages are {', '.join(names)}")

    def call(self, graph_module: fx.GraphModule) -> bool:
        """Run all stages."""
        return self.run(graph_module, recompile=False).modified

    def run(
        self,
        graph_module: fx.GraphModule,
        *,
        validation: Validation | None = None,
        debug: bool | None = None,
        recompile: bool = True,
    ) -> PassResult:
        """Run the stages, each validated and checked by itself; the module's code is generated once, at the end.

        Raises:
            PassError: a stage failed; the message names it.
        """
        nodes, results = len(graph_module.graph.nodes), list[PassResult]()
        for stage in self.passes:
            if stage.name not in self.disable:
                results.append(stage.run(graph_module, validation=validation, debug=debug, recompile=False))
            if stage.name == self.stop_after:
                break
        modified = any(result.modified for result in results)
        if modified and recompile:
            graph_module.recompile()
        seconds = sum(result.seconds for result in results)
        error = None if validation is None else validation.error
        size = len(graph_module.graph.nodes)
        return PassResult(graph_module, modified, self.name, nodes, size, seconds, error, tuple(results))


def run_pipeline(
    graph_module: fx.GraphModule,
    stages: Stages,
    *,
    stop_after: str | None = None,
    disable: Collection[str] = (),
    validation: Validation | None = None,
    debug: bool | None = None,
) -> list[PassResult]:
    """Run a :class:`Sequential` of stages and return what each did."""
    sequence = Sequential(*stages, stop_after=stop_after, disable=disable)
    return list(sequence.run(graph_module, validation=validation, debug=debug).stages)


@dataclass(frozen=True)
class Culprit:
    """What :func:`bisect` found: the first stage with which the graph is bad, and the site in it that suffices."""

    stage: str
    site: str | None


def bisect(
    build: Callable[[Collection[str] | None], tuple[fx.GraphModule, Stages]],
    good: Callable[[fx.GraphModule], bool],
    sites: Sequence[str] = (),
) -> Culprit | None:
    """Find the stage, and within it the site, that breaks a graph.

    Args:
        build: makes a fresh graph and its stages, restricted to the given sites (None for all).
        good: tells whether a graph is right.
        sites: keys to narrow down to, in the order of execution.

    Returns:
        The culprit, or None if the whole pipeline gives a good graph.

    Raises:
        PassError: the graph is bad before any stage.
    """

    def is_good(stages_run: int, keys: Collection[str] | None) -> bool:
        graph_module, stages = build(keys)
        run_pipeline(graph_module, stages[:stages_run])
        return good(graph_module)

    _, stages = build(None)
    if not is_good(0, None):
        raise PassError("the graph is bad before the first stage")
    first = next((n for n in range(1, len(stages) + 1) if not is_good(n, None)), None)
    if first is None:
        return None
    low, high = 0, len(sites)  # good with the first `low` sites, bad with the first `high`
    if not sites or is_good(first, sites):
        return Culprit(stages[first - 1].name, None)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_good(first, sites[:middle]) else (low, middle)
    return Culprit(stages[first - 1].name, sites[high - 1])
