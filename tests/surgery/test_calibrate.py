"""Calibration: it collects what the intact model computes, shares what it can, and changes nothing of the model."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import surgery
from surgery import Contrast, apply_surgery, calibrate, inspect_sites, sites, to_graph, undo_surgery
from tests.support.calibration_inputs import F64, check_moment, padded, quietly, text
from tests.support.hooked_inputs import hooked
from tests.support.injected_failures import refused
from tests.support.model_state import state_of
from tests.support.tolerance import assert_close
from tests.support.zoo import small_model


@pytest.mark.parametrize("form", ["dict", "tuple", "list", "tensors", "loader", "generator", "one"])
def test_forms_of_data(form):
    ids, mask = text(4, 6), padded("right", 3, 6).repeat(2, 1)[:4]
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(2), mask.split(2), strict=True)]
    expected = quietly(small_model("bert").model, batches)
    data = {
        "dict": batches,
        "tuple": [tuple(batch.values()) for batch in batches],
        "list": [list(batch.values()) for batch in batches],
        "tensors": list(ids.split(2)),
        "loader": DataLoader(TensorDataset(ids, mask), batch_size=2),
        "generator": (batch for batch in batches),
        "one": {"input_ids": ids, "attention_mask": mask},
    }[form]
    if form == "tensors":
        expected = quietly(small_model("bert").model, [{"input_ids": i} for i in ids.split(2)])
    found = quietly(small_model("bert").model, data)
    for key, statistic in expected.sites.items():
        assert found.sites[key].counts == statistic.counts
        assert_close(found.sites[key].mean("moment"), statistic.mean("moment"), torch.float32)


@settings(max_examples=8)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans())
def test_any_split_into_batches_read_once(sizes, once):
    x = torch.randn(sum(sizes), 12, generator=torch.Generator().manual_seed(0))
    model = small_model("mlp").model
    parts = iter(x.split(sizes)) if once else list(x.split(sizes))
    found = quietly(model, parts, r=1)
    check_moment(model, "0", found.sites["0"], x)


def test_sites_that_read_the_same_input_share_where_it_is_smaller():
    found = quietly(small_model("qwen3").model, [{"input_ids": text()}]).sites
    q, k, v, o = (found[f"model.layers.0.self_attn.{name}_proj"] for name in "qkvo")
    assert q is k is v
    assert q is not o
    assert q.side == "input"  # 32 * 32 entries, where the outputs have 32 * 32 + 2 * 16 * 16
    assert found["model.layers.0.mlp.down_proj"].side == "output"  # 48 to 32
    absolute = quietly(small_model("qwen3").model, [{"input_ids": text()}], surgery.AntiPaSTO(pool="mean_abs")).sites
    assert len({id(statistic) for statistic in absolute.values()}) == len(absolute)
    squares = quietly(small_model("qwen3").model, [{"input_ids": text()}], "antipasto_asvd").sites
    assert squares["model.layers.0.mlp.up_proj"] is squares["model.layers.0.mlp.gate_proj"]


@pytest.mark.parametrize("variant", ["antipasto", surgery.AntiPaSTO(pool="mean_abs"), "antipasto_asvd", "sspace"])
def test_memory_does_not_depend_on_the_number_of_tokens(variant):
    few, many = ([{"input_ids": text(seed=i)} for i in range(n)] for n in (1, 10))
    pair = (Contrast(few, few[:1]), Contrast(many, few)) if variant == "sspace" else (few, many)
    found = [quietly(small_model("gpt2").model, data, variant) for data in pair]
    assert found[0].bytes == found[1].bytes > 0
    assert all(statistic.weight is None for part in found for statistic in part.distinct)


class Changing(nn.Module):
    """A model whose forward writes to buffers and attributes, drops out, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.norm, self.drop = nn.Linear(6, 5), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.last: Any = None
        self.norm.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        self.last = x
        random.random()
        return self.l(self.drop(self.norm(x))) + 0 * torch.rand(())


SEEN: list[Any] = []  # of the module: what a hook's closure holds is put back


def test_no_activation_is_held_after_its_batch():
    gc.disable()  # what waits for a collection to be freed would add up over batches
    try:
        SEEN.clear()
        model = nn.Sequential(nn.Linear(8, 400), nn.ReLU(), nn.Linear(400, 500))
        model[2].register_forward_pre_hook(lambda module, args: SEEN.append(weakref.ref(args[0])))

        def batches():
            for _ in range(3):
                assert [ref() for ref in SEEN] == [None] * len(SEEN)
                yield torch.randn(4, 8)

        calibrate(model, "antipasto_corda", batches(), r=4, progress=False)
        assert len(SEEN) >= 3
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_numbers_are_left_alone(training, loader):
    model = Changing().train(training)
    model.norm.eval()
    model.l.bias.requires_grad_(False)
    x = torch.randn(20, 6)
    data = DataLoader(TensorDataset(x), batch_size=5, shuffle=True) if loader else [x[:7], x[7:]]
    fast = torch.backends.mha.get_fastpath_enabled()
    before, numbers, python = state_of(model), torch.get_rng_state(), random.getstate()
    found = quietly(model, data)
    assert state_of(model) == before
    assert model.last is None
    assert torch.equal(torch.get_rng_state(), numbers)
    assert random.getstate() == python
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    check_moment(model, "l", found.sites["l"], x / (1 + model.norm.eps) ** 0.5, torch.float32)
    apply_surgery(model, "antipasto", r=4, calibration=data, progress=False)
    assert torch.equal(torch.get_rng_state(), numbers)
    undo_surgery(model)
    assert state_of(model) == before


