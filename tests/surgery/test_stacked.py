"""Stacks of matrices in one weight: every expert has factors and a core of its own, and the weight is what changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import surgery
from surgery import inspect_sites, load_adapter, merge, report, save_adapter, set_coeff, sites, to_graph, undo_surgery
from surgery.modules.adapter import Adapter
from surgery.variants import REGISTRY
from tests.support.adapter_files import configuration, edit_config
from tests.support.expert_models import BUILD, EXPERTS, IDS, build, operated
from tests.support.model_state import state_of
from tests.support.tolerance import assert_close

LINEAR = [name for name, variant in REGISTRY.items() if variant.linear and not variant(r=4).needs_calibration]


LAYOUTS = {"mixtral": "out_in", "qwen3_moe": "out_in", "gpt_oss": "in_out"}
each_model = pytest.mark.parametrize("name", BUILD)
every_variant = pytest.mark.parametrize(
    ("name", "variant"),
    [("mixtral", v) for v in LINEAR] + [("qwen3_moe", "antipasto_rot"), ("gpt_oss", "antipasto_rot")],
)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=IDS)
    return out.logits if hasattr(out, "logits") else out[0]


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in sites(model).values():
            for parameter in site.core.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def reference_weight(site: Adapter) -> torch.Tensor:
    """``W + U D^T Vh``, matrix by matrix, in float64."""
    stack, d_out, d_in = site.factors.shape
    weight = site.weight.detach().double()
    if site.layout == "out_in":
        weight = weight.reshape(stack, d_out, d_in).clone()
    else:
        weight = weight.reshape(stack, d_in, d_out).mT.clone()
    coeff = site.steering.coeff.double()
    for e in range(stack):
        U, S, Vh = (factor[e].double() for factor in (site.factors.U, site.factors.S, site.factors.Vh))
        core = type("Core", (), {n: p[e].detach().double() for n, p in site.core.tensors().items()})
        weight[e] += U @ site.variant.delta(torch.eye(len(S)).double(), S, core, coeff).T @ Vh
    weight = weight if site.layout == "out_in" else weight.mT
    return weight.reshape(site.weight.shape)


def with_reference_weights(model: nn.Module, plain: nn.Module) -> nn.Module:
    """A plain model in float64 whose weights are those that the sites of another should have."""
    plain.set_experts_implementation("eager")  # grouped products are not there in float64
    plain = plain.double()
    for key, site in sites(model).items():
        name = key if key in dict(plain.named_parameters()) else f"{key}.weight"
        with torch.no_grad():
            plain.get_parameter(name).copy_(reference_weight(site))
    return plain


@each_model
def test_every_expert_weight_is_a_site_of_its_own_orientation(name):
    found = {site.key: site for site in inspect_sites(build(name)).sites}
    for local in ("gate_up_proj", "down_proj"):
        site = found[f"{EXPERTS}.{local}"]
        rows = site.d_out if LAYOUTS[name] == "out_in" else site.d_in
        assert (site.layout, site.stack, site.operation) == (LAYOUTS[name], 4, "grouped_mm_fallback")
        assert build(name).get_parameter(site.weight).shape[1] == rows
        assert (site.d_in if local == "gate_up_proj" else site.d_out) == 16


@each_model
def test_factors_and_cores_are_batched_and_exact(name):
    model = operated(name, surgery.AntiPaSTODPLR(r=4, k=2))
    base = build(name)
    for key, site in sites(model).items():
        weight = base.get_parameter(key).detach().double()
        weight = weight if site.layout == "out_in" else weight.mT
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        assert site.factors.stack == 4
        assert_close(site.factors.S, S[:, :4].float())
        found = (site.factors.U * site.factors.S[:, None]) @ site.factors.Vh
        assert_close(found, ((U[..., :4] * S[:, None, :4]) @ Vh[:, :4]).float())
        assert tuple(site.core.g.shape) == (4, 4)
        assert tuple(site.core.a.shape) == (4, 2, 4)
        assert len({tuple(a.flatten().tolist()) for a in site.core.a}) == 4, "random numbers of its own for each"
        assert site.delta_weight().shape == site.weight.shape
        assert site.host.name == "weight"


@every_variant
def test_against_the_reference_in_place_and_back(name, variant, tmp_path):
    model, before = build(name), build(name)
    state = state_of(model)
    surgery.apply_surgery(model, variant, r=4, target_modules=["gate_up_proj", "down_proj"], progress=False)
    set_coeff(model, 0.0)
    assert torch.equal(logits(trained(model)), logits(before)), "coeff = 0 is the base"
    set_coeff(model, 1.0)
    live = logits(model)
    expected = logits(with_reference_weights(model, build(name)))
    assert (live - logits(before)).abs().max() > 1e-3
    assert_close(live, expected)
    loaded = load_adapter(build(name), save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(logits(loaded), live)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), live)
    assert_close(logits(merge(copied)), expected)
    assert not parametrize.is_parametrized(copied.get_submodule(EXPERTS))
    undo_surgery(model)
    assert state_of(model) == state
    assert torch.equal(logits(model), logits(before))


@every_variant
def test_against_the_reference_in_a_graph(name, variant, tmp_path):
    model = trained(operated(name, variant))
    expected = logits(with_reference_weights(model, build(name)))
    graph = to_graph(model, {"input_ids": IDS})
    assert {node.host.name for node in sites(graph).values()} == {"weight"}
    assert not any("vmap" in str(node.target) or "functorch" in str(node.target) for node in graph.graph.nodes)
    assert_close(logits(graph), expected)
    loaded = load_adapter(build(name), save_adapter(graph, tmp_path / "adapter"))
    assert_close(logits(loaded), expected)
    assert_close(logits(merge(graph)), expected)


def test_a_graph_resolve_model_its_own():
    program = torch.export.export(Bare(), (torch.randn(3, 5, 4),))
    graph = program.module()
    x = torch.randn(3, 5, 4)
    base = graph(x).detach()
    surgery.apply_surgery(graph, "antipasto", r=3, progress=False)
    assert torch.equal(graph(x), base)
    trained(graph)
    site = sites(graph)["w"]
    assert_close(graph(x).detach(), torch.bmm(x.double(), reference_weight(site)).float())
    graph(x).square().sum().backward()
    assert site.core.g.grad.abs().min() > 0
    undo_surgery(graph)
    assert torch.equal(graph(x), base)


class Bare(nn.Module):
    """A stack of matrices, each for one of the rows of the input."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(shape or (3, 4, 6), generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.w)


