"""What a lowering keeps for inference: made once, and never stale."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D

from passes.infra.tolerance import disagreement
from surgery import apply_surgery, refresh, set_coeff, sites
from surgery.lowerings._weight_cache import WeightCache
from tests.support.lowering_models import KEPT, inputs, model_of, operated, reference, shake


@pytest.mark.parametrize("lowering", KEPT)
def test_what_is_kept_is_made_once(lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = WeightCache.get

    def counted(cache: WeightCache, name: str, make: Callable[[Any], Any]) -> Any:
        if name != lowering:
            return plain(cache, name, make)
        return plain(cache, name, lambda site: (made.append(1), make(site))[1])

    monkeypatch.setattr(WeightCache, "get", counted)
    model, x = operated(lowering), inputs()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert len(made) == 2
    set_coeff(model, 0.3)
    set_coeff(model, 1.0)
    with torch.no_grad():
        model(x)
    assert len(made) == 2, "the values are what they were"
    model(x).sum().backward()
    assert len(made) == 2, "training makes none, or uses the same"


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "coeff": lambda m: set_coeff(m, -0.7),
    "in place": lambda m: _in_place(m),
    "data": lambda m: refresh([s.core.g.data.mul_(-1) for s in sites(m).values()] and m),
    "new data": lambda m: refresh([setattr(s.core.g, "data", -s.core.g.data) for s in sites(m).values()] and m),
    "optimiser": lambda m: _train(m),
    "fused optimiser": lambda m: _train(m, fused=True),
    "state dict": lambda m: m.load_state_dict(_other_cores(m)),
    "state dict, assigned": lambda m: m.load_state_dict(_other_cores(m), assign=True),
    "vector": lambda m: _vector(m),
    "to": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "double": lambda m: m.to(torch.float64),
    "train and eval": lambda m: m.train().eval(),
    "base": lambda m: [s.weight.data.mul_(1.0) for s in sites(m).values()],
    "nothing": lambda m: None,
}


def _other_cores(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v * 0.5 if ".core." in k else v.clone() for k, v in model.state_dict().items()}


def _vector(model: nn.Module) -> None:
    cores = [site.core.g for site in sites(model).values()]
    nn.utils.vector_to_parameters(-nn.utils.parameters_to_vector(cores), cores)


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for site in sites(model).values():
            site.core.g.mul_(-1)


def _train(model: nn.Module, *, fused: bool = False) -> None:
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
    model(inputs()).square().sum().backward()
    optimiser.step()


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("lowering", KEPT)
def test_what_is_kept_is_never_stale(lowering: str, change: str, compiled: bool) -> None:
    model, x = operated(lowering), inputs()
    run = torch.compile(model, fullgraph=True) if compiled else model
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            run(x)
    CHANGES[change](model)
    x = x.to(next(model.parameters()).dtype)
    expected = reference(model, x)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad):
        with mode():
            assert (problem := disagreement(run(x), expected)) is None, problem


def test_dense_compiled_follows_all_values_without_recompiling() -> None:
    torch._dynamo.reset()
    model, x = operated("dense"), inputs()
    counter = CompileCounterWithBackend("inductor")
    run = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        run(x)
        for change in ("coeff", "data", "state dict", "new data"):
            CHANGES[change](model)
            assert disagreement(run(x), reference(model, x)) is None, change
        assert counter.frame_count == 1
    other = copy.deepcopy(model)
    for site in sites(other).values():
        site.core.g.data.zero_()
    refresh(other)
    with torch.no_grad():
        assert disagreement(run(x), reference(model, x)) is None
        assert disagreement(torch.compile(other)(x), reference(other, x)) is None


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_dense_compiled_takes_inputs_of_any_layout(kind: type[nn.Module]) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (kind(24, 24) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(x).transpose(0, 1)
            y = self.first(x if kind is nn.Linear else x.contiguous())  # which takes no other
            y = torch.relu(y).mT
            return self.second(y if kind is nn.Linear else y.contiguous())

    torch.manual_seed(0)
    model, x = Turned(), torch.randn(24, 5, 24)
    apply_surgery(model, "antipasto", r=8, lowering="dense", example_inputs=x, progress=False)
    with torch.no_grad():
        expected = shake(model)(x)
        assert (problem := disagreement(torch.compile(model, fullgraph=True)(x), expected)) is None, problem


def test_dense_compiled_stays_out_of_cuda_graphs() -> None:
    model, x, found = operated("dense"), inputs(), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(n.target for n in graph.graph.nodes if getattr(n.target, "__module__", "") == "torch._ops.surgery")
        return graph

    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(x)
    assert len(found) == 2
    for operator in found:
        packet = operator if isinstance(operator, torch._ops.OpOverload) else operator.default
        assert torch.Tag.cudagraph_unsafe in packet.tags


def test_copies_and_models_on_one_base_keep_weights_apart() -> None:
    model, x = operated("dense"), inputs()
    with torch.no_grad():
        first = model(x)
        copied = copy.deepcopy(model)
        for site in sites(copied).values():
            site.core.g.zero_()
        assert torch.equal(model(x), first)
        assert torch.equal(copied(x), model_of()(x))
        base = model_of()
        one, two = (copy.deepcopy(base, {id(p): p for p in base.parameters()}) for _ in range(2))
        for shared, coeff in ((one, 1.0), (two, -1.0)):
            apply_surgery(shared, "antipasto", r=8, lowering="dense", progress=False)
            set_coeff(shake(shared), coeff)
        for _, shared in itertools.product(range(2), (one, two)):
            assert disagreement(shared(x), reference(shared, x)) is None
