"""The contract of every basis, of every core, and of every pair of them that can be, on one small site."""

from __future__ import annotations

import copy
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import surgery
from surgery.bases import REGISTRY as BASES
from surgery.bases import Basis, basis_of
from surgery.bases.corda import CorDA
from surgery.bases.top_svd import SVD
from surgery.cores import REGISTRY as CORES
from surgery.cores import CoreConfig, core_of
from surgery.factors.statistic import KINDS, Statistic
from surgery.support.configuration import as_entry
from surgery.variants import BasisCore, Variant, resolve_variant, variant_from_dict
from tests.support.reference import mirrored, reference_delta_weight, reference_output
from tests.support.tolerance import assert_close

F64 = torch.float64
D_OUT, D_IN, R = 8, 6, 5
ROWS = (0.0, 1.0, -0.5, 0.8)


def configurations(registry: dict[str, Any]) -> list[Any]:
    """Every registered class as it is by default, once for each of its switches turned, and once with small numbers."""
    found = []
    for default in (cls() for cls in registry.values()):
        values = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
        found.append(default)
        switches = [name for name, value in values.items() if isinstance(value, bool)]
        found += [dataclasses.replace(default, **{name: not values[name]}) for name in switches]
        small = {name: 2 for name, value in values.items() if type(value) is int}
        found += [dataclasses.replace(default, **small)] if small else []
    return found


def label(configuration: Any) -> str:
    changed = {k: v for k, v in vars(configuration).items() if v != getattr(type(configuration)(), k)}
    return configuration.name + "".join(f",{k}={v}" for k, v in changed.items())


CORE_CONFIGS: list[CoreConfig] = configurations(CORES)
BASIS_CONFIGS: list[Basis] = [*configurations(BASES), SVD(pool="mean_abs"), CorDA(cov_eps=0.1)]
PAIRS = [(basis, core) for basis in BASIS_CONFIGS for core in CORE_CONFIGS]
POSSIBLE = [
    # settings of a basis that are not its defaults meet one core in the fast lane
    pytest.param(basis, core, marks=[] if basis == type(basis)() or core == CORE_CONFIGS[0] else pytest.mark.full)
    for basis, core in PAIRS
    if core.needs <= basis.gives
]
REFUSED = [(basis, core) for basis, core in PAIRS if not core.needs <= basis.gives]

each_core = pytest.mark.parametrize("core", CORE_CONFIGS, ids=label)
each_basis = pytest.mark.parametrize("basis", BASIS_CONFIGS, ids=label)
each_pair = pytest.mark.parametrize(("basis", "core"), POSSIBLE, ids=lambda c: label(c))


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def data_of(basis: Basis, dtype: torch.dtype = F64) -> Any:
    """Data of channels of unlike size, and two sets for a contrast."""
    batches = [(some(4, 3, D_IN, seed=seed) * torch.linspace(0.3, 2, D_IN, dtype=F64)).to(dtype) for seed in range(4)]
    return surgery.Contrast([b + 1 for b in batches[:2]], batches[2:]) if basis.statistic == "contrast" else batches


def plain(dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, D_OUT)).to(dtype).eval().requires_grad_(False)


def operated(basis: Basis, core: CoreConfig, model: Any = None, dtype: torch.dtype = F64, **options: Any) -> Any:
    return surgery.apply_surgery(
        plain(dtype) if model is None else model,
        BasisCore(r=R, core=core),
        basis=basis,
        target_modules="all-linear",
        calibration=data_of(basis, dtype),
        example_inputs=some(4, 3, D_IN).to(dtype),
        progress=False,
        **options,
    )


def moved(model: Any, scale: float = 0.7) -> Any:
    """The model, its cores away from where they start; strengths of an ablation inside of [0, 1]."""
    with torch.no_grad():
        for i, (name, p) in enumerate(surgery.sites(model)["0"].core.named_parameters()):
            p.copy_(torch.linspace(0.3, 0.7, len(p)) if name == "alpha" else scale * some(*p.shape, seed=20 + i))
    return model


def inputs(dtype: torch.dtype = F64) -> torch.Tensor:
    return some(4, 5, D_IN, seed=11).to(dtype)


