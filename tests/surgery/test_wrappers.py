"""Wrappers that other libraries put around sites after surgery, and before it: outputs, undo, keys of files."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import surgery
from surgery import apply_surgery, load_adapter, merge, save_adapter, set_coeff, sites, steer, undo_surgery
from tests.support.adapter_files import configuration
from tests.support.user_models import Net, X, operated, run, two_paths

CPU = torch.device("cpu")

OFFLOADS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu_offload": lambda m, path: cpu_offload(m, execution_device=CPU),
    "cpu_offload of buffers too": lambda m, path: cpu_offload(m, execution_device=CPU, offload_buffers=True),
    "disk_offload": lambda m, path: disk_offload(m, str(path), execution_device=CPU),
    "dispatch_model": lambda m, path: dispatch_model(
        m,
        {"a": "cpu", "b": "disk", "parametrizations": "cpu"},
        main_device="cpu",
        offload_dir=str(path),
        force_hooks=True,
    ),
}


def made() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_model_that_accelerate_offloads_after_surgery(offload: str, tmp_path: Path) -> None:
    model, base = operated(made()), run(made())
    live = run(model)
    OFFLOADS[offload](model, tmp_path)
    for _ in range(2):
        assert torch.equal(run(model), live)
    with steer(model, 0.0):
        assert torch.equal(run(model), base)
    with steer(model, 0.5):
        half = run(model)
    for verb in (merge, lambda m: save_adapter(m, tmp_path / "adapter")):
        with pytest.raises(
            surgery.WeightError, match=r"site '\w': its tensors are offloaded, .*remove_hook_from_module"
        ):
            verb(model)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(run(model), live)
    set_coeff(model, 0.5)
    assert torch.equal(run(model), half)
    undo_surgery(model)
    assert torch.equal(run(model), base)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_undo_leaves_what_offloads(offload: str, tmp_path: Path) -> None:
    model, base = operated(made()), run(made())
    OFFLOADS[offload](model, tmp_path)
    run(model)
    undo_surgery(model)
    assert torch.equal(run(model), base)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(run(model), base)
    assert not sites(model)


@pytest.mark.parametrize("verb", [undo_surgery, merge])
def test_hooks_that_come_and_go(verb: Any) -> None:
    model, base = operated(made()), run(made())
    live = run(model)
    add_hook_to_module(model.a, AlignDevicesHook(execution_device="cpu"))
    add_hook_to_module(model.b, AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(run(model), live)
    remove_hook_from_module(model.a)
    assert torch.equal(run(model), live)
    verb(model)
    assert torch.allclose(run(model), base if verb is undo_surgery else live, atol=1e-6)
    remove_hook_from_module(model.b)
    assert torch.allclose(run(model), base if verb is undo_surgery else live, atol=1e-6)


@pytest.fixture
def gloo() -> Iterator[None]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_keys_of_a_model_in_ddp_are_those_of_the_plain_one(gloo: None, tmp_path: Path) -> None:
    model = operated(made())
    live = run(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert torch.equal(run(wrapped), live)
    set_coeff(wrapped, 0.5)
    wrapped(X).square().sum().backward()
    assert all(site.core.g.grad is not None for site in sites(wrapped).values())
    set_coeff(wrapped, 1.0)
    save_adapter(model, tmp_path / "inside")
    assert set(configuration(tmp_path / "inside")["sites"]) == {"a", "b", "w"}
    assert torch.equal(run(load_adapter(made(), tmp_path / "inside", progress=False)), live)
    holder = nn.Module()
    holder.inner = nn.parallel.DistributedDataParallel(made())
    holder.forward = lambda x: holder.inner(x)
    apply_surgery(holder, "antipasto", r=4, target_modules="all-linear", progress=False)
    save_adapter(holder, tmp_path / "parts")
    assert set(configuration(tmp_path / "parts")["sites"]) == {"inner.a", "inner.b"}
    undo_surgery(wrapped)
    assert torch.equal(run(model), run(made()))  # DDP itself fails where the buffers that it saw have gone


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_sublayer_that_is_compiled(when: str, how: str, tmp_path: Path) -> None:
    def compile_in(model: Any) -> None:
        if how == "wrapped":
            model.a = torch.compile(model.a, backend="eager")
        else:
            model.a.compile(backend="eager")

    model = made()
    if when == "before":
        compile_in(model)
    base = run(model)
    operated(model)
    live = run(operated(made()))
    if when == "after":
        compile_in(model)
    assert torch.allclose(run(model), live, atol=1e-6)
    save_adapter(model, tmp_path)
    assert set(configuration(tmp_path)["sites"]) == {"a", "b", "w"}
    assert torch.allclose(run(load_adapter(made(), tmp_path, progress=False)), live, atol=1e-6)
    with steer(model, 0.0):
        assert torch.equal(run(model), base)
    undo_surgery(model)
    assert torch.equal(run(model), base)


def test_a_weight_that_compiled_code_reads_elsewhere_has_the_change() -> None:
    model = two_paths()
    with torch.no_grad():
        sites(model)["head"].core.g.add_(0.3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for read in (False, True):
        assert torch.allclose(compiled(X, read=read), model(X, read=read), atol=1e-6)
        with torch.no_grad(), steer(model, -0.5):
            assert torch.allclose(compiled(X, read=read), model(X, read=read), atol=1e-6)


def test_token_embeddings_are_resized_after_surgery() -> None:
    from tests.support.zoo import small_model

    found = small_model("qwen3")
    base = copy.deepcopy(found.model)
    apply_surgery(found.model, "antipasto", r=4, progress=False)
    with torch.no_grad():
        for site in sites(found.model).values():
            site.core.g.add_(0.2)
    live = found.run()
    size = found.model.get_input_embeddings().num_embeddings
    torch.manual_seed(0)
    found.model.resize_token_embeddings(size + 3, mean_resizing=False)
    assert torch.equal(found.run()[..., :size], live)
    undo_surgery(found.model)
    assert torch.equal(found.run()[..., :size], base(**found.inputs).logits)
    found.model.resize_token_embeddings(size, mean_resizing=False)
    assert [name for name, _ in found.model.named_parameters()] == [name for name, _ in base.named_parameters()]
