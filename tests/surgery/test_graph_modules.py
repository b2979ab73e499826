"""Graph modules and what they hold: leaf modules in private copies, hooks, regions, ties, buffers, pickling, casts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

import surgery
import surgery.hosting.graph_surgery
from passes.ir.provenance import provenance_of
from surgery import (
    apply_surgery,
    load_adapter,
    merge,
    report,
    save_adapter,
    sites,
    steer,
    undo_surgery,
)
from tests.support.injected_failures import FAILURES, fails_at
from tests.support.model_state import state_of
from tests.support.operated_graphs import base, graph, graph_state, operate, operated
from tests.support.operated_models import randomise
from tests.support.tolerance import RELATIVE, assert_close, relative_error
from tests.support.zoo import SmallModel, small_model


class Composite(nn.Module):
    """Leaves of a symbolic trace that read their weights themselves, beside a linear module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(self.layer(h + self.attention(h, h, h, need_weights=False)[0]))


def composite() -> tuple[nn.Module, SmallModel]:
    torch.manual_seed(0)
    model = Composite().eval()
    found = SmallModel("composite", fx.symbolic_trace(model), torch.randn(2, 5, 12))
    return model, found


@pytest.mark.parametrize("known", [True, False])
def test_leaf_modules_are_hosted_in_copies_of_their_own(known, tmp_path):
    model, found = composite()
    before, output, untouched = state_of(model), found.run(model), graph_state(found.model)
    eager = copy.deepcopy(model)
    operate(found, example_inputs=found.inputs if known else None)
    keys = {"first", "attention.in_proj_weight", "attention.out_proj", "layer.self_attn.in_proj_weight"}
    keys |= {"layer.self_attn.out_proj", "layer.linear1", "layer.linear2", "last"}
    assert set(sites(found.model)) == keys
    assert torch.equal(found.run(), output)
    randomise(found.model)
    live = found.run()
    assert torch.equal(found.run(model), output)
    assert [s.replace("(False,", "(True,") for s in state_of(model)] == before
    for key, site in sites(found.model).items():  # every site is alive
        with torch.no_grad():
            kept = site.core.g.clone()
            site.core.g.zero_()
            assert relative_error(found.run(), live) > RELATIVE[torch.float32], key
            site.core.g.copy_(kept)
    save_adapter(found.model, tmp_path)
    load_adapter(eager, tmp_path)
    assert_close(found.run(eager), live)
    copied = copy.deepcopy(found.model)
    assert torch.equal(found.run(copied), live)
    merge(copied)
    assert_close(found.run(copied), live)
    assert torch.equal(found.run(), live)
    undo_surgery(found.model)
    assert graph_state(found.model) == untouched
    assert state_of(model) == before
    load_adapter(found.model, tmp_path)
    assert_close(found.run(), live)
    assert torch.equal(found.run(model), output)
    merge(found.model)
    assert_close(found.run(), live)
    assert state_of(model) == before
    assert sites(found.model) == {}
    assert not hasattr(found.model, "sspace")


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("surgery.hosting.attach.attach", 1),
        ("surgery.hosting.attach.attach", 4),
        ("passes.transforms.insert.insert_delta", 2),
    ],
)
def test_a_failure_among_leaf_modules_leaves_everything(target, call, error, monkeypatch):
    model, found = composite()
    before, untouched = state_of(model), graph_state(found.model)
    with monkeypatch.context() as patch:
        fails_at(patch, target, call, error, after=True)
        with pytest.raises(error, match="injected"):
            operate(found)
    assert graph_state(found.model) == untouched
    assert state_of(model) == before


@pytest.mark.parametrize("error", FAILURES)
def test_a_failed_merge_of_leaf_modules_leaves_everything(error, monkeypatch):
    _, found = composite()
    randomise(operate(found).model)
    before, live = graph_state(found.model), found.run()
    with monkeypatch.context() as patch:
        fails_at(patch, "surgery.hosting.graph_surgery.run_pipeline", 1, error, after=True)
        with pytest.raises(error, match="injected"):
            merge(found.model)
    assert graph_state(found.model) == before
    assert torch.equal(found.run(), live)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("known", [False, True])
def test_modules_with_hooks_are_called_or_skipped_with_a_reason(hook, known):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    calls = []
    getattr(model[0], hook)(lambda *args: calls.append(1))
    found = SmallModel("hooks", fx.symbolic_trace(model), torch.randn(3, 6))
    before = found.run()
    operate(found, example_inputs=found.inputs if known else None)
    skipped = [s.where for s in report(found.model).skipped if "hooks" in s.reason]
    assert sorted([*sites(found.model), *skipped]) == ["0", "2"]
    assert torch.equal(found.run(), before)
    calls.clear()
    live = randomise(found.model) and found.run()
    assert calls == [1]
    merge(found.model)
    assert_close(found.run(), live)
    assert calls == [1, 1]
    calls.clear()
    assert torch.equal(found.run(model), before)
    assert calls == [1]


