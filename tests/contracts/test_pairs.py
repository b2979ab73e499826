"""Every core on every basis that gives what it needs: its equation, its identities, its files, its refusals."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import fx, nn

import surgery
from exporters import export, export_core
from surgery.bases import REGISTRY as BASES
from surgery.bases.corda import CorDA
from surgery.bases.top_svd import SVD
from surgery.cores import REGISTRY as CORES
from surgery.cores import CoreConfig
from surgery.support.configuration import as_entry
from surgery.variants import BasisCore, Variant, resolve_variant, variant_from_dict
from tests.support.pairs import CORE_CONFIGS, F64, REFUSED, R, data_of, each_pair, inputs, label, moved, operated, plain
from tests.support.reference import mirrored, reference_delta_weight, reference_output
from tests.support.tolerance import assert_close

ROWS = (0.0, 1.0, -0.5, 0.8)


@each_pair
def test_a_pair_is_its_equation_and_an_identity_where_it_says_so(basis, core):
    x, base = inputs(), plain()(inputs())
    model = operated(basis, core)
    site = surgery.sites(model)["0"]
    assert isinstance(site.variant, BasisCore)
    assert (site.variant.basis_config, site.variant.core_config) == (basis, core)
    assert set(site.core.tensors()) == set(core.init_core(site.factors.rank, torch.Generator()))
    assert torch.equal(model(x), base) == core.identity_at_init
    moved(model)
    for coeff in (-1.0, 0.5, 1.0, ROWS):
        surgery.set_coeff(model, torch.tensor(coeff, dtype=F64))
        assert_close(model(x).detach(), reference_output(site, x, np.array(coeff)))
        with torch.no_grad():
            assert_close(model(x), reference_output(site, x, np.array(coeff)))
    for coeff in (0.0, torch.zeros(4)):
        surgery.set_coeff(model, coeff)
        assert torch.equal(model(x), base)
    surgery.undo_surgery(model)
    assert torch.equal(model(x), base)
    assert all(torch.equal(p, other) for p, other in zip(model.parameters(), plain().parameters(), strict=True))


@pytest.mark.matrix
@each_pair
def test_the_signs_of_pairs_of_directions_change_no_output(basis, core):
    model = operated(basis, core)
    r = surgery.sites(model)["0"].factors.rank
    signs = torch.tensor([1.0, -1, -1, 1, -1], dtype=F64)[:r]
    for far in (False, True):
        model = moved(model) if far else model
        copied = copy.deepcopy(model)
        site, tensors = surgery.sites(copied)["0"], surgery.sites(copied)["0"].core.tensors()
        carried = mirrored(core, tensors, signs)
        if carried is None:  # how a core that has no formula is carried along is known where it mixes no directions
            delta = core.delta(torch.eye(r, dtype=F64), site.factors.S, site.core, torch.ones((), dtype=F64))
            if not torch.equal(delta, delta.diagonal().diag()):
                continue
            carried = tensors
        with torch.no_grad():
            site.factors.U.mul_(signs)
            site.factors.Vh.mul_(signs[:, None])
            for name, tensor in tensors.items():
                tensor.copy_(carried[name])
        surgery.refresh(copied)
        assert_close(copied(inputs()).detach(), model(inputs()).detach())


@pytest.mark.matrix
@each_pair
def test_merged_is_live_and_so_is_a_graph(basis, core):
    x = inputs()
    model = surgery.set_coeff(moved(operated(basis, core)), 0.5)
    live, site = model(x).detach(), surgery.sites(model)["0"]
    if core == type(core)():  # other settings have graphs of the same shape
        graph = moved(operated(basis, core, fx.symbolic_trace(plain())))
        assert_close(surgery.set_coeff(graph, 0.5)(x).detach(), live)
    if not core.linear:
        with pytest.raises(surgery.VariantError, match="not linear"):
            surgery.merge(model)
        return
    expected = site.weight + reference_delta_weight(site, 0.5)
    surgery.merge(model)
    assert_close(model[0].weight, expected, rounded=True)
    assert_close(model(x), live)


@pytest.mark.matrix
@each_pair
def test_saved_and_loaded_bit_for_bit(basis, core, tmp_path):
    dtype = (torch.float32, torch.bfloat16, F64)[CORE_CONFIGS.index(core) % 3]
    model = moved(operated(basis, core, dtype=dtype))
    site = surgery.sites(model)["0"]
    surgery.save_adapter(model, tmp_path / "a")
    fresh = surgery.load_adapter(plain(dtype), tmp_path / "a")
    loaded = surgery.sites(fresh)["0"]
    assert loaded.variant == site.variant
    assert loaded.variant.hyperparameters() == site.variant.hyperparameters()
    pairs = [*site.core.tensors().items(), *site.factors.named_buffers()]
    other = dict([*loaded.core.tensors().items(), *loaded.factors.named_buffers()])
    assert all(torch.equal(other[name], tensor) for name, tensor in pairs)
    with torch.no_grad():
        assert torch.equal(fresh(inputs(dtype)), model(inputs(dtype)))
    surgery.recalibrate(fresh, data_of(basis, dtype), reset=True, progress=False)
    again = surgery.sites(fresh)["0"]
    assert again.variant == site.variant
    assert all(torch.equal(getattr(again.factors, n), getattr(site.factors, n)) for n in ("U", "S", "Vh"))


@pytest.mark.parametrize(("basis", "core"), REFUSED, ids=lambda c: label(c))
def test_a_pair_that_cannot_be_says_what_would_work(basis, core):
    able = [name for name, cls in BASES.items() if core.needs <= cls.gives]
    model = plain()
    with pytest.raises(surgery.VariantError, match=rf"core '{core.name}' needs .* basis '{basis.name}'") as caught:
        surgery.apply_surgery(model, BasisCore(r=R, core=core, basis=able[0]), basis=basis, progress=False)
    assert all(repr(name) in str(caught.value) for name in able)
    assert not surgery.sites(model)
    assert torch.equal(model(inputs()), plain()(inputs()))


def test_a_core_that_no_basis_serves_says_so():
    @dataclasses.dataclass(frozen=True)
    class Unserved(CoreConfig):
        needs = frozenset({"the moon"})

    with pytest.raises(surgery.VariantError, match=r"needs the moon, .*none is registered"):
        BasisCore(core=Unserved())


def test_a_basis_is_a_name_a_configuration_or_the_own_one():
    names = {"corda": CorDA(), "svd": None}
    for name, expected in names.items():
        assert surgery.AntiPaSTO(basis=name).basis == expected
    assert BasisCore(core="gated").basis_config.gives >= {"contrast data"}
    assert BasisCore(core="gain").basis_config == SVD()
    assert surgery.AntiPaSTO(basis=CorDA(cov_eps=0.1)).basis_config == CorDA(cov_eps=0.1)
    assert surgery.AntiPaSTO(basis=SVD(pool="mean_abs")) == surgery.AntiPaSTO(pool="mean_abs")
    assert surgery.AntiPaSTO(svd_method="exact", pool="mean_abs", basis="svd").svd_method == "exact"
    named = surgery.AntiPaSTOCorDA(cov_eps=0.2, svd_method="exact", basis="asvd")
    assert as_entry(named.basis_config) == {"name": "asvd", "cov_eps": 0.2, "cov_eps_relative": False}
    assert dataclasses.replace(named, r=3).basis_config == named.basis_config
    assert surgery.AntiPaSTOAblate(cov_orient=True, cov_eps=0.2).basis_config == CorDA(cov_eps=0.2)
    assert surgery.AntiPaSTOAblate(basis=CorDA(cov_eps=0.2)).basis_config == CorDA(cov_eps=0.2)
    assert "basis" not in surgery.AntiPaSTO().hyperparameters()
    with pytest.raises(surgery.VariantError, match=r"core 'gated' needs contrast data.*use basis='contrast'"):
        surgery.SSpace(basis="corda")


def test_a_pair_has_a_name_and_variants_that_are_that_pair_compute_the_same():
    pair = resolve_variant("corda+gain", 3)
    assert (pair.name, pair.r) == ("corda+gain", 3)
    assert variant_from_dict("corda+gain", json.loads(json.dumps(pair.hyperparameters()))) == pair
    with pytest.raises(surgery.VariantError, match="variant 'corda\\+gain', not 'svd\\+gain'"):
        variant_from_dict("svd+gain", pair.hyperparameters())
    for wrong in ("corda+", "+gain", "corda+gain+gain", "gain+corda"):
        with pytest.raises(surgery.VariantError, match="unknown"):
            resolve_variant(wrong)
    outputs = []
    for variant, basis in (("corda+gain", None), ("antipasto", "corda"), ("antipasto_corda", None)):
        model = surgery.apply_surgery(
            plain(),
            variant,
            r=4,
            basis=basis,
            calibration=data_of(CorDA()),
            target_modules="all-linear",
            progress=False,
        )
        outputs.append(moved(model)(inputs()).detach())
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def on_corda(variant: str) -> nn.Module:
    basis = CorDA(cov_eps=1e-2)
    data = data_of(basis, torch.float32)
    options = {"calibration": data, "target_modules": "all-linear", "progress": False}
    return surgery.apply_surgery(plain(torch.float32), variant, r=4, basis=basis, **options)


@pytest.mark.parametrize("variant", ["antipasto", "antipasto_rot", "antipasto_ablate", "corda+dplr"])
def test_another_basis_goes_through_every_verb(variant, tmp_path):
    basis, x, model = CorDA(cov_eps=1e-2), inputs(torch.float32), on_corda(variant)
    expected = surgery.set_coeff(moved(model), 0.5)(x).detach()
    config = json.loads((surgery.save_adapter(model, tmp_path / "a") / "adapter_config.json").read_text())
    assert config["hyperparameters"]["basis"] == as_entry(basis)
    assert variant_from_dict(config["variant"], config["hyperparameters"]).basis_config == basis
    copied = copy.deepcopy(model)
    graph = surgery.to_graph(copy.deepcopy(model), x)
    assert_close(graph(x).detach(), expected)
    assert_close(surgery.fold(graph, freeze_core=True)(x).detach(), expected)
    with pytest.raises(surgery.AdapterError, match="chooses its factors by data"):
        surgery.save_adapter(model, tmp_path / "b", factors="recompute")
    assert_close(surgery.merge(copied)(x).detach(), expected)
    assert surgery.report(model).sites
    base = surgery.undo_surgery(model)
    assert torch.equal(base(x), plain(torch.float32)(x))


def test_a_damaged_basis_in_a_file_is_refused(tmp_path):
    basis = CorDA()
    values = surgery.AntiPaSTO(basis=basis).hyperparameters()
    for wrong in (3, "corda?", {"name": "corda", "x": 1}, {"name": "corda", "cov_eps": "1"}, {"cov_eps": 1.0}, [], {}):
        with pytest.raises(surgery.VariantError):
            variant_from_dict("antipasto", values | {"basis": wrong})


def test_a_variant_is_a_pair_of_registered_parts():
    for cls in (cls for cls in Variant.__subclasses__() if cls.name):
        assert BASES[cls.own_basis.name] is cls.own_basis
        assert CORES[cls.own_core.name] is cls.own_core
        declared = {f.name for f in dataclasses.fields(cls)}
        assert {f.name for f in dataclasses.fields(cls.own_core)} <= declared, cls
        assert not {f.name for f in dataclasses.fields(cls.own_core)} & {f.name for f in dataclasses.fields(Variant)}
        default = cls()
        for part in (default.core_config, default.basis_config):
            assert part == type(part)(), cls


@pytest.mark.parametrize("variant", ["antipasto", "corda+dplr"])
def test_another_basis_is_exported(variant, tmp_path):
    model = moved(on_corda(variant))
    for name, options in (("pt2", {}), ("onnx", {"mode": "swappable"}), ("lora", {})):
        report = export(model, name, tmp_path / name, example_inputs=inputs(torch.float32), **options)
        assert report.max_error < 1e-5
    assert export_core(model, tmp_path / "core", onnx_path=next((tmp_path / "onnx").glob("*.onnx"))).max_error == 0
