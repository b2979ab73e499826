"""Names in files: those of the plain model, whatever was wrapped around its modules when it was saved or loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from surgery import apply_surgery, load_adapter, save_adapter, sites
from surgery.storage.adapter_file import TENSORS
from surgery.storage.saved_names import SavedNames
from tests.support.adapter_files import bare_tensors, configuration, write_older
from tests.support.operated_models import randomise
from tests.support.tolerance import assert_close

X = torch.arange(12.0).reshape(2, 6) / 8 - 0.5


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    return nn.Sequential(block, nn.Linear(6, 4, bias=False))


def compiled_layer() -> nn.Module:
    model = plain()
    model[0] = torch.compile(model[0], backend="eager")
    return model


def compiled_site() -> nn.Module:
    model = plain()
    model[1] = torch.compile(model[1], backend="eager")
    return model


def compiled_root() -> nn.Module:
    return torch.compile(plain(), backend="eager")  # type: ignore[return-value]


def in_data_parallel() -> nn.Module:
    return nn.DataParallel(plain())


FORMS: dict[str, Callable[[], nn.Module]] = {
    form.__name__: form for form in (plain, compiled_layer, compiled_site, compiled_root, in_data_parallel)
}
KEYS = ["0.0", "0.2", "1"]


def operated(form: str) -> nn.Module:
    model = FORMS[form]()
    apply_surgery(model, "antipasto", r=3, target_modules="all-linear", example_inputs=X, progress=False)
    return randomise(model)


@pytest.mark.parametrize("loaded", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_fits_the_model_in_every_form(form, loaded, tmp_path):
    model = operated(form)
    save_adapter(model, tmp_path)
    assert list(configuration(tmp_path)["sites"]) == KEYS
    assert not any("_orig_mod" in name or "module" in name for name in load_file(tmp_path / TENSORS))
    fresh = load_adapter(FORMS[loaded](), tmp_path)
    assert [site.core.g.tolist() for site in sites(fresh).values()] == [
        site.core.g.tolist() for site in sites(model).values()
    ]
    with torch.no_grad():
        assert_close(fresh(X), model(X))  # one of them may be compiled
    save_adapter(fresh, tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / TENSORS).read_bytes()
    load_adapter(fresh, tmp_path / "again")  # in place of what it carries


@pytest.mark.parametrize("prefix", ["0._orig_mod.", "module.0."])
def test_an_older_file_with_names_of_wrappers_loads(prefix, tmp_path):
    from safetensors.torch import load, save

    model = operated("plain")
    save_adapter(model, tmp_path)
    config, tensors = configuration(tmp_path), load(bare_tensors(tmp_path))

    def old(name: str) -> str:
        if prefix.startswith("module."):
            return f"module.{name}"
        return prefix + name.removeprefix("0.") if name.startswith("0.") else name

    config["sites"] = {
        old(key): entry | {"weight": old(entry["weight"]), "bias": entry["bias"] and old(entry["bias"])}
        for key, entry in config["sites"].items()
    }
    write_older(tmp_path, config, save({old(name): tensor for name, tensor in tensors.items()}))
    fresh = load_adapter(plain(), tmp_path)
    with torch.no_grad():
        assert_close(fresh(X), model(X))  # one of them may be compiled


class Named(nn.Module):
    """A model that has a part called ``module``, which is no wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module = plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)  # type: ignore[no-any-return]


def test_a_part_that_is_called_module_keeps_its_name(tmp_path):
    model = Named()
    apply_surgery(model, "antipasto", r=3, target_modules="all-linear", example_inputs=X, progress=False)
    save_adapter(randomise(model), tmp_path)
    assert list(configuration(tmp_path)["sites"]) == [f"module.{key}" for key in KEYS]
    fresh = load_adapter(Named(), tmp_path)
    with torch.no_grad():
        assert_close(fresh(X), model(X))  # one of them may be compiled


def test_distributed_data_parallel(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(plain())
        names = SavedNames(model, (name for name, _ in model.named_parameters()))
        assert names.saved("module.0.2.weight") == "0.2.weight"
        assert names.saved_key("module.0.2", "module.0.2.weight") == "0.2"
        assert names.in_model("0.2.weight") == "module.0.2.weight"
        assert names.key_in_model("0.2", "0.2.weight") == "module.0.2"
    finally:
        dist.destroy_process_group()