def statistic_of(basis: Basis, weight: torch.Tensor) -> Statistic:
    """What calibration would collect of an input."""
    product = None
    if basis.statistic == "absolute":
        _, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        product = S[:, None] * Vh
    found = Statistic(basis.statistic, "input" if product is None else "output", weight.shape[1], product)
    for seed, name in enumerate(("positive", "negative") if basis.statistic == "contrast" else ("all",)):
        found.add(
            some(40, weight.shape[1], seed=seed) * torch.linspace(0.3, 2, weight.shape[1], dtype=F64) + seed, name
        )
    return found


@pytest.mark.parametrize("configuration", [*BASIS_CONFIGS, *CORE_CONFIGS], ids=label)
def test_a_configuration_is_frozen_and_round_trips_through_json(configuration):
    read = basis_of if isinstance(configuration, Basis) else core_of
    entry = json.loads(json.dumps(as_entry(configuration)))
    assert read(entry) == configuration
    assert hash(read(entry)) == hash(configuration)
    assert read(configuration) is configuration
    assert read(configuration.name) == type(configuration)() == read(type(configuration))
    with pytest.raises(dataclasses.FrozenInstanceError):
        configuration.name = "other"
    with pytest.raises(surgery.VariantError, match=rf"{configuration.kind} '{configuration.name}' has no .* nonsense"):
        read(entry | {"nonsense": 1})
    for wrong in (3, None, ["svd"], {"name": 3}, {}):
        with pytest.raises(surgery.VariantError, match=f"{configuration.kind} must be a name"):
            read(wrong)
    with pytest.raises(surgery.VariantError, match=f"unknown {configuration.kind} 'nonsense'"):
        read("nonsense")
    for field in dataclasses.fields(configuration):
        if isinstance(getattr(configuration, field.name), bool):
            with pytest.raises(surgery.VariantError, match=f"{field.name} must be True or False"):
                dataclasses.replace(configuration, **{field.name: 1})


@each_basis
@pytest.mark.parametrize("shape", [(D_OUT, D_IN), (D_IN, D_OUT), (7, 7), (1, 5)])
def test_the_factors_are_what_the_basis_says(basis, shape):
    weight = some(*shape, seed=3)
    assert basis.statistic in KINDS
    for r in sorted({1, min(3, *shape), min(shape)}):
        once, again = (basis.factorise(weight, r, statistic_of(basis, weight), 0) for _ in range(2))
        U, S, Vh = (getattr(once, name).to(F64) for name in ("U", "S", "Vh"))
        assert all(torch.equal(getattr(once, name), getattr(again, name)) for name in ("U", "S", "Vh"))
        assert (U.shape, S.shape, Vh.shape) == ((shape[0], r), (r,), (r, shape[1]))
        assert all(torch.isfinite(t).all() for t in (U, S, Vh, *once.core.values()))
        assert (S >= 0).all()
        assert (S.diff() <= 0).all()
        if "orthonormal U" in basis.gives:
            assert_close(U.T @ U, torch.eye(r, dtype=F64))
            assert_close(S[:, None] * Vh, U.T @ weight)
        if "orthonormal Vh" in basis.gives:
            assert_close(Vh @ Vh.T, torch.eye(r, dtype=F64))
        assert ("direction" in once.core) == ("contrast data" in basis.gives)


@each_basis
def test_a_basis_without_data_has_factors_or_says_what_it_needs(basis):
    weight, config = some(D_OUT, D_IN, seed=3), dataclasses.replace(surgery.AntiPaSTO(r=3), basis=basis)
    assert config.needs_calibration == basis.needs_calibration
    assert config.statistic == basis.statistic
    if basis.needs_calibration:
        with pytest.raises(surgery.VariantError, match="calibration"):
            basis.factorise(weight, 3, None, 0)
        with pytest.raises(surgery.VariantError, match="needs data to choose its factors by"):
            surgery.apply_surgery(plain(), config, progress=False)
    else:
        assert basis.factorise(weight, 3, None, 0).S.shape == (3,)


