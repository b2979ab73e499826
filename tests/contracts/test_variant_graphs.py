"""Every variant in a graph computes what an independent reference in float64 does."""

from __future__ import annotations

import copy

import pytest
import torch

import surgery
from surgery import fold, merge, set_coeff, sites
from tests.support.reference import reference_delta_weight
from tests.support.tolerance import assert_close
from tests.support.variant_models import (
    COEFFS,
    DTYPES,
    FORMS,
    LINEAR,
    NAMES,
    SHAPES,
    TOGETHER,
    all_shapes,
    batch,
    captured_outputs,
    check_model,
    check_output,
    each_graph,
    each_linear_graph,
    everything,
    in_place,
    plain,
    some,
    symbolic,
)


def graph_case(name: str) -> tuple[str, torch.dtype]:
    """A form and a dtype for a configuration: every pair of them has several."""
    index = int(name[:2])
    return FORMS[index % 2], DTYPES[index // 2 % 4]


@each_graph
def test_surgery_on_a_graph(name):
    form, dtype = graph_case(name)
    model, base = symbolic(name, form, dtype), plain(SHAPES, dtype)(batch(dtype))
    held = dict(sites(model))
    assert all(site.form == form for site in held.values())
    for folded in (False, True):
        if folded:
            fold(model)
        for coeff in COEFFS:
            check_model(set_coeff(model, torch.tensor(coeff, dtype=torch.float64), rows="repeat"), held, dtype, coeff)
        if folded or form == "delta":
            for coeff in (0.0, torch.zeros(4)):
                assert torch.equal(set_coeff(model, coeff, rows="repeat")(batch(dtype)), base)


@each_linear_graph
def test_a_graph_that_is_folded_whole_or_merged(name):
    form, dtype = graph_case(name)
    model = set_coeff(symbolic(name, form, dtype), 0.5)
    other, held = copy.deepcopy(model), dict(sites(copy.deepcopy(model)))
    weights = {key: site.weight.to(torch.float64) + reference_delta_weight(site, 0.5) for key, site in held.items()}
    for done in (fold(model, freeze_core=True), merge(other)):
        assert not sites(done)
        for key, weight in weights.items():
            assert_close(getattr(done, key).weight, weight, rounded=True)
        check_model(done, held, dtype, 0.5)


CAPTURED = [("delta", torch.float32), ("residual", torch.bfloat16)]


@pytest.mark.matrix
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("form", "dtype"), CAPTURED)
@pytest.mark.parametrize("name", TOGETHER)
def test_the_graph_of_a_model(name, form, dtype, folded):
    site = sites(everything(dtype))[f"site_{name}"]
    for coeff, outputs in captured_outputs(form, dtype, folded):
        check_output(outputs[name], site, batch(dtype), coeff)


@pytest.mark.parametrize("name", [name for name, config in NAMES.items() if not config.linear])
def test_what_is_not_linear_has_no_weight(name):
    graphs = [symbolic(name, form) for form in FORMS]
    for site in (*sites(in_place(name)).values(), *sites(graphs[0]).values()):
        with pytest.raises(surgery.VariantError, match="not linear in its input"):
            site.delta_weight()
    for model in (in_place(name), *graphs):
        expected = model(batch(torch.float32))
        with pytest.raises(surgery.VariantError, match=r"site 'square'.* is not linear in its input"):
            merge(model)
        assert torch.equal(model(batch(torch.float32)), expected)
    for model in graphs:
        held = dict(sites(model))
        with pytest.raises(surgery.VariantError, match=r"site 'square'.* is not linear in its input"):
            fold(model, freeze_core=True)
        assert dict(sites(model)) == held
        check_model(model, held, torch.float32, 1.0)
        fold(model, freeze_core=True, freeze_coeff=False)
        for coeff in COEFFS:
            check_model(
                set_coeff(model, torch.tensor(coeff, dtype=torch.float64), rows="repeat"), held, torch.float32, coeff
            )


@pytest.mark.parametrize("folded", [False, True])
def test_captured_graphs_at_coeff_zero_bit_for_bit(folded):
    dtype = torch.float32
    base = plain(all_shapes(), dtype)(batch(dtype)).split([d_out for _, d_out, _ in all_shapes().values()], dim=-1)
    outputs = captured_outputs("delta", dtype, folded)[COEFFS.index(0.0)][1]
    different = [name for name, y in zip(TOGETHER, base, strict=True) if not torch.equal(outputs[name], y)]
    assert not different


def test_the_whole_compiler():
    model = set_coeff(copy.deepcopy(everything(torch.float32)), 0.5)
    linear = [name for name in TOGETHER if name in LINEAR]
    keys = [f"site_{name}" for name in linear]
    done = surgery.pipeline(model, some(4, 3, 16).float(), form="residual", only=keys).graph
    assert not sites(done)
    sizes = [d_out for _, d_out, _ in all_shapes().values()]
    for name, y in zip(TOGETHER, done(batch(torch.float32)).split(sizes, dim=-1), strict=True):
        check_output(y.detach(), sites(model)[f"site_{name}"], batch(torch.float32), 0.5 * (name in linear))
