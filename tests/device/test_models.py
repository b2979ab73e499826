"""Models on an accelerator do what they do on the CPU, all of their tensors stay there, and forwards do not wait."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from surgery import (
    apply_surgery,
    load_adapter,
    merge,
    recalibrate,
    refresh,
    save_adapter,
    set_coeff,
    sites,
    steer,
    to_graph,
    undo_surgery,
)  # fmt: skip
from surgery.variants import REGISTRY
from tests.support.device_models import all_on, on, operated, there
from tests.support.lowering_models import KEPT, possible
from tests.support.tolerance import assert_close
from tests.support.zoo import ALL_NAMES, small_model

LINEAR = [name for name, variant in REGISTRY.items() if variant.linear]
LOWERINGS = ("auto", "lowrank", "output", "dense", "pair")
BOTH = [(variant, lowering) for variant in sorted(REGISTRY) for lowering in LOWERINGS
        if lowering == "auto" or possible(lowering, variant)]  # fmt: skip


def gains(*models: nn.Module) -> None:
    """Give every core the same numbers, wherever it is."""
    with torch.no_grad():
        for site in (site for model in models for site in sites(model).values()):
            for p in site.core.parameters():
                p.copy_(torch.linspace(-0.5, 0.5, p.numel()).reshape(p.shape))


class Waits(TorchDispatchMode):
    """Operators that wait for what they read: values that Python or the CPU gets to see."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.device.type != "cpu"]
        result = func(*args, **(kwargs or {}))
        waits = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        leaves = any(isinstance(t, Tensor) and t.device.type == "cpu" for t in tree_flatten(result)[0])
        if given and (waits or leaves):
            self.found.append(str(func))
        return result


@contextmanager
def no_waiting() -> Iterator[None]:
    with Waits() as waits:
        yield
    assert not waits.found, waits.found


@pytest.mark.parametrize("name", ALL_NAMES)
def test_every_host(name: str, device: torch.device) -> None:
    here, found = operated(small_model(name)), operated(there(device, name))
    all_on(found.model, device)
    assert sites(found.model).keys() == sites(here.model).keys()
    assert_close(found.run().cpu(), here.run())
    for each in (here, found):
        y = each.forward()
        (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y)).sum().backward()
    for key, site in sites(found.model).items():
        for p, q in zip(site.core.parameters(), sites(here.model)[key].core.parameters(), strict=True):
            assert p.grad is not None
            assert p.grad.device.type == device.type
            assert_close(p.grad.cpu(), q.grad)


@pytest.mark.parametrize(("variant", "lowering"), BOTH)
def test_every_variant_and_lowering(variant: str, lowering: str, device: torch.device) -> None:
    here = operated(small_model("mlp"), variant, lowering=lowering)
    found = operated(there(device), variant, lowering=lowering)
    all_on(found.model, device)
    for coeff in (1.0, -0.5, torch.tensor([0.0, 1.0, -0.5, 0.8, 0.3])):
        if lowering in KEPT and isinstance(coeff, Tensor):
            continue
        for each in (here, found):
            set_coeff(each.model, coeff)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                expected, y = here.forward(), found.forward()
            assert_close(y.detach().cpu(), expected.detach())


@pytest.mark.parametrize(("variant", "lowering"), BOTH)
def test_forwards_do_not_wait(variant: str, lowering: str, device: torch.device) -> None:
    found = operated(there(device), variant, lowering=lowering)
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad), no_waiting():
            for _ in range(2):
                y = found.forward()
            if grad and y.requires_grad:
                y.sum().backward()
    with torch.no_grad(), no_waiting():
        set_coeff(found.model, 0.5)
        found.forward()


