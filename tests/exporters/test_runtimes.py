"""Operated models and graphs under PyTorch's runtimes: compile, checkpoint, autocast, ``torch.func``, export, DDP."""

from __future__ import annotations

import copy
import datetime
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from surgery import apply_surgery, set_coeff, sites, steer, to_graph, undo_surgery
from tests.support.graph_inputs import inputs_of
from tests.support.operated_graphs import in_place, operated
from tests.support.operated_models import operated as operated_in_place
from tests.support.operated_models import randomise
from tests.support.tolerance import RELATIVE, assert_close, relative_error
from tests.support.zoo import SmallModel, built_once, small_model

MODELS = ("symbolic", "exported", "dynamo", "mlp", "raw", pytest.param("gpt2", marks=pytest.mark.full))
each_model = pytest.mark.parametrize("name", MODELS)
each_host = pytest.mark.parametrize("host", ["module", "graph", "captured"])


@built_once
def made(name: str) -> SmallModel:
    """A graph: one that was operated on, or captured of an operated model."""
    if name in ("symbolic", "exported", "dynamo"):
        return operated(name)
    found = operated_in_place(name)
    return SmallModel(name, to_graph(found.model, found.inputs), found.inputs)


def hosted(host: str) -> SmallModel:
    """The same function three times: in place, as an operated graph, as a captured one."""
    found = operated("symbolic")
    if host != "graph":
        eager = in_place("symbolic")
        for key, site in sites(eager.model).items():
            site.core.load_state_dict(sites(found.model)[key].core.state_dict())
        found = eager
    if host == "captured":
        found.model = to_graph(found.model, found.inputs)
    return found


