"""Statistics as a file: saved, merged, reused; refused where they belong to something else, or are damaged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import surgery
from surgery import Contrast, Statistics, apply_surgery, calibrate, sites
from surgery.factors.statistic import KINDS, Statistic
from surgery.verbs.calibrate import recalibrate
from tests.support.injected_failures import refused
from tests.support.tolerance import assert_close
from tests.support.zoo import small_model

VARIANTS = ("antipasto", surgery.AntiPaSTO(pool="mean_abs"), "antipasto_corda", "antipasto_asvd", "sspace")
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v if isinstance(v, str) else "mean_abs")
X = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "progress": False}


def data_of(variant: Any, x: torch.Tensor = X) -> Any:
    return Contrast([x], [x * 0.5 + 0.1], pool="mean") if variant == "sspace" else [x]


def collected(variant: Any = "antipasto", x: torch.Tensor = X, **options: Any) -> Statistics:
    return calibrate(small_model("mlp").model, variant, data_of(variant, x), **OPTIONS | options)


def equal(left: Statistics, right: Statistics) -> bool:
    if (left.sites.keys(), left.fingerprints, left.pool) != (right.sites.keys(), right.fingerprints, right.pool):
        return False
    pairs = [(left.sites[key], right.sites[key]) for key in left.sites]
    fields = all((a.kind, a.side, a.d_in, a.counts) == (b.kind, b.side, b.d_in, b.counts) for a, b in pairs)
    return fields and all(
        a.sums.keys() == b.sums.keys() and all(torch.equal(a.sums[name], b.sums[name]) for name in a.sums)
        for a, b in pairs
    )


def factors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{key}.{name}": t for key, site in sites(model).items() for name, t in site.state_dict().items()}


@each_variant
def test_saved_loaded_and_used_like_the_data(variant, tmp_path):
    found = collected(variant)
    path = found.save(tmp_path / "new" / "folder" / "s.safetensors")
    loaded = Statistics.load(str(path))
    assert equal(loaded, found)
    assert loaded.bytes == found.bytes
    assert len(loaded.distinct) == len(found.distinct)
    expected = factors_of(apply_surgery(small_model("mlp").model, variant, calibration=data_of(variant), **OPTIONS))
    for statistics in (found, loaded):
        model = apply_surgery(small_model("mlp").model, variant, calibration=statistics, **OPTIONS)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in factors_of(model).items())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_shared_statistics_stay_shared(tmp_path):
    batch = {"input_ids": torch.randint(0, 64, (4, 9))}
    found = calibrate(small_model("qwen3").model, "antipasto", [batch], r=4, progress=False)
    loaded = Statistics.load(found.save(tmp_path / "s"))
    for merged in (found, loaded, found + loaded):
        q, k = (merged.sites[f"model.layers.1.self_attn.{name}_proj"] for name in "qk")
        assert q is k
    assert (found + loaded).bytes == found.bytes == sum(s.bytes for s in found.distinct)


@each_variant
def test_merged_is_one_run_over_both(variant):
    first, second, whole = collected(variant, X[:15]), collected(variant, X[15:]), collected(variant, X)
    before = copy.deepcopy(first)
    merged = first + second
    assert equal(first, before)
    for key, statistic in whole.sites.items():
        assert merged.sites[key].counts == statistic.counts
        for name, value in statistic.sums.items():
            assert_close(merged.sites[key].sums[name], value, torch.float32)
    one, other = (apply_surgery(small_model("mlp").model, variant, calibration=s, **OPTIONS) for s in (merged, whole))
    for name, tensor in factors_of(one).items():
        assert_close(tensor, factors_of(other)[name])


@given(st.sampled_from(KINDS[:3]), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 6))
def test_running_sums(kind, sizes, d_in):
    x = torch.randn(sum(sizes), d_in, dtype=torch.float64)
    found = Statistic(kind, "input", d_in)
    for part in x.split(sizes):
        found.add(part.float().double())
    x = x.float().double()
    expected = {"moment": x.T @ x, "squares": (x**2).sum(0), "absolute": x.abs().sum(0)}[kind]
    assert_close(found.sums[kind], expected)
    assert found.tokens == len(x)
    assert found.bytes == 8 * expected.numel()


def test_statistics_of_something_else_cannot_be_merged():
    found = collected()
    other = small_model("mlp", seed=1).model
    for statistics, message in (
        (collected(target_modules=["0"]), "other sites"),
        (collected("sspace"), "pooled otherwise"),
        (collected("antipasto_asvd"), "site '0': statistics of moment and of squares"),
        (calibrate(other, "antipasto", [X], **OPTIONS), "site '0': the two statistics were collected on different"),
    ):
        with pytest.raises(surgery.InputError, match=message):
            found + statistics
    with pytest.raises(TypeError):
        found + 1


def test_statistics_of_something_else_are_refused():
    found = collected()
    other = small_model("mlp", seed=1).model
    assert "site '0': the statistics were collected on another base weight" in refused(other, calibration=found, r=4)
    few = collected(target_modules=["0", "2"])
    assert "site '4': the statistics do not cover it" in refused(small_model("mlp").model, calibration=few, r=4)
    for variant, kind in (("antipasto_asvd", "squares"), ("sspace", "contrast")):
        message = refused(
            small_model("mlp").model, calibration=found, variant=variant, r=4, target_modules="all-linear"
        )
        assert f"site '0': the statistics are of kind 'moment', needed is '{kind}'" in message
    message = refused(small_model("mlp").model, calibration=collected(x=X[:4]), r=5)
    assert "site '0': calibration showed it 4 tokens, fewer than its rank 5" in message
    model = apply_surgery(small_model("mlp").model, "antipasto", r=4, progress=False)
    before = factors_of(model)
    with pytest.raises(surgery.InputError, match="site '4'"):
        recalibrate(model, few, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in factors_of(model).items())


def test_statistics_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("kept")
    for path in (tmp_path / "folder", tmp_path / "folder" / "file" / "below"):
        with pytest.raises(surgery.InputError, match="cannot write statistics"):
            collected().save(path)
    assert (tmp_path / "folder" / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def _entry(content: dict[str, Any], **values: Any) -> None:
    content["statistics"][0].update(values)


def _drop(tensors: dict[str, Any]) -> None:
    del tensors["0.moment"]


DAMAGE: dict[str, Any] = {
    "kind": lambda c, t: _entry(c, kind="nonsense"),
    "another kind": lambda c, t: _entry(c, kind="squares"),
    "side": lambda c, t: _entry(c, side="top"),
    "another side": lambda c, t: _entry(c, side="output"),
    "no counts": lambda c, t: _entry(c, counts={}),
    "counts of another set": lambda c, t: _entry(c, counts={"positive": 9}),
    "count of zero": lambda c, t: _entry(c, counts={"all": 0}),
    "count that is no integer": lambda c, t: _entry(c, counts={"all": 1.5}),
    "count that is a truth": lambda c, t: _entry(c, counts={"all": True}),
    "counts that are a list": lambda c, t: _entry(c, counts=[1]),
    "size": lambda c, t: _entry(c, d_in=5),
    "size that is none": lambda c, t: _entry(c, d_in="x"),
    "statistic that is not there": lambda c, t: c["sites"]["0"].update(statistic=7),
    "statistic below zero": lambda c, t: c["sites"]["0"].update(statistic=-1),
    "no fingerprint": lambda c, t: c["sites"]["0"].pop("fingerprint"),
    "sites that are a list": lambda c, t: c.update(sites=[]),
    "no pool": lambda c, t: c.pop("pool"),
    "pool": lambda c, t: c.update(pool="first"),
    "statistics that are none": lambda c, t: c.update(statistics=None),
    "no tensor": lambda c, t: _drop(t),
    "dtype": lambda c, t: t.update({"0.moment": t["0.moment"].float()}),
    "not finite": lambda c, t: t["0.moment"][1, 1:2].fill_(float("nan")),
    "shape": lambda c, t: t.update({"0.moment": t["0.moment"][:3, :3].contiguous()}),
    "not square": lambda c, t: t.update({"0.moment": t["0.moment"][:3].contiguous()}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return collected().save(tmp_path_factory.mktemp("statistics") / "s")


def rewritten(saved: Path, path: Path, damage: Any = None, **metadata: str) -> Path:
    """A copy of a file whose content, tensors or metadata are changed."""
    with safe_open(saved, "pt") as file:
        whole, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = json.loads(whole["content"])
    if damage:
        damage(content, tensors)
    save_file(tensors, path, whole | {"content": json.dumps(content)} | metadata)
    return path


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_content_is_refused(saved, tmp_path, damage):
    assert Statistics.load(rewritten(saved, tmp_path / "ok")).sites
    with pytest.raises(surgery.AdapterError, match=r"statistics '.*bad'"):
        Statistics.load(rewritten(saved, tmp_path / "bad", DAMAGE[damage]))


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "sspace-adapter"},
        {"version": "2"},
        {"content": "{"},
        {"content": "3"},
        {"content": "[" * 100_000},
        {"content": "{}"},
    ],
    ids=lambda m: str(m)[:30],
)
def test_damaged_metadata_is_refused(saved, tmp_path, metadata):
    with pytest.raises(surgery.AdapterError, match=r"statistics '.*bad'"):
        Statistics.load(rewritten(saved, tmp_path / "bad", **metadata))


@pytest.mark.parametrize("cut", [0, 4, 8, 100, 1000, -1])
def test_files_that_are_cut_short_or_are_none(saved, tmp_path, cut):
    (tmp_path / "bad").write_bytes(saved.read_bytes()[:cut])
    for path in (tmp_path / "bad", tmp_path / "missing", tmp_path):
        with pytest.raises(surgery.AdapterError, match="cannot be read"):
            Statistics.load(path)


def test_a_file_without_metadata(tmp_path):
    save_file({"0.moment": torch.zeros(2, 2)}, tmp_path / "bad")
    with pytest.raises(surgery.AdapterError, match="expected format sspace-statistics 1, found None"):
        Statistics.load(tmp_path / "bad")
