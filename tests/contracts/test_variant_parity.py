"""Every variant in place computes what an independent reference in float64 does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import fx, nn

from surgery import load_adapter, merge, save_adapter, set_coeff, sites
from surgery.cores import REGISTRY as CORES
from surgery.variants import REGISTRY
from tests.support.reference import DELTAS, reference_delta_weight, reference_output, reference_term
from tests.support.tolerance import assert_close
from tests.support.variant_models import (
    CHOSEN,
    COEFFS,
    CONFIGS,
    DTYPES,
    FIRST,
    HALF,
    NAMES,
    SHAPES,
    batch,
    check_model,
    each,
    each_dtype,
    each_linear,
    in_place,
    plain,
    some,
)


def test_every_registered_variant_has_a_case_and_every_formula_a_core():
    assert {config.name for config in CONFIGS} == set(REGISTRY)
    assert set(DELTAS) <= set(CORES)
    assert {config.core_config.name for config in CHOSEN} == set(DELTAS)


@each
def test_sites_of_every_shape(name):
    model, config = in_place(name), NAMES[name]
    assert list(sites(model)) == list(SHAPES)
    for key, site in sites(model).items():
        d_in, d_out, bias = SHAPES[key]
        r = config.rank(min(8, d_in, d_out))
        assert [tuple(f.shape) for f in (site.factors.U, site.factors.S, site.factors.Vh)] == [
            (d_out, r),
            (r,),
            (r, d_in),
        ]
        assert (site.bias is not None) == bias
    assert len(sites(model)["full"].factors.S) in (4, 3, 5)


@pytest.mark.matrix
@each_dtype
@each
def test_forward_in_place(name, dtype):
    model = in_place(name, dtype)
    for coeff in COEFFS:
        set_coeff(model, torch.tensor(coeff, dtype=torch.float64), rows="repeat")  # several rows for each
        model(batch(dtype))  # where the rows lie is measured in a call of the whole
        for site in sites(model).values():
            x = batch(dtype)[..., : site.factors.Vh.shape[1]]
            y, term = site.host.owner(x).detach(), site.adapter_term(x).detach()  # with gradients enabled
            assert y.dtype == dtype
            assert_close(y, reference_output(site, x, np.array(coeff)))
            assert_close(term, reference_term(site, x, np.array(coeff)))
            with torch.no_grad():
                assert_close(site.adapter_term(x), reference_term(site, x, np.array(coeff)))
            if not np.shape(coeff) and dtype not in HALF:  # roundings of one vector may have a common direction
                assert_close(site.adapter_term(x[0, 0]).detach(), reference_term(site, x[0, 0], coeff))


@given(st.integers(0, len(CONFIGS) - 1), st.floats(-3, 3), st.floats(0.01, 3), st.integers(0, 2**16))
@example(0, -1.0, 3.0, 0)
def test_any_core_and_coeff(index, coeff, scale, seed):
    name = list(NAMES)[index]
    model = in_place(name, torch.float64)
    for site in sites(model).values():
        with torch.no_grad():
            for i, parameter in enumerate(site.core.parameters()):
                parameter.copy_(scale * some(*parameter.shape, seed=seed + i))
        set_coeff(model, torch.tensor(coeff, dtype=torch.float64))
        x = some(3, site.factors.Vh.shape[1], seed=seed)
        assert_close(site.host.owner(x).detach(), reference_output(site, x, coeff))


@pytest.mark.matrix
@each_dtype
@each_linear
def test_delta_weight_and_merge(name, dtype):
    for coeff in (-1.0, 0.5):
        model = set_coeff(in_place(name, dtype), coeff)
        expected = {}
        for key, site in sites(model).items():
            change = reference_delta_weight(site, coeff)
            assert_close(site.delta_weight().detach(), change)
            expected[key] = site.weight.to(torch.float64) + change
        held = dict(sites(model))
        biases = {key: None if site.bias is None else site.bias.clone() for key, site in held.items()}
        assert merge(model) is model
        assert not sites(model)
        for key, weight in expected.items():
            module = getattr(model, key)
            assert type(module) is nn.Linear
            assert module.weight.dtype == dtype
            assert_close(module.weight, weight, rounded=True)
            assert biases[key] is None or torch.equal(module.bias, biases[key])


@each
def test_a_saved_adapter_is_the_same_bit_for_bit(name, tmp_path):
    for i, dtype in enumerate(dict.fromkeys((torch.float32, DTYPES[int(name[:2]) % 4]))):
        model, fresh = in_place(name, dtype), plain(SHAPES, dtype)
        load_adapter(fresh, save_adapter(model, tmp_path / str(i)))
        for key, site in sites(fresh).items():
            other = sites(model)[key]
            assert site.variant == other.variant
            tensors = [*other.core.tensors().items(), *other.factors.named_buffers()]
            loaded = dict([*site.core.tensors().items(), *site.factors.named_buffers()])
            for tensor_name, tensor in tensors:
                assert loaded[tensor_name].dtype == tensor.dtype
                assert torch.equal(loaded[tensor_name], tensor)
        with torch.no_grad():
            assert torch.equal(fresh(batch(dtype)), model(batch(dtype)))
    if name in FIRST.values():
        graph = load_adapter(fx.symbolic_trace(plain(SHAPES, dtype)), tmp_path / str(i))
        check_model(graph, dict(sites(graph)), dtype, 1.0)


@each
def test_identity_at_coeff_zero_bit_for_bit(name):
    for dtype in DTYPES:
        base = plain(SHAPES, dtype)(batch(dtype))
        model = in_place(name, dtype)
        for coeff in (0.0, torch.zeros(4)):
            set_coeff(model, coeff, rows="repeat")
            assert torch.equal(model(batch(dtype)), base)
            with torch.no_grad():
                assert torch.equal(model(batch(dtype)), base)


def test_a_coeff_is_not_rounded_below_the_dtype_of_the_core():
    model = set_coeff(in_place(FIRST["antipasto"], torch.float64), 0.1)
    for site in sites(model).values():
        x = batch(torch.float64)[..., : site.factors.Vh.shape[1]]
        assert_close(site.host.owner(x).detach(), reference_output(site, x, 0.1))
