"""Models under DistributedDataParallel: each rank keeps its own coefficients, and gradients of cores are averaged."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import surgery
from surgery import get_coeff, set_coeff, sites, steer
from tests.support.tolerance import assert_close

WORLD = 2
ROWS = (torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.0, 1.5, -0.5]))


class Flat(nn.Module):
    """Tokens flattened into rows, and a buffer of its own, which is to be the first rank's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x.flatten(0, 1)))).unflatten(0, x.shape[:2]) + self.shift


class Holder(nn.Module):
    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.root(x)


def model() -> Flat:
    torch.manual_seed(0)
    found = surgery.apply_surgery(
        Flat(), "antipasto", r=4, target_modules=["inner", "outer"], example_inputs=inputs(0), progress=False
    )
    with torch.no_grad():
        for i, site in enumerate(sites(found).values()):
            site.core.g.copy_(torch.linspace(-0.6, 0.9, len(site.core.g)).roll(i))
    return found


def turn(root: nn.Module, rank: int) -> None:
    """Other factors of the same weight on each rank: the signs of pairs of directions are free."""
    for factor in (sites(root)["outer"].factors.U, sites(root)["outer"].factors.Vh):
        factor.mul_((-1) ** rank)


def inputs(rank: int) -> torch.Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(rank))


def gradients(found: nn.Module) -> list[torch.Tensor]:
    return [site.core.g.grad.clone() for site in sites(found).values()]


def trained(run: nn.Module, root: nn.Module, rank: int, coeff: Any) -> dict[str, Any]:
    """Two forwards and a backward at a coefficient."""
    root.zero_grad()
    with steer(root, coeff):
        outs = [run(inputs(rank)) for _ in range(2)]
        sum(out.square().mean() for out in outs).backward()
        shown = torch.as_tensor(get_coeff(root))
    return {"outs": [out.detach() for out in outs], "gradients": gradients(root), "shown": shown}


def work(rank: int, folder: Path, port: int) -> None:
    """What each process does; the findings go into a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        torch.save([ranks_own(rank, inside) for inside in (False, True)], folder / f"said{rank}.pt")
    finally:
        dist.destroy_process_group()


def ranks_own(rank: int, inside: bool) -> dict[str, Any]:
    """What a rank sees of a root that is wrapped itself, or inside of what is wrapped."""
    root = model()
    with torch.no_grad():
        root.shift.fill_(float(rank))
        turn(root, rank)
    set_coeff(root, 0.25 + rank)
    run = DistributedDataParallel(Holder(root) if inside else root)
    said = {"set": trained(run, root, rank, float(get_coeff(root))), "rows": trained(run, root, rank, ROWS[rank])}
    with torch.no_grad():
        said["kept"] = run(inputs(rank))
    return {**said, "shift": root.shift.clone(), "U": sites(root)["outer"].factors.U.clone()}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each rank saw, by rank; the processes take their time to start."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(folder, free_port()), nprocs=WORLD)
    return [torch.load(folder / f"said{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("inside", [False, True], ids=["root", "inside"])
def test_each_rank_keeps_its_own_coefficients(inside: bool, said: list[list[dict[str, Any]]]) -> None:
    found = [one[inside] for one in said]
    alone: list[dict[str, Any]] = []
    for rank in range(WORLD):
        root = model()
        alone.append({k: trained(root, root, rank, c) for k, c in (("set", 0.25 + rank), ("rows", ROWS[rank]))})
        with torch.no_grad(), steer(root, 0.25 + rank):
            assert_close(found[rank]["kept"], root(inputs(rank)))
        assert found[rank]["shift"] == 0  # what is the user's is still broadcast
        if not inside:  # the factors too stay the rank's own where the root is what is wrapped
            turn(root, rank)
        assert torch.equal(found[rank]["U"], sites(root)["outer"].factors.U)
    assert not torch.allclose(alone[0]["rows"]["outs"][0], alone[1]["rows"]["outs"][0], atol=0.01)
    for kind in ("set", "rows"):
        for rank in range(WORLD):
            for out, expected in zip(found[rank][kind]["outs"], alone[rank][kind]["outs"], strict=True):
                assert_close(out, expected)
            assert torch.equal(found[rank][kind]["shown"], alone[rank][kind]["shown"])
        averages = [sum(pair) / WORLD for pair in zip(*(one[kind]["gradients"] for one in alone), strict=True)]
        for rank in range(WORLD):
            for gradient, average in zip(found[rank][kind]["gradients"], averages, strict=True):
                assert_close(gradient, average)


def test_names_that_the_user_gave_are_left_alone_too() -> None:
    root = model()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(root, ["shift"])
    names = root._ddp_params_and_buffers_to_ignore
    assert "shift" in names
    assert "inner.sspace.steering.coeff" in names
    assert "outer.sspace.factors.Vh" in names
    assert not any("core.g" in name for name in names)
    assert copy.deepcopy(root)._ddp_params_and_buffers_to_ignore == names
    assert surgery.undo_surgery(root)._ddp_params_and_buffers_to_ignore == ["shift"]
    assert not hasattr(surgery.undo_surgery(model()), "_ddp_params_and_buffers_to_ignore")
