"""Adapter directories: exact, reproducible, written and loaded whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import load_adapter, save_adapter, set_coeff, sites, undo_surgery
from surgery.storage.adapter_file import CONFIG, TENSORS
from surgery.storage.model_card import CARD
from tests.support.adapter_files import configuration
from tests.support.model_state import state_of
from tests.support.operated_models import each_dtype, each_model, operate, operated, randomise
from tests.support.saved_adapters import contents, refused, saved
from tests.support.zoo import small_model


def tensors_of(model: nn.Module) -> list[str]:
    """What ``state_of`` says of parameters and buffers."""
    return [line for line in state_of(model) if "<class" not in line]


@each_dtype
@each_model
def test_a_reloaded_adapter_gives_bit_identical_outputs(name, dtype, tmp_path):
    found, fresh = saved(tmp_path / "adapter", name, dtype), small_model(name, dtype)
    before, base = state_of(fresh.model), fresh.run()
    assert load_adapter(fresh.model, tmp_path / "adapter") is fresh.model
    assert torch.equal(fresh.run(), found.run())
    assert [s.host.name for s in sites(fresh.model).values()] == [s.host.name for s in sites(found.model).values()]
    assert not any(p.requires_grad for n, p in fresh.model.named_parameters() if ".core." not in f".{n}")
    set_coeff(fresh.model, 0.0)
    assert torch.equal(fresh.run(), base)
    undo_surgery(fresh.model)
    assert state_of(fresh.model) == before


@each_model
def test_saving_twice_gives_identical_bytes(name, tmp_path):
    saved(tmp_path / "one", name)
    fresh = load_adapter(small_model(name).model, tmp_path / "one")
    save_adapter(fresh, str(tmp_path / "new" / "two"))
    for file in (CONFIG, TENSORS, CARD):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "new" / "two" / file).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["new", "one"]
    assert sorted(os.listdir(tmp_path / "one")) == [CARD, CONFIG, TENSORS]


def test_coeff_is_one_after_loading(tmp_path):
    found = operated("mlp")
    expected = found.run()
    with pytest.warns(UserWarning, match=r"coeff was 0\.25: .* loading sets coeff to 1"):
        save_adapter(set_coeff(found.model, 0.25), tmp_path)
    assert configuration(tmp_path)["coeff"] == 0.25
    with pytest.warns(UserWarning, match=r"coeff was 0\.25"):
        load_adapter(found.model, tmp_path)
    assert {float(site.steering.coeff) for site in sites(found.model).values()} == {1.0}
    assert torch.equal(found.run(), expected)


def test_several_variants_and_ranks_in_one_model(tmp_path):
    found, fresh = small_model("raw"), small_model("raw")
    operate(found, target_modules=["w", "twice"], r=3)
    operate(found, target_modules=["out"], variant=surgery.AntiPaSTO(r=2, suppress_only=True), r=None)
    randomise(found.model)
    load_adapter(fresh.model, save_adapter(found.model, tmp_path))
    assert torch.equal(fresh.run(), found.run())
    assert {k: s.variant for k, s in sites(fresh.model).items()} == {
        k: s.variant for k, s in sites(found.model).items()
    }


@pytest.mark.parametrize("factors_dtype", ["float32", "float64", "float16"])
def test_factors_of_another_dtype(factors_dtype, tmp_path):
    found, fresh = small_model("raw", torch.bfloat16), small_model("raw", torch.bfloat16)
    operate(found, variant=surgery.AntiPaSTO(r=4, factors_dtype=factors_dtype), r=None)
    randomise(found.model)
    load_adapter(fresh.model, save_adapter(found.model, tmp_path))
    assert torch.equal(fresh.run(), found.run())
    assert {site.factors.U.dtype for site in sites(fresh.model).values()} == {getattr(torch, factors_dtype)}


def test_a_loaded_model_takes_surgery_on_other_sites(tmp_path):
    fresh = small_model("raw")
    before = state_of(fresh.model)
    load_adapter(fresh.model, save_adapter(operate(small_model("raw"), target_modules=["v", "out"]).model, tmp_path))
    operate(fresh, target_modules=["w", "twice"])
    assert sorted(sites(fresh.model)) == ["out", "twice", "v", "w"]
    undo_surgery(fresh.model)
    assert state_of(fresh.model) == before


@pytest.mark.parametrize("name", ["mlp", "attention", "raw"])
def test_loading_replaces_a_present_adapter(name, tmp_path):
    found, other = saved(tmp_path, name), small_model(name)
    before = state_of(other.model)
    other_key = next(reversed(sites(found.model)))
    randomise(operate(other, target_modules=[other_key], r=2).model, 3.0)
    load_adapter(other.model, tmp_path)
    assert torch.equal(other.run(), found.run())
    undo_surgery(other.model)
    assert state_of(other.model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["mlp", "attention", "raw"])
def test_a_failing_load_keeps_a_present_adapter(name, error, tmp_path, monkeypatch):
    saved(tmp_path, name)
    found = operated(name, scale=0.5)
    set_coeff(found.model, 0.7)
    before, output, attach = tensors_of(found.model), found.run(), surgery.hosting.attach.attach
    calls: list[Any] = []

    def failing(model: nn.Module, plan: Any, *rest: Any) -> None:
        calls.append(plan)
        if len(calls) == 2:
            raise error("injected")
        attach(model, plan, *rest)

    monkeypatch.setattr("surgery.hosting.attach.attach", failing)
    with pytest.raises(error, match="injected"):
        load_adapter(found.model, tmp_path)
    assert tensors_of(found.model) == before
    assert torch.equal(found.run(), output)


def test_a_refused_load_keeps_a_present_adapter(tmp_path):
    found = operated("raw")
    (saved(tmp_path, "raw") and tmp_path / TENSORS).unlink()
    refused(tmp_path, found.model)
    assert len(sites(found.model)) == 4


def test_other_files_of_the_directory_are_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "runs").mkdir()
    saved(tmp_path)
    saved(tmp_path, "qwen3")
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, TENSORS, "runs"]
    assert (tmp_path / "README.md").read_text() == "mine"
    load_adapter(small_model("qwen3").model, tmp_path)


def fails_at(monkeypatch, function: str, call: int) -> None:
    """Make the n-th call of a function of ``os`` fail, once."""
    original, calls = getattr(os, function), []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        original(*args)

    monkeypatch.setattr(os, function, failing)


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_adapter(function, call, tmp_path, monkeypatch):
    found = saved(tmp_path / "adapter")
    before = contents(tmp_path / "adapter")
    fails_at(monkeypatch, function, call)
    with pytest.raises(surgery.AdapterError, match="No space left on device"):
        save_adapter(operated("mlp", scale=0.3).model, tmp_path / "adapter")
    assert contents(tmp_path / "adapter") == before
    assert os.listdir(tmp_path) == ["adapter"]
    assert torch.equal(found.run(load_adapter(small_model("mlp").model, tmp_path / "adapter")), found.run())


@pytest.mark.parametrize("function", ["rename", "fsync"])
def test_a_failing_write_leaves_no_new_directory(function, tmp_path, monkeypatch):
    fails_at(monkeypatch, function, 1)
    with pytest.raises(surgery.AdapterError, match="No space left on device"):
        save_adapter(operated("mlp").model, tmp_path / "adapter")
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_a_file_system_of_its_own(tmp_path, monkeypatch):
    path, replace = tmp_path / "mounted", os.replace
    saved(path)

    def across(source: Path, target: Path) -> None:
        if path not in Path(source).parents:
            raise OSError(18, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr("os.replace", across)
    saved(path, "raw")
    assert sorted(os.listdir(path)) == [CARD, CONFIG, TENSORS]
    load_adapter(small_model("raw").model, path)


def test_what_cannot_be_written_is_refused(tmp_path):
    found, file = operated("mlp"), tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        with pytest.raises(surgery.AdapterError, match="cannot write an adapter to"):
            save_adapter(found.model, path)
    with pytest.raises(surgery.AdapterError, match="factors must be 'exact'"):
        save_adapter(found.model, tmp_path / "new", factors="nonsense")
    with torch.no_grad():
        sites(found.model)["2"].core.g[1] = float("nan")
    with pytest.raises(surgery.AdapterError, match=r"'2\.core\.g' is not finite"):
        save_adapter(found.model, tmp_path / "new")
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_failing_write_over_links_puts_them_back(tmp_path, monkeypatch):
    """As a snapshot in the Hub's cache is: names that are links to files elsewhere."""
    found, real, path = operated("mlp"), tmp_path / "real", tmp_path / "snapshots" / "1"
    save_adapter(found.model, real)
    path.mkdir(parents=True)
    for file in (CONFIG, TENSORS):
        (path / file).symlink_to(Path("..", "..", "real", file))

    def failing(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("surgery.support.atomic_directory.sync_folder", failing)
    with pytest.raises(surgery.AdapterError, match="what was there is unchanged"):
        save_adapter(operated("mlp", scale=0.3).model, path)
    monkeypatch.undo()
    assert sorted(os.listdir(path)) == [CONFIG, TENSORS]  # and no card
    assert all((path / file).is_symlink() for file in (CONFIG, TENSORS))
    fresh = small_model("mlp")
    load_adapter(fresh.model, path)
    assert torch.equal(fresh.run(), found.run())


@pytest.mark.parametrize("progress", ["x", 0, 3])
def test_a_flag_that_is_none_is_refused(progress, tmp_path):
    found = saved(tmp_path)
    for run in (save_adapter, load_adapter):
        with pytest.raises(surgery.InputError, match="progress must be True, False or None"):
            run(found.model, tmp_path, progress=progress)


def test_the_work_of_a_load_grows_with_the_sites(tmp_path, monkeypatch):
    """Neither the tensors' names nor the modules are gone through once for every site."""
    counts = []
    for sites_of in (10, 40):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(sites_of)))
        surgery.apply_surgery(model, "antipasto", r=2, example_inputs=torch.ones(1, 4), progress=False)
        original, calls = nn.Module.named_modules, []

        def counted(*args: Any, original: Any = original, calls: list[int] = calls, **options: Any) -> Any:
            for entry in original(*args, **options):
                calls.append(1)
                yield entry

        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "named_modules", counted)
            save_adapter(model, tmp_path / str(sites_of))
            load_adapter(model, tmp_path / str(sites_of))
        counts.append(len(calls))
    assert counts[1] < 5 * counts[0]