class Region(nn.Module):
    """A product within a region of its own, which an exported graph shows as a call of a graph within."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.inside(x)
        return self.outside(torch.tanh(h))


@pytest.mark.parametrize("known", [False, True])
def test_regions_are_left_alone_or_alive(known):
    model, x = Region().eval(), torch.randn(4, 6)
    found = SmallModel("region", torch.export.export(model, (x,)).module(), x)
    before, output = graph_state(found.model), found.run()
    operate(found, example_inputs=x if known else None)
    skipped = [s.where for s in report(found.model).skipped if "region" in s.reason]
    assert sorted([*sites(found.model), *skipped]) == ["inside", "outside"]
    assert torch.equal(found.run(), output)
    randomise(found.model)
    live = found.run()
    for site in sites(found.model).values():
        with torch.no_grad():
            kept = site.core.g.clone()
            site.core.g.zero_()
            assert relative_error(found.run(), live) > RELATIVE[torch.float32]
            site.core.g.copy_(kept)
    copied = merge(copy.deepcopy(found.model))
    assert_close(found.run(copied), live)
    undo_surgery(found.model)
    assert graph_state(found.model) == before


def test_tied_weights_of_a_graph():
    plain = small_model("qwen3")
    found = graph("qwen3")
    operate(found, target_modules=["lm_head", "q_proj"])
    assert sites(found.model)["lm_head"].host.name == "graph"
    randomise(found.model)
    embedded = found.model.get_parameter("model.embed_tokens.weight").clone()
    live = found.run()
    assert relative_error(live, plain.run()) > 2 * RELATIVE[torch.float32]
    before = graph_state(found.model)
    with pytest.raises(surgery.WeightError, match="lm_head"):
        merge(found.model)
    assert graph_state(found.model) == before
    nodes = len(base("qwen3").model.graph.nodes)
    merge(found.model, untie=True)
    assert_close(found.run(), live)
    assert torch.equal(found.model.get_parameter("model.embed_tokens.weight"), embedded)
    assert len(found.model.graph.nodes) <= nodes + 1


class Tied(nn.Module):
    """Two modules with one weight, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.free = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.free(torch.tanh(self.two(torch.tanh(self.one(torch.tanh(self.one(x)))))))


TRACES = {"symbolic": lambda m, x: fx.symbolic_trace(m), "exported": lambda m, x: torch.export.export(m, (x,)).module()}


@pytest.mark.parametrize("trace", TRACES)
def test_tied_modules_of_a_graph(trace):
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(4, 6)
    output = model(x).detach()
    found = SmallModel("tied", TRACES[trace](model, x), x)
    assert list(sites(operate(found).model)) == ["free"]
    undo_surgery(found.model)
    operate(found, target_modules=["two"])
    randomise(found.model)
    eager = operate(SmallModel("tied", copy.deepcopy(model).requires_grad_(True), x), target_modules=["two"])
    randomise(eager.model)
    live = found.run()
    assert_close(live, eager.run())
    with pytest.raises(surgery.WeightError, match="'two'"):
        merge(found.model)
    assert torch.equal(found.run(), live)
    merge(found.model, untie=True)
    assert_close(found.run(), live)
    assert torch.equal(model(x).detach(), output)
    assert model.two.weight is model.one.weight


def test_surgery_on_a_graph_with_buffers_and_in_train_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    found = SmallModel("buffers", fx.symbolic_trace(model), torch.randn(4, 6))
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    before = graph_state(found.model)
    operate(found)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert found.model.training
    undo_surgery(found.model)
    assert graph_state(found.model) == before


def test_steer_outlives_undo_and_merge_of_a_graph():
    for verb in (undo_surgery, merge):
        model = operated("symbolic").model
        with steer(model, 0.5):
            verb(model)
        assert sites(model) == {}


def test_the_graph_module_stays_the_callers():
    found = graph("symbolic")
    assert apply_surgery(found.model, "antipasto", r=4, progress=False) is found.model
    assert merge(found.model) is found.model
    assert not any(provenance_of(node) for node in found.model.graph.nodes)


def test_pickling_an_operated_graph_is_refused_and_works_again_without(tmp_path):
    found = SmallModel("pickled", fx.symbolic_trace(small_model("mlp").model), small_model("mlp").inputs)
    output = found.run()
    for verb in (undo_surgery, merge):
        operate(found)
        with pytest.raises(surgery.SurgeryError, match="save_adapter"):
            torch.save(found.model, tmp_path / "whole.pt")
        verb(found.model)
        torch.save(found.model, tmp_path / "whole.pt")
        assert_close(found.run(torch.load(tmp_path / "whole.pt", weights_only=False)), output)


def test_casting_an_operated_graph_works_or_is_refused():
    found = operated("symbolic")
    before, x = found.run(), found.inputs
    assert_close(found.run(copy.deepcopy(found.model).double(), x.double()), before, torch.float32)
    copied = copy.deepcopy(found.model)
    try:
        copied.bfloat16()
    except surgery.SurgeryError:
        assert torch.equal(found.run(copied), before)
    else:
        assert_close(found.run(copied, x.bfloat16()), before)