@each_core
def test_gradients_are_those_of_finite_differences(core):
    r = core.rank(R)
    S = torch.linspace(3, 0.4, r, dtype=F64)
    tensors = core.init_core(r, torch.Generator().manual_seed(0))
    assert set(core.frozen) <= set(tensors)
    names = list(tensors)
    values = [some(*tensors[name].shape, seed=i) * 0.6 for i, name in enumerate(names)]
    values = [v.abs() / v.abs().max() * 0.9 if n == "alpha" else v for n, v in zip(names, values, strict=True)]

    def delta(h: torch.Tensor, coeff: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
        return core.delta(h, S, SimpleNamespace(**dict(zip(names, held, strict=True))), coeff)

    free = [v.clone().requires_grad_(name not in core.frozen) for name, v in zip(names, values, strict=True)]
    coeff, h = torch.tensor(0.6, dtype=F64, requires_grad=True), some(3, r, seed=9).requires_grad_(True)
    assert torch.autograd.gradcheck(delta, (h, coeff, *free))
    prepared = core.prepare(SimpleNamespace(**dict(zip(names, values, strict=True))))
    assert core.prepares or not prepared
    held = SimpleNamespace(**dict(zip(names, values, strict=True)), **prepared)
    assert_close(core.delta(h, S, held, coeff).detach(), delta(h, coeff, *values).detach())


@each_core
def test_a_function_of_sh_is_one(core):
    r, other = core.rank(R), torch.tensor([2.0, 0.5, 3.0, 1.5, 0.25], dtype=F64)
    tensors = core.init_core(r, torch.Generator().manual_seed(0))
    held = SimpleNamespace(**{name: some(*t.shape, seed=i) * 0.6 for i, (name, t) in enumerate(tensors.items())})
    h, S, one = some(3, r, seed=9), torch.linspace(3, 0.4, r, dtype=F64), torch.ones((), dtype=F64)
    same = torch.allclose(core.delta(h, S, held, one), core.delta(h * other[:r], S / other[:r], held, one))
    assert same == core.depends_only_on_Sh


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


@each_pair
def test_the_signs_of_pairs_of_directions_change_no_output(basis, core):
    model = operated(basis, core)
    r = surgery.sites(model)["0"].factors.rank
    signs = torch.tensor([1.0, -1, -1, 1, -1], dtype=F64)[:r]
    for far in (False, True):
        model = moved(model) if far else model
        twin = copy.deepcopy(model)
        site, tensors = surgery.sites(twin)["0"], surgery.sites(twin)["0"].core.tensors()
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
        surgery.refresh(twin)
        assert_close(twin(inputs()).detach(), model(inputs()).detach())


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
    assert BasisCore(core="cosine").basis_config.gives >= {"contrast data"}
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
    with pytest.raises(surgery.VariantError, match=r"core 'cosine' needs contrast data.*use basis='contrast'"):
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


@pytest.mark.parametrize("variant", ["antipasto", "antipasto_rot", "antipasto_ablate", "corda+dplr"])
def test_another_basis_goes_through_every_verb(variant, tmp_path):
    basis, x = CorDA(cov_eps=1e-2), inputs(torch.float32)
    model = surgery.apply_surgery(
        plain(torch.float32), variant, r=4, basis=basis, calibration=data_of(basis, torch.float32), progress=False,
        target_modules="all-linear",
    )  # fmt: skip
    expected = surgery.set_coeff(moved(model), 0.5)(x).detach()
    config = json.loads((surgery.save_adapter(model, tmp_path / "a") / "adapter_config.json").read_text())
    assert config["hyperparameters"]["basis"] == as_entry(basis)
    assert variant_from_dict(config["variant"], config["hyperparameters"]).basis_config == basis
    twin = copy.deepcopy(model)
    graph = surgery.to_graph(copy.deepcopy(model), x)
    assert_close(graph(x).detach(), expected)
    assert_close(surgery.fold(graph, freeze_core=True)(x).detach(), expected)
    with pytest.raises(surgery.AdapterError, match="chooses its factors by data"):
        surgery.save_adapter(model, tmp_path / "b", factors="recompute")
    assert_close(surgery.merge(twin)(x).detach(), expected)
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