def test_the_intact_model_is_seen_though_other_sites_are_operated_on():
    model, x = small_model("mlp").model, torch.randn(30, 12)
    expected = quietly(model, [x], target_modules=["2", "4"])
    apply_surgery(model, "antipasto", r=6, target_modules=["0"], progress=False)
    with torch.no_grad():
        sites(model)["0"].core.g.normal_()
    surgery.set_coeff(model, torch.ones(30))
    before = state_of(model)
    graph = to_graph(model, x)
    for operated in (model, graph):
        found = quietly(operated, [x], target_modules=["2", "4"])
        for key in ("2", "4"):
            assert_close(found.sites[key].mean("moment"), expected.sites[key].mean("moment"), torch.float32)
    assert state_of(model) == before


X = torch.randn(30, 12)
BAD: list[tuple[str, Any, dict[str, Any]]] = [
    ("gave no batch", [], {}),
    ("gave no batch", iter(()), {}),
    ("must be an iterable of batches", 3, {}),
    ("must be an iterable of batches", "text", {}),
    ("site '0': calibration showed it 3 tokens, fewer than its rank 4", [X[:3]], {}),
    ("site '0': its input is not finite on calibration batch 1", [X, X * float("nan")], {}),
    ("does not run on calibration batch 1", [X, X[:, :5]], {}),
    ("must be an iterable of batches for this variant, found Contrast", Contrast([X], [X + 1]), {}),
    ("must be Contrast(positive, negative) for this variant, found list", [X], {"variant": "sspace"}),
    ("negative gave no batch", Contrast([X], []), {"variant": "sspace"}),
    ("have the same mean input", Contrast([X], [X.clone()]), {"variant": "sspace"}),
    ("antipasto_corda needs data", None, {"variant": "antipasto_corda"}),
    ("antipasto_asvd needs data", None, {"variant": "antipasto_asvd"}),
    ("sspace needs data", None, {"variant": "sspace"}),
    ("antipasto_ablate needs data", None, {"variant": surgery.AntiPaSTOAblate(cov_orient=True)}),
]


@pytest.mark.parametrize(("message", "data", "options"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_refused(message, data, options):
    options = {"r": 4, "target_modules": "all-linear", **options}
    assert message in refused(small_model("mlp").model, calibration=data, **options)


def test_a_generator_that_was_read_is_said_to_be_so():
    data = iter([X])
    quietly(small_model("mlp").model, data)
    assert "has been read already" in refused(small_model("mlp").model, calibration=data, r=4)


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_data_that_fails(error, call):
    def data() -> Any:
        for i in range(3):
            if i == call:
                raise error("injected")
            yield X

    model = small_model("mlp").model.train()
    assert refused(model, error, calibration=data(), r=4) == "injected"
    assert all(module.training for module in model.modules())


def test_pool_of_a_wrong_name():
    with pytest.raises(surgery.InputError, match="'last', 'mean' or 'all'"):
        Contrast([X], [X], pool="first")


class Branches(nn.Module):
    """A module that one kind of data never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) if len(x) < 20 else self.a(x)


def test_a_site_that_the_data_never_reaches_is_named():
    message = refused(Branches(), calibration=[X], example_inputs=X[:5], r=4)
    assert "site 'b': the calibration data never reaches it; leave it out with exclude_modules" in message
    contrast = Contrast([X[:5]], [X + 1])
    message = refused(Branches(), calibration=contrast, variant="sspace", target_modules="all-linear", r=4)
    assert "site 'b': the negative set never reaches it" in message


def test_equal_means_in_another_order_have_no_direction():
    x = torch.randn(64, 12, dtype=F64)
    data = Contrast([x], [x.flip(0)])
    model = small_model("mlp", F64).model
    assert "have the same mean input" in refused(model, calibration=data, variant="sspace", target_modules=["0"], r=4)


@pytest.mark.parametrize("pool", ["rms", "mean_abs"])
@pytest.mark.parametrize("name", ["mlp", "raw", "gpt2", "encoder_layer"])
def test_antipasto_keeps_the_directions_that_carry_most(name, pool):
    found, r = small_model(name), 3
    model = found.model
    data = [{"input_ids": text(4, 9)}] if name == "gpt2" else [torch.randn(40, 12)]
    data = [torch.randn(6, 7, 16)] if name == "encoder_layer" else data
    table = {s.key: s for s in inspect_sites(model, data[0]).sites if not s.tied}
    linear = [key for key, s in table.items() if s.weight == f"{key}.weight" and "self_attn" not in key]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        inputs = hooked(model, linear, data[0])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    weights = {key: model.get_parameter(table[key].weight).detach().double().numpy().copy() for key in linear}
    apply_surgery(model, surgery.AntiPaSTO(pool=pool, r=r), calibration=data, example_inputs=data[0], progress=False)
    assert len(inputs) >= 2
    for key, xs in inputs.items():
        W = weights[key] if table[key].layout == "out_in" else weights[key].T
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        h = np.abs(torch.cat([x.flatten(0, -2) for x in xs]).double().numpy() @ Vh.T)
        score = S * (np.sqrt((h**2).mean(0)) if pool == "rms" else h.mean(0))
        i = np.sort(np.argsort(-score, kind="stable")[:r])
        factors = sites(model)[key].factors
        assert_close(factors.S, torch.from_numpy(S[i]), torch.float32)
        top = (factors.U * factors.S).double() @ factors.Vh.double()
        assert_close(top, torch.from_numpy(U[:, i] * S[i] @ Vh[i]), torch.float32)
