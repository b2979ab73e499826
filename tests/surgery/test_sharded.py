"""Models in shards on several processes: trained, saved from all of them, and refused where the whole is needed."""

from __future__ import annotations

import copy
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import surgery
from surgery import apply_surgery, load_adapter, merge, recalibrate, save_adapter, sites
from surgery.storage.adapter_file import CONFIG, TENSORS
from surgery.storage.trainer_files import CHECKPOINT
from tests.support.operated_models import randomise
from tests.support.zoo import SmallModel, small_model

WORLD = 2


def operated() -> SmallModel:
    found = small_model("qwen3")
    hub: Any = randomise(apply_surgery(found.model, "antipasto", r=8, progress=False), 0.3)
    hub.model.layers[0].input_layernorm.requires_grad_(True)  # is trained beside the cores
    return found


def shard(model: Any) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def step(found: SmallModel) -> None:
    """One optimiser step; every process and every test has the same batch, so that gradients agree."""
    optimizer = torch.optim.SGD([p for p in found.model.parameters() if p.requires_grad], lr=0.5)
    found.model(**found.inputs, labels=found.inputs["input_ids"]).loss.backward()
    optimizer.step()


def message(run: Any) -> str:
    try:
        run()
    except surgery.SurgeryError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def work(rank: int, folder: Path, port: int) -> None:
    """What each process does; the findings go into a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        found = operated()
        before = found.run()
        shard(found.model)
        said: dict[str, Any] = {"same": bool(torch.equal(found.run(), before))}
        step(found)
        torch.save(found.run(), folder / f"out{rank}.pt")
        path = save_adapter(found.model, folder / "adapter")
        said["saved"] = sorted(os.listdir(path))
        save_adapter(found.model, folder / "small", factors="recompute")
        hub: Any = found.model
        hub.save_pretrained(folder / "pretrained", is_main_process=rank == 0)
        whole = get_model_state_dict(hub, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:  # as a Trainer does, which has gathered the values
            hub.save_pretrained(folder / "given", state_dict=whole)
        blocked = folder / "file" / "below"  # no process may wait for ever for one that failed
        said["blocked"] = message(lambda: save_adapter(found.model, blocked))
        said["merge"] = message(lambda: merge(found.model))
        said["recalibrate"] = message(lambda: recalibrate(found.model, [found.inputs], reset=True, progress=False))
        plain = small_model("qwen3")
        shard(plain.model)
        said["load"] = message(lambda: load_adapter(plain.model, folder / "adapter"))
        said["apply"] = message(lambda: apply_surgery(plain.model, "antipasto", progress=False))
        said["clean"] = not sites(plain.model) and len(sites(found.model)) == 14
        (folder / f"said{rank}.json").write_text(json.dumps(said))
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.long
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_a_model_in_shards(tmp_path):
    (tmp_path / "file").write_text("mine")
    mp.spawn(work, args=(tmp_path, free_port()), nprocs=WORLD)
    alone = operated()
    step(alone)
    outs = [torch.load(tmp_path / f"out{rank}.pt", weights_only=True) for rank in range(WORLD)]
    assert torch.equal(*outs)
    assert (outs[0] - alone.run()).abs().max() < 1e-5
    for name in ("adapter", "small", "pretrained", "given"):
        fresh = small_model("qwen3")
        load_adapter(fresh.model, tmp_path / name, progress=False)
        assert torch.equal(fresh.run(), outs[0])
    for file in (CONFIG, TENSORS, CHECKPOINT):
        assert (tmp_path / "given" / file).read_bytes() == (tmp_path / "pretrained" / file).read_bytes()
    save_adapter(copy.deepcopy(fresh.model), tmp_path / "again")
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    for rank in range(WORLD):
        said = json.loads((tmp_path / f"said{rank}.json").read_text())
        assert said["same"]
        assert said["clean"]
        assert said["saved"] == ["README.md", CONFIG, TENSORS]
        assert said["blocked"].startswith("AdapterError: " + ("cannot write", "the first process could not")[rank])
        assert "lies in shards; load the adapter before the model is sharded" in said["load"]
        for verb in ("merge", "recalibrate", "apply"):
            assert "its weight is sharded; operate, load or merge before fully_shard" in said[verb], verb