def test_compiled_and_exported_in_place():
    model, x = trained(operated_bare()), torch.randn(3, 5, 4)
    expected = torch.bmm(x.double(), reference_weight(sites(model)["w"])).float()
    compiled = torch.compile(model, fullgraph=True)
    assert_close(compiled(x).detach(), expected)
    program = torch.export.export(model, (x,)).run_decompositions()
    assert_close(program.module()(x).detach(), expected)
    set_coeff(model, 0.3)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = compiled(x).detach()
    assert_close(found, torch.bmm(x.double(), reference_weight(sites(model)["w"])).float())


def operated_bare() -> nn.Module:
    model = Bare()
    surgery.apply_surgery(model, "antipasto_rot", r=4, example_inputs=(torch.randn(3, 5, 4),), progress=False)
    return model


@each_model
def test_gradients_reach_every_core_that_is_used(name):
    model = operated(name)
    loss = model(input_ids=IDS).logits.square().sum()
    loss.backward()
    for site in sites(model).values():
        assert site.core.g.grad.abs().sum(-1).gt(0).any()
        assert site.weight.grad is None
    graph = to_graph(model, {"input_ids": IDS})
    for node in sites(graph).values():
        node.core.g.grad = None
    out = graph(input_ids=IDS)
    (out.logits if hasattr(out, "logits") else out[0]).square().sum().backward()
    for site, node in zip(sites(model).values(), sites(graph).values(), strict=True):
        assert node.core.g.grad.abs().sum() > 0
        assert site.core.g is node.core.g