def _other_cores(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict with other cores on the same base."""
    return {name: t * 0.5 if ".core." in name else t for name, t in model.state_dict().items()}


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "coeff": lambda m: set_coeff(m, -0.7),
    "in place": lambda m: [s.core.g.detach().mul_(-1) for s in sites(m).values()],
    "new data, and refresh": lambda m: (
        [setattr(s.core.g, "data", -s.core.g.data) for s in sites(m).values()],
        refresh(m),
    ),
    "data, and refresh": lambda m: ([s.core.g.data.mul_(-1) for s in sites(m).values()], refresh(m)),
    "data, and eval": lambda m: ([s.core.g.data.mul_(-1) for s in sites(m).values()], m.train(), m.eval()),
    "state dict": lambda m: m.load_state_dict(_other_cores(m)),
    "assigned": lambda m: m.load_state_dict(_other_cores(m), assign=True),
    "to": lambda m: m.to(torch.float64),
    "moved": lambda m: m.to("cpu"),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("lowering", sorted(KEPT))
def test_what_is_kept_follows(lowering: str, change: str, device: torch.device) -> None:
    found = operated(there(device), lowering=lowering)
    for _ in range(2):
        found.run()
    CHANGES[change](found.model)
    plain = copy.deepcopy(found.model)
    for site in sites(plain).values():
        site.forget()
    first = next(found.model.parameters())
    inputs = found.inputs.to(first.device, first.dtype)
    assert_close(found.run(inputs=inputs).cpu(), found.run(plain, inputs).cpu())


def test_an_optimiser_step_is_followed(device: torch.device) -> None:
    found = operated(there(device), lowering="dense")
    before = found.run()
    optimiser = torch.optim.AdamW([p for p in found.model.parameters() if p.requires_grad], lr=0.1)
    found.forward().square().sum().backward()
    optimiser.step()
    after = found.run()
    assert not torch.equal(before.cpu(), after.cpu())
    assert_close(after.cpu(), found.run(copy.deepcopy(found.model)).cpu())


@pytest.mark.parametrize("coeff", [0.0, 0.5, "here", "there"])
def test_coefficients_from_anywhere(coeff: Any, device: torch.device) -> None:
    here, found = operated(small_model("qwen3")), operated(there(device, "qwen3"))
    if isinstance(coeff, str):
        coeff = torch.tensor([1.0, -0.5]) if coeff == "here" else torch.tensor([1.0, -0.5], device=device)
    with steer(found.model, coeff), steer(here.model, coeff if isinstance(coeff, float) else coeff.cpu()):
        assert_close(found.run().cpu(), here.run())
    assert all(site.steering.coeff.device.type == device.type for site in sites(found.model).values())


@pytest.mark.parametrize("name", ["mlp", "attention", "gpt2", "qwen3"])
def test_merge_and_undo(name: str, device: torch.device) -> None:
    found = there(device, name)
    before = {key: value.clone() for key, value in found.model.state_dict().items()}
    operated(found)
    live = found.run()
    merged = copy.deepcopy(found)
    merge(merged.model)
    all_on(merged.model, device)
    assert_close(merged.run().cpu(), live.cpu())
    undo_surgery(found.model)
    after = found.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value.cpu(), after[key].cpu()) for key, value in before.items())
    all_on(found.model, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["delta", "residual"])
def test_dtypes_and_forms(form: str, dtype: torch.dtype, device: torch.device) -> None:
    name = "mlp" if dtype == torch.float64 else "qwen3"  # whose norms are float32 throughout
    here, found = (operated(p, form=form) for p in (small_model(name, dtype), there(device, name, dtype)))
    all_on(found.model, device)
    assert_close(found.run().cpu(), here.run())
    undo_surgery(found.model)
    all_on(found.model, device)


@pytest.mark.parametrize("variant", sorted(REGISTRY))
@pytest.mark.parametrize("way", ["there", "back", "stay"])
def test_adapters_go_both_ways(way: str, variant: str, device: torch.device, tmp_path: Path) -> None:
    source = operated(small_model("mlp") if way == "there" else there(device), variant)
    save_adapter(source.model, tmp_path / "adapter")
    target = small_model("mlp") if way == "back" else there(device)
    load_adapter(target.model, tmp_path / "adapter")
    all_on(target.model, torch.device("cpu") if way == "back" else device)
    assert_close(target.run().cpu(), source.run().cpu())


def test_moved_after_surgery(device: torch.device) -> None:
    found = operated(small_model("qwen3"))
    expected, found.inputs = found.run(), on(device, found.inputs)
    found.model.to(device)
    all_on(found.model, device)
    assert_close(found.run().cpu(), expected)
    undo_surgery(found.model)
    all_on(found.model, device)


@pytest.mark.parametrize("variant", ["antipasto", "antipasto_corda", "antipasto_rot"])
def test_calibrated_on_data_of_the_cpu_and_again(variant: str, device: torch.device) -> None:
    here, found = small_model("qwen3"), there(device, "qwen3")
    data = [small_model("qwen3").inputs]
    for each in (here, found):
        operated(each, variant, calibration=data)
    assert_close(found.run().cpu(), here.run())
    for each in (here, found):
        recalibrate(each.model, data, reset=True, progress=False)
    gains(found.model, here.model)
    all_on(found.model, device)
    assert_close(found.run().cpu(), here.run())


@pytest.mark.parametrize("variant", sorted(REGISTRY))
@pytest.mark.parametrize("form", ["delta", "residual"])
def test_graphs(form: str, variant: str, device: torch.device) -> None:
    found = operated(there(device), variant)
    graph = to_graph(found.model, found.inputs, form=form)
    all_on(graph, device)
    assert_close(found.run(graph).cpu(), found.run().cpu())
    for each in (graph, found.model):
        set_coeff(each, 0.4)
    assert_close(found.run(graph).cpu(), found.run().cpu())
    if variant in LINEAR:
        merge(graph)
        all_on(graph, device)
        assert_close(found.run(graph).cpu(), found.run().cpu())


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "attention"])
def test_graph_modules(name: str, device: torch.device) -> None:
    found = there(device, name)
    args, kwargs = ((), found.inputs) if isinstance(found.inputs, dict) else (found.inputs, {})
    program = torch.export.export(found.model, args, kwargs, strict=False)
    graph = apply_surgery(program, "antipasto", r=4, example_inputs=found.inputs, progress=False)
    all_on(graph, device)
    before = found.run(graph)
    gains(graph)
    assert not torch.equal(before.cpu(), found.run(graph).cpu())
    live = found.run(graph)
    merge(graph)
    assert_close(found.run(graph).cpu(), live.cpu())