def compiled(model: nn.Module, backend: Any = "eager", **options: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def cores(model: nn.Module) -> dict[str, nn.Parameter]:
    return {key: site.core.g for key, site in sites(model).items()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {key: g.grad.clone() for key, g in cores(model).items()}
    model.zero_grad()
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected) != set()
    for key, value in expected.items():
        assert value.abs().max() > 0
        assert_close(found[key], value)


@each_model
def test_a_compiled_graph_is_the_eager_one(name):
    found = made(name)
    assert_close(found.run(compiled(found.model)), found.run())


@pytest.mark.parametrize("name", ["symbolic", "raw"])
def test_gradients_of_a_compiled_graph(name):
    found = made(name)
    found.forward().square().mean().backward()
    expected = gradients(found.model)
    found.forward(compiled(found.model, "aot_eager")).square().mean().backward()
    assert_same(gradients(found.model), expected)


@pytest.mark.full
def test_a_graph_compiled_by_inductor():
    found = made("mlp")
    assert_close(found.run(compiled(found.model, "inductor")), found.run())


@each_model
def test_values_never_recompile_a_graph(name):
    found, counter = made(name), CompileCounter()
    model = compiled(found.model, counter)
    found.run(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for coeff in (0.5, -1.0, torch.tensor(2.0), 0):
            set_coeff(found.model, coeff)
            assert_close(found.run(model), found.run())
        with steer(found.model, 0.25):
            randomise(found.model, 0.5)
            assert_close(found.run(model), found.run())
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["symbolic", "gpt2"])
def test_rows_recompile_a_graph_once(name):
    found, counter = made(name), CompileCounter()
    model, batch = compiled(found.model, counter), len(found.run())
    for coeff in (1.0, torch.linspace(0, 1, batch), torch.linspace(-1, 2, batch), torch.zeros(batch), 0.5):
        set_coeff(found.model, coeff)
        assert_close(found.run(model), found.run())
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["symbolic", "mlp", "raw", pytest.param("gpt2", marks=pytest.mark.full)])
def test_a_graph_of_any_size_is_compiled_once(name):
    found, counter = made(name), CompileCounter()
    model = compiled(found.model, counter, dynamic=True)
    for batch, length in ((3, 5), (4, 9), (7, 6), (2, 11)):
        inputs = inputs_of("mlp" if name == "symbolic" else name, batch, length)
        assert_close(found.run(model, inputs), found.run(inputs=inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("base_first", [True, False])
@each_model
def test_base_and_operated_graph_side_by_side(name, base_first):
    found = made(name)
    plain = undo_surgery(copy.deepcopy(found.model))
    outputs = {id(m): found.run(m) for m in (plain, found.model)}
    models = {}
    for model in (plain, found.model) if base_first else (found.model, plain):
        models[id(model)] = compiled(model)
        assert_close(found.run(models[id(model)]), outputs[id(model)])
    for model in (plain, found.model, plain):
        assert_close(found.run(models[id(model)]), outputs[id(model)])
    assert relative_error(*outputs.values()) > 2 * RELATIVE[torch.float32]


def test_a_compiled_graph_module_sees_surgery_and_undo():
    found = SmallModel("late", fx.symbolic_trace(small_model("mlp").model), small_model("mlp").inputs)
    model = compiled(found.model)
    base = found.run(model)
    assert apply_surgery(model, "antipasto", r=8, progress=False) is model
    assert_close(found.run(model), base)
    randomise(found.model)
    assert_close(found.run(model), found.run())
    assert relative_error(found.run(model), base) > 2 * RELATIVE[torch.float32]
    undo_surgery(model)
    assert_close(found.run(model), base)


@each_host
def test_checkpointing_gives_the_same_gradients(host):
    found = hosted(host)
    found.forward().square().mean().backward()
    expected = gradients(found.model)
    checkpoint(found.model, found.inputs, use_reentrant=False).square().mean().backward()
    assert_same(gradients(found.model), expected)


def test_autocast_in_place_and_graph_agree():
    outputs, grads = {}, {}
    full = hosted("module").run()
    for host in ("module", "graph", "captured"):
        found = hosted(host)
        with torch.autocast("cpu", torch.bfloat16):
            out = found.forward()
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
        outputs[host], grads[host] = out.detach(), gradients(found.model)
        assert_close(outputs[host], full)
    for host in ("graph", "captured"):
        assert_close(outputs[host], outputs["module"])
        values = [torch.cat([grads[h][key] for key in grads["module"]]) for h in (host, "module")]
        assert_close(*values, torch.bfloat16)


@each_host
def test_coeff_zero_is_the_base_under_autocast(host):
    found = hosted(host)
    plain = undo_surgery(copy.deepcopy(found.model)).requires_grad_(False)
    set_coeff(found.model, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found.run(), found.run(plain))


@each_host
def test_functional_call_with_other_cores(host):
    found = hosted(host)
    names = {id(p): name for name, p in found.model.named_parameters()}
    others = {names[id(g)]: g.detach() * -0.5 for g in cores(found.model).values()}
    before = found.run()
    with torch.no_grad():
        replaced = functional_call(found.model, others, (found.inputs,))
    assert torch.equal(found.run(), before)
    with torch.no_grad():
        for g in cores(found.model).values():
            g.mul_(-0.5)
    assert_close(replaced, found.run())
    assert relative_error(replaced, before) > 2 * RELATIVE[torch.float32]


@each_host
def test_func_grad_over_the_cores(host):
    found = hosted(host)
    found.forward().square().mean().backward()
    expected = gradients(found.model)
    names = {id(p): name for name, p in found.model.named_parameters()}
    keys = {names[id(g)]: key for key, g in cores(found.model).items()}
    values = {names[id(g)]: g.detach() for g in cores(found.model).values()}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(found.model, values, (found.inputs,)).square().mean()

    assert_same({keys[name]: value for name, value in grad(loss)(values).items()}, expected)
    assert all(g.grad is None for g in cores(found.model).values())


@pytest.mark.parametrize("name", ["symbolic", "mlp", "raw"])
def test_a_graph_is_exported_again(name):
    found = made(name)
    batch = torch.export.Dim("batch", min=2, max=64)
    for coeff in (1.0, 0.3):
        set_coeff(found.model, coeff)
        program = torch.export.export(found.model, (found.inputs,), dynamic_shapes=({0: batch},))
        assert_close(found.run(program.module()), found.run())
        x = torch.randn(9, 12)
        assert_close(found.run(program.module(), x), found.run(inputs=x))


def _parallel(rank: int, place: str, hosts: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = datetime.timedelta(seconds=3600)  # a busy machine takes long to start both
    dist.init_process_group("gloo", init_method=f"file://{place}/init", rank=rank, world_size=2, timeout=limit)
    for host in hosts:
        found = hosted(host)
        model = DistributedDataParallel(found.model)
        model(found.inputs.chunk(2)[rank]).square().mean().backward()
        if rank == 0:
            torch.save(gradients(found.model), f"{place}/{host}.pt")
        del model  # before the group that it reduces in
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive their group, and an orderly end would wait for them


@pytest.mark.long
def test_two_processes_have_the_gradients_of_one(tmp_path: Path):
    hosts = ("module", "graph")
    processes = torch.multiprocessing.spawn(_parallel, (str(tmp_path), hosts), nprocs=2, join=False)
    deadline = time.monotonic() + 3600
    while not processes.join(timeout=5):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("the two processes did not end")
    for host in hosts:
        found = hosted(host)
        found.forward().square().mean().backward()
        assert_same(torch.load(tmp_path / f"{host}.pt", weights_only=True), gradients(found.model))
