"""Lowerings: one function, several costs; a materialised weight that is never stale."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import surgery
from bench.common.runs import IN_PLACE
from passes.infra.tolerance import disagreement
from surgery import InputError, apply_surgery, load_adapter, merge, save_adapter, set_coeff, sites, undo_surgery
from surgery.lowerings import REGISTRY, Size, step
from surgery.lowerings._cost_model import cheapest, predicted
from surgery.variants import REGISTRY as VARIANTS
from tests.support.lowering_models import PLAIN, inputs, model_of, operated, possible, reference, shake

NAMES = sorted(REGISTRY)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", PLAIN)
@pytest.mark.parametrize("lowering", NAMES)
def test_every_lowering_is_the_same_function(lowering: str, variant: str, dtype: torch.dtype) -> None:
    if not possible(lowering, variant):
        with pytest.raises(InputError, match="site '0'"):
            operated(lowering, variant, dtype)
        return
    for bias in (True, False):
        model, x = operated(lowering, variant, dtype, bias=bias), inputs(dtype)
        for coeff in (1.0, -0.5, 0.0):
            set_coeff(model, coeff)
            expected = reference(model, x)
            assert (problem := disagreement(model(x), expected, dtype)) is None, problem
            with torch.no_grad():
                assert (problem := disagreement(model(x), expected, dtype)) is None, problem
        if REGISTRY[lowering].form == "residual":  # the base up to rounding
            continue
        plain = model_of(dtype, bias=bias).requires_grad_(False)
        assert torch.equal(model(x), plain(x))  # at coeff = 0
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))


def test_what_the_lowerings_say() -> None:
    assert {name for name, one in REGISTRY.items() if one.form == "residual"} == {"residual"}
    assert {"dense", "pair"} <= {name for name, one in REGISTRY.items() if one.caches}
    for variant, cls in VARIANTS.items():
        assert possible("lowrank", variant)
        assert possible("residual", variant)
        assert possible("output", variant) == cls.depends_only_on_Sh
        assert possible("dense", variant) == possible("pair", variant) == cls.linear


@pytest.mark.parametrize(("lowering", "variant"), [pair for pair in itertools.product(NAMES, PLAIN) if possible(*pair)])
def test_gradients_are_those_of_the_low_rank_form(lowering: str, variant: str) -> None:
    found = {}
    for name in (lowering, "lowrank"):
        model = operated(name, variant, torch.float64)
        x = inputs(torch.float64).requires_grad_()
        model(x).square().sum().backward()
        found[name] = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for a, b in zip(found[lowering], found["lowrank"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lowering", NAMES)
def test_a_row_has_a_coeff_of_its_own(lowering: str) -> None:
    model, x = operated(lowering), inputs()
    coeff = torch.linspace(-1, 1, len(x))
    set_coeff(model, coeff)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            together = model(x)
            for i, c in enumerate(coeff):
                set_coeff(model, float(c))
                assert disagreement(together[i], model(x[i : i + 1])[0], torch.float32) is None
            set_coeff(model, coeff)


@pytest.mark.parametrize("lowering", NAMES)
def test_half_precision_sums_in_the_core_dtype(lowering: str) -> None:
    model, x = operated(lowering, dtype=torch.float16), inputs(torch.float16)
    assert disagreement(model(x), reference(model, x), torch.float16) is None


@pytest.mark.parametrize("lowering", NAMES)
def test_conv1d_and_odd_inputs(lowering: str) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()
    tokens = torch.randint(0, 40, (2, 7))
    shake(apply_surgery(model, "antipasto", r=8, lowering=lowering, progress=False))
    by_lowrank = shake(apply_surgery(_plain_gpt2(), "antipasto", r=8, lowering="lowrank", progress=False))
    with torch.no_grad():
        assert disagreement(model(tokens).logits, by_lowrank(tokens).logits) is None
    small = operated(lowering)
    with torch.no_grad():
        assert small(torch.zeros(0, 24)).shape == (0, 16)
        assert small(torch.ones(24)).shape == (16,)
        wide = inputs().transpose(0, 1)
        assert disagreement(small(wide), small(wide.contiguous())) is None


def _plain_gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()


def test_two_coeffs_before_one_backward() -> None:
    grads = {}
    for name in ("dense", "lowrank"):
        model, x = operated(name, dtype=torch.float64), inputs(torch.float64).requires_grad_()
        set_coeff(model, 1.0)
        up = model(x)
        set_coeff(model, -1.0)
        down = model(x)
        (up - down).square().sum().backward()
        grads[name] = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    for a, b in zip(*grads.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_dense_never_forms_the_gradient_of_a_weight() -> None:
    flops = {}
    for name in ("dense", "lowrank"):
        model = apply_surgery(nn.Sequential(nn.Linear(64, 64)), "antipasto", r=16, lowering=name, progress=False)
        x = torch.randn(2048, 64, requires_grad=True)
        model(x).sum().backward()  # makes the weight
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        flops[name] = counter.get_total_flops()
    base, low_rank = 2 * 2 * 2048 * 64 * 64, 2 * 2048 * 64 * 16
    assert flops == {"dense": base + 2 * low_rank, "lowrank": base + 4 * low_rank}


def test_a_pair_is_two_low_rank_products_whatever_the_core() -> None:
    n, d, r = 32, 64, 16
    for variant in (name for name in PLAIN if possible("pair", name)):
        model = nn.Sequential(nn.Linear(d, d))
        apply_surgery(model, variant, r=r, target_modules="all-linear", lowering="pair", progress=False)
        shake(model)
        with torch.no_grad():
            model(torch.randn(n, d))  # makes the factor
            with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
                model(torch.randn(n, d))
        assert counter.get_total_flops() == 2 * n * d * d + 2 * (2 * n * d * r), variant


def test_a_trained_base_weight_is_in_the_product() -> None:
    model, x = operated("dense"), inputs()
    weight = sites(model)["0"].weight.requires_grad_()
    model(x).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_forced_and_measured_lowerings() -> None:
    model = operated("measure")
    for site in sites(model).values():
        assert site.lowering == "measure"
        assert all(name in REGISTRY for steps in site.schedule for _, name in steps)
        assert all("dense" not in dict(map(reversed, steps)) for steps in site.schedule[2:])
    with pytest.raises(InputError, match="lowering must be one of"):
        apply_surgery(model_of(), "antipasto", r=4, lowering="fast", progress=False)
    with pytest.raises(InputError, match="needs example_inputs"):
        apply_surgery(model_of(), "antipasto", r=4, lowering="measure", progress=False)


def test_a_failed_lowering_leaves_the_model_as_it_was() -> None:
    model = model_of()
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(InputError, match="not possible"):
        apply_surgery(model, "antipasto_rot", r=8, lowering="output", progress=False)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert all(type(m) in (nn.Linear, nn.Tanh, nn.Sequential) for m in model.modules())
    assert not sites(model)


def test_output_refuses_factors_that_are_not_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256))
    config = surgery.AntiPaSTO(r=32, svd_method="randomised")
    with pytest.raises(InputError, match="approximate factors"):
        apply_surgery(model, config, lowering="output", progress=False)
    apply_surgery(model, config, progress=False)
    assert all(name != "output" for steps in sites(model)["0"].schedule for _, name in steps)


def test_undo_merge_and_files_under_dense(tmp_path: Any) -> None:
    model, x = operated("dense"), inputs()
    with torch.no_grad():
        live = model(x)
        save_adapter(model, tmp_path / "a")
        fresh = load_adapter(model_of(), tmp_path / "a")
        assert disagreement(fresh(x), live) is None
        keys = set(model.state_dict())
        assert keys == set(operated("lowrank").state_dict())
        merged = merge(copy.deepcopy(model))
        assert disagreement(merged(x), live) is None
        undo_surgery(model)
        assert torch.equal(model(x), model_of()(x))
        assert not any(name in vars(m) for m in model.modules() for name in ("_kept", "schedule", "handle"))


def test_a_loaded_adapter_keeps_the_lowering_that_was_asked_for(tmp_path: Any) -> None:
    model = operated("dense")
    save_adapter(model, tmp_path / "a")
    load_adapter(model, tmp_path / "a")
    assert {site.lowering for site in sites(model).values()} == {"dense"}


def test_the_report_names_the_choice_and_its_cost() -> None:
    model = apply_surgery(nn.Sequential(nn.Linear(1024, 1024)), "antipasto", r=64, progress=False)
    (row,) = surgery.report(model).sites
    schedule = sites(model)["0"].schedule
    assert row.lowering_at == step(schedule.inference, 512)
    assert row.training_at == step(schedule.training, 512)
    assert 0 < row.cost < row.cost_training < 1
    assert row.lowering_at in str(surgery.report(model))


@given(
    st.sampled_from([64, 512, 1024, 4096]), st.sampled_from([64, 512, 3072]), st.sampled_from([8, 64]), st.booleans()
)
def test_the_schedule_takes_the_cheapest(d_out: int, d_in: int, r: int, training: bool) -> None:
    size, names = Size(1, d_out, d_in, r, 0, 4), ("lowrank", "output", "dense")
    steps = cheapest(names, size, "cpu", training)
    assert [least for least, _ in steps] == sorted({least for least, _ in steps})
    for tokens in (1, 64, 1024, 2**18):
        costs = {name: predicted(name, size._replace(tokens=tokens), "cpu", training=training) for name in names}
        assert costs[step(steps, tokens)] <= min(costs.values()) * 1.05


@pytest.mark.parametrize("name", NAMES)
def test_more_work_is_never_predicted_to_cost_less(name: str) -> None:
    for training in (False, True):
        small = predicted(name, Size(512, 1024, 1024, 64, 0, 4), "cpu", training=training)
        assert small < predicted(name, Size(512, 1024, 1024, 256, 0, 4), "cpu", training=training)


@pytest.mark.parametrize("name", ["lowrank", "output", "pair"])
def test_operations_of_a_core_cost_launches_in_inference(name: str) -> None:
    few, many = (Size(1, 1024, 1024, 64, 0, 4, launches) for launches in (4, 28))
    cost = {size: predicted(name, size, "cpu", training=False) for size in (few, many)}
    assert cost[few] < cost[many]
    assert predicted(name, few, "cpu", training=True) == predicted(name, many, "cpu", training=True)
    assert cheapest(("lowrank", "pair"), many, "cpu", False)[0] == (0, "pair")


def test_what_is_traced_shows_the_low_rank_form() -> None:
    model, x = operated("dense"), inputs()
    exported = torch.export.export(model, (x,))
    assert not any("surgery" in str(node.target) for node in exported.graph.nodes)
    assert disagreement(exported.module()(x), reference(model, x)) is None
    found = torch.func.functional_call(
        model, {name: p * 0 for name, p in model.named_parameters() if "core" in name}, x
    )
    assert disagreement(found, model_of()(x)) is None


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast(name: str) -> None:
    model, x = operated(name), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.float().sum().backward()
        with torch.no_grad():
            z = model(x)
    assert disagreement(y.float(), reference(model, x), torch.bfloat16) is None
    assert disagreement(z.float(), reference(model, x), torch.bfloat16) is None


def test_output_is_not_chosen_in_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = operated("auto", dtype=dtype)
        assert all(name != "output" for site in sites(model).values() for steps in site.schedule for _, name in steps)


@pytest.mark.parametrize("lowering", NAMES)
def test_under_functional_transforms(lowering: str) -> None:
    model, x = operated(lowering), inputs()
    expected = reference(model, x)
    with torch.no_grad():
        assert disagreement(torch.func.vmap(model)(x), expected) is None
        assert disagreement(torch.func.vmap(model, in_dims=1, out_dims=1)(x), expected) is None
    gradient = torch.func.grad(lambda a: model(a).square().sum())(x)
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    assert disagreement(gradient, x.grad) is None
