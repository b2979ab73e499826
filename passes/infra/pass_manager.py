"""The pipeline: named stages, run in order under the pass contract; it can be stopped, thinned out and bisected."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import fx

from passes.errors import PassError
from passes.infra.pass_base import Pass, PassResult, run_pass
from passes.infra.translation_validation import Validation

Stages = Sequence[Pass]


def run_pipeline(
    graph_module: fx.GraphModule,
    stages: Stages,
    *,
    stop_after: str | None = None,
    disable: Collection[str] = (),
    validation: Validation | None = None,
    debug: bool | None = None,
) -> list[PassResult]:
    """Run stages in order, each one under its contract.

    Args:
        stop_after: name of the last stage to run.
        disable: names of stages to leave out.
        validation: inputs to validate every stage on.
        debug: check the specification of the dialect after every stage.

    Raises:
        PassError: a stage failed (the message names it), or a name is no stage.
    """
    names = [stage.name for stage in stages]
    if wrong := [name for name in (stop_after, *disable) if name not in (None, *names)]:
        raise PassError(f"no stage is named {wrong[0]!r}; stages are {', '.join(names)}")
    results = []
    for stage in stages:
        if stage.name not in disable:
            results.append(run_pass(stage, graph_module, validation=validation, debug=debug, recompile=False))
        if stage.name == stop_after:
            break
    if any(result.modified for result in results):
        graph_module.recompile()
    return results


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
