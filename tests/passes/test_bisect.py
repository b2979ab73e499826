"""Stages of the pipeline: stopping, leaving out, and the search for the pass and the site that are wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import surgery
from passes.errors import PassError
from passes.infra.pass_base import Pass
from passes.infra.pass_manager import Culprit, bisect, run_pipeline
from passes.transforms.fold import Fold
from passes.transforms.merge_adapters import Merge
from surgery import sites
from tests.support.pass_stages import KEYS, STAGES, X, after, between, chain, graph_of, named, nodes_at, operated
from tests.support.tolerance import assert_close


def stages_of(graph: fx.GraphModule, keys: Any = None) -> list[Any]:
    weights = {k: s.merged_weight() for k, s in sites(graph).items() if keys is None or k in keys}
    frozen = {n for n, _ in graph.named_buffers() if ".factors." in n}
    return [Fold(frozen, keys), Merge(weights)]


def test_stop_after_disable_and_unknown_names():
    for options, names in [
        ({}, ["insert", "fold", "merge"]),
        ({"stop_after": "insert"}, ["insert"]),
        ({"stop_after": "fold"}, ["insert", "fold"]),
        ({"disable": ["fold"]}, ["insert", "merge"]),
        ({"disable": ["merge"], "stop_after": "merge"}, ["insert", "fold"]),
    ]:
        compiled = surgery.verbs.graph.pipeline(operated(), X, form="residual", verify=True, **options)
        stages = [stage for stage in compiled.stages if stage.name in STAGES]
        assert [stage.name for stage in stages] == names
        assert all(stage.modified for stage in stages)
        assert bool(sites(compiled.graph)) == ("merge" not in names)
        assert stages[-1].nodes == len(compiled.graph.graph.nodes)
        assert_close(compiled.graph(X), operated()(X).detach())
    for options in ({"stop_after": "fuse"}, {"disable": ["fold", "fuse"]}):
        with pytest.raises(PassError, match="no stage is named 'fuse'; stages are fold, merge"):
            run_pipeline(graph := graph_of(), stages_of(graph), **options)
        with pytest.raises(PassError, match="no stage is named 'fuse'; stages are insert, fold, merge"):
            surgery.verbs.graph.pipeline(operated(), X, form="residual", **options)


@pytest.mark.parametrize("site", KEYS)
@pytest.mark.parametrize("stage", ["fold", "merge"])
def test_bisect_finds_the_stage_and_the_site(stage, site, monkeypatch):
    live = operated()(X).detach()

    def build(keys: Any) -> tuple[fx.GraphModule, Any]:
        graph = graph_of("residual")
        return graph, stages_of(graph, keys)

    def good(graph: fx.GraphModule) -> bool:
        return torch.allclose(graph(X), live, atol=1e-4)

    assert bisect(build, good, KEYS) is None

    def fault(graph: fx.GraphModule) -> None:
        if any(str(node.target).endswith("folded_0") for node in nodes_at(graph, site)):
            between(named(graph, site, "factors.U"), torch.ops.aten.t.default)

    if stage == "fold":
        after(monkeypatch, Fold, fault)
    else:
        init = Merge.__init__
        wrong = lambda weights: {k: w.T.contiguous() if k == site else w for k, w in weights.items()}  # noqa: E731
        monkeypatch.setattr(Merge, "__init__", lambda self, weights, **options: init(self, wrong(weights), **options))
    assert bisect(build, good, KEYS) == Culprit(stage, site)
    assert bisect(build, good) == Culprit(stage, None)
    with pytest.raises(PassError, match="bad before the first stage"):
        bisect(build, lambda graph: False, KEYS)


def test_bisect_of_insert_finds_a_wrong_adapter():
    """The whole compiler, restricted to sites: one whose factors are wrong."""
    model = operated()
    sites(model)["2"].factors.U.mul_(-1)

    def build(keys: Any) -> tuple[fx.GraphModule, Any]:
        graph = fx.symbolic_trace(chain())
        return graph, [Toggle(graph, model, KEYS if keys is None else keys)]

    def good(graph: fx.GraphModule) -> bool:
        return torch.allclose(graph(X), chain()(X), atol=1.0) and not graph.__dict__.get("wrong", False)

    assert bisect(build, good, KEYS) == Culprit("toggle", "2")


class Toggle(Pass):
    """A stage of a test's own, which notes whether it saw a site."""

    def __init__(self, graph: fx.GraphModule, model: nn.Module, keys: Any) -> None:
        self.keys = list(keys)

    def call(self, graph_module: fx.GraphModule) -> bool:
        graph_module.__dict__["wrong"] = "2" in self.keys
        return False