def test_generate_and_report():
    model = trained(operated("mixtral"))
    mask = torch.ones_like(IDS)
    found = model.generate(IDS, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    merged = merge(copy.deepcopy(model))
    expected = merged.generate(IDS, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)
    rows = {row.key: row for row in report(model).sites}
    row = rows[f"{EXPERTS}.gate_up_proj"]
    assert (row.stack, row.d_out, row.d_in, row.r, row.trainable, row.host) == (4, 48, 16, 4, 16, "weight")
    assert "4x48x16" in str(report(model))


def test_rows_are_refused_and_so_is_what_is_not_linear():
    model = operated("mixtral")
    with pytest.raises(surgery.InputError, match="gate_up_proj' is read as a weight"):
        set_coeff(model, torch.ones(2))
    with pytest.raises(surgery.VariantError, match=r"experts\.gate_up_proj'.*not linear"):
        operated("mixtral", "sspace", calibration=surgery.Contrast([{"input_ids": IDS}], [{"input_ids": IDS}]))


def test_data_that_must_be_seen_is_refused_by_name_and_left_out_of_a_group():
    model, data = build("mixtral"), [{"input_ids": torch.randint(0, 32, (4, 16))}]
    before = state_of(model)
    options: dict[str, Any] = {"r": 4, "calibration": data, "progress": False}
    with pytest.raises(surgery.VariantError, match=r"experts\.gate_up_proj'.*each matrix of a stack"):
        surgery.apply_surgery(model, "antipasto_corda", target_modules=["gate_up_proj", "q_proj"], **options)
    assert state_of(model) == before
    with pytest.warns(UserWarning, match="left alone"):
        surgery.apply_surgery(model, "antipasto_corda", **options)
    assert not [key for key in sites(model) if "experts" in key]


def test_data_that_may_be_seen_is_not_asked_of_a_stack():
    model, data = build("mixtral"), [{"input_ids": torch.randint(0, 32, (4, 16))}]
    targets = ["gate_up_proj", "q_proj"]
    with pytest.warns(UserWarning, match=r"experts\.gate_up_proj'.*is not calibrated"):
        surgery.apply_surgery(model, "antipasto", r=4, target_modules=targets, calibration=data, progress=False)
    plain = sites(operated("mixtral"))[f"{EXPERTS}.gate_up_proj"]
    assert torch.equal(sites(model)[f"{EXPERTS}.gate_up_proj"].factors.U, plain.factors.U)
    tokens = {row.key: row.tokens for row in report(model).sites}
    assert tokens[f"{EXPERTS}.gate_up_proj"] is None
    assert tokens["model.layers.0.self_attn.q_proj"] == 64
    trained(model)
    with pytest.warns(UserWarning, match="is not calibrated"):
        surgery.recalibrate(model, data, reset=True, progress=False)
    assert sites(model)[f"{EXPERTS}.gate_up_proj"].core.g.abs().max() == 0


def test_a_file_of_another_stack_is_refused(tmp_path):
    path = save_adapter(operated("mixtral"), tmp_path / "adapter")
    assert configuration(path)["sites"][f"{EXPERTS}.gate_up_proj"]["shape"] == [4, 48, 16]
    for shape in ([4, 48, 8], [2, 48, 16], [4, 16, 48], [48, 16], [4, 48, 16, 1], [4.0, 48, 16], [-4, -48, 16]):
        edit_config(path, lambda config: config["sites"][f"{EXPERTS}.gate_up_proj"].update(shape=shape))  # noqa: B023
        model = build("mixtral")
        before = state_of(model)
        with pytest.raises(surgery.AdapterError, match="gate_up_proj"):
            load_adapter(model, path)
        assert state_of(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_rounded_once(dtype):
    model = Bare().to(dtype)
    x = torch.randn(3, 5, 4, dtype=dtype)
    surgery.apply_surgery(model, "antipasto", r=3, example_inputs=(x,), progress=False)
    trained(model)
    site = sites(model)["w"]
    assert site.core.g.dtype == torch.float32
    assert_close(model.w.detach(), reference_weight(site).to(dtype), rounded=True)
