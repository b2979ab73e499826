"""Every variant, in place and in graphs, computes what an independent reference in float64 does."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import fx, nn

import surgery
from surgery import Contrast, apply_surgery, fold, load_adapter, merge, save_adapter, set_coeff, sites, to_graph
from surgery.variants import REGISTRY, Variant
from tests.support.reference import DELTAS, reference_delta_weight, reference_output, reference_term
from tests.support.tolerance import assert_close

CONFIGS: tuple[Variant, ...] = (
    surgery.AntiPaSTO(),
    surgery.AntiPaSTO(suppress_only=True),
    surgery.AntiPaSTO(pool="mean_abs"),
    surgery.AntiPaSTORot(),
    surgery.AntiPaSTORot(rotate_basis="U"),
    surgery.AntiPaSTORot(rotate_basis="both"),
    surgery.AntiPaSTORot(rotate_basis="none"),
    surgery.AntiPaSTORot(block_size=1),
    surgery.AntiPaSTORot(rotate_basis="both", block_size=2, max_rotation_angle=2.0),
    surgery.AntiPaSTORot(rotate_basis="U", block_size=3, init_delta_s=0.1),
    surgery.AntiPaSTORot(rotate_basis="both", block_size=5, max_rotation_angle=1.5),
    surgery.AntiPaSTORot(block_size=8),
    surgery.AntiPaSTOAblate(),
    surgery.AntiPaSTOAblate(k=3),
    surgery.AntiPaSTOAblate(k=3, allow_amplify=True),
    surgery.AntiPaSTOAblate(k=2, cov_orient=True),
    surgery.AntiPaSTOCorDA(),
    surgery.AntiPaSTOCorDA(suppress_only=True, cov_eps_relative=True),
    surgery.AntiPaSTOASVD(),
    surgery.AntiPaSTOASVD(suppress_only=True),
    surgery.AntiPaSTOArrow(),
    surgery.AntiPaSTOArrow(block=3),
    surgery.AntiPaSTOArrow(block=3, suppress_only=True),
    surgery.AntiPaSTODPLR(),
    surgery.AntiPaSTODPLR(k=3, suppress_only=True),
    surgery.LoRAXS(),
    surgery.SSpace(),
)
NAMES = {f"{i:02}_{config.name}": config for i, config in enumerate(CONFIGS)}
FIRST = {config.name: name for name, config in reversed(NAMES.items())}
TOGETHER = {name: NAMES[name] for name in [*sorted(FIRST.values()), "05_antipasto_rot", "13_antipasto_ablate"]}
LINEAR = [name for name, config in NAMES.items() if config.linear]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
ROWS = (0.0, 1.0, -0.5, 0.8)
COEFFS: tuple[Any, ...] = (-1.0, 0.0, 0.5, 1.0, ROWS)
SHAPES = {"square": (12, 12, True), "tall": (9, 20, False), "wide": (16, 9, True), "full": (5, 7, False)}
FORMS = ("delta", "residual")

each = pytest.mark.parametrize("name", NAMES)
each_linear = pytest.mark.parametrize("name", LINEAR)
# configurations whose graphs have the shape of another's are traced in the full suite only
ALIKE = {
    i for i, c in enumerate(CONFIGS) if i and (getattr(c, "suppress_only", False) or c.name == CONFIGS[i - 1].name)
}
ALIKE -= {5, 8, 10, 13, 21}
GRAPHS = [pytest.param(n, marks=[pytest.mark.full] * (int(n[:2]) in ALIKE)) for n in NAMES]
each_graph = pytest.mark.parametrize("name", GRAPHS)
each_linear_graph = pytest.mark.parametrize("name", [param for param in GRAPHS if param.values[0] in LINEAR])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


class Slices(nn.Module):
    """Linear modules side by side, each on the first entries of the input; the output is all of theirs in a row."""

    def __init__(self, shapes: dict[str, tuple[int, int, bool]]) -> None:
        super().__init__()
        for name, (d_in, d_out, bias) in shapes.items():
            setattr(self, name, nn.Linear(d_in, d_out, bias=bias))
        self.names = tuple(shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modules = [getattr(self, name) for name in self.names]
        return torch.cat([module(x[..., : module.in_features]) for module in modules], dim=-1)


def some(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data_for(config: Variant, dtype: torch.dtype) -> Any:
    """Calibration data where the configuration wants it: channels of unlike size, and two sets for a contrast."""
    scales = torch.linspace(0.2, 3, 16, dtype=torch.float64)
    batches = [(some(4, 3, 16, seed=seed) * scales).to(dtype) for seed in range(4)]
    if config.statistic == "contrast":
        return Contrast([batch + 1 for batch in batches[:2]], batches[2:])
    calibrated = config.needs_calibration or getattr(config, "pool", "rms") != "rms"
    return batches if calibrated else None


def randomise(model: nn.Module) -> nn.Module:
    """Normal cores; the strengths of an ablation lie inside and outside of [0, 1]."""
    with torch.no_grad():
        for i, (_, site) in enumerate(sorted(sites(model).items())):
            for name, parameter in site.core.named_parameters():
                values = 0.7 * some(*parameter.shape, seed=i)
                if name == "alpha":
                    values = torch.tensor([0.6, 1.7, -0.4, 0.3]).roll(i)[: len(parameter)]
                parameter.copy_(values)
    return model


def operate(model: Any, config: Variant, dtype: torch.dtype, **options: Any) -> Any:
    options = {"r": 8, "target_modules": "all-linear", "progress": False, **options}
    data = data_for(config, dtype)
    return apply_surgery(model, config, example_inputs=some(4, 3, 16).to(dtype), calibration=data, **options)


def plain(shapes: dict[str, tuple[int, int, bool]], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Slices(shapes).to(dtype).eval().requires_grad_(False)


@functools.cache
def _in_place(name: str, dtype: torch.dtype) -> nn.Module:
    return randomise(operate(plain(SHAPES, dtype), NAMES[name], dtype))


def in_place(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One configuration on sites of every shape."""
    return copy.deepcopy(_in_place(name, dtype))


@functools.cache
def _symbolic(name: str, form: str, dtype: torch.dtype) -> fx.GraphModule:
    return randomise(operate(fx.symbolic_trace(plain(SHAPES, dtype)), NAMES[name], dtype, form=form))


def symbolic(name: str, form: str, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """The same, as surgery on a traced graph."""
    return copy.deepcopy(_symbolic(name, form, dtype))


def all_shapes() -> dict[str, tuple[int, int, bool]]:
    kinds = list(SHAPES.values())
    return {f"site_{name}": kinds[i % 4] for i, name in enumerate(TOGETHER)}


@functools.cache
def everything(dtype: torch.dtype) -> nn.Module:
    """A model with every variant on a site of its own."""
    model = plain(all_shapes(), dtype)
    for name, config in TOGETHER.items():
        operate(model, config, dtype, target_modules=[f"site_{name}"])
    return randomise(model)


@functools.cache
def captured(form: str, dtype: torch.dtype) -> fx.GraphModule:
    """Its graph."""
    return to_graph(everything(dtype), some(4, 3, 16).to(dtype), form=form)


@functools.cache
def captured_outputs(form: str, dtype: torch.dtype, folded: bool) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    """What every site gives at each coeff, by configuration, on an input of a batch size that was not captured."""
    model = copy.deepcopy(captured(form, dtype))
    if folded:
        fold(model)
    sizes = [d_out for _, d_out, _ in all_shapes().values()]
    outputs = []
    for coeff in COEFFS:
        with torch.no_grad():
            found = set_coeff(model, torch.tensor(coeff, dtype=torch.float64))(batch(dtype)).split(sizes, dim=-1)
        outputs.append((coeff, dict(zip(TOGETHER, found, strict=True))))
    return outputs


def batch(dtype: torch.dtype) -> torch.Tensor:
    return some(8, 5, 16, seed=11).to(dtype)


def check_output(found: torch.Tensor, site: Any, x: torch.Tensor, coeff: Any) -> None:
    assert_close(found, reference_output(site, x[..., : site.factors.Vh.shape[1]], np.array(coeff)))


def check_model(model: Any, held: dict[str, Any], dtype: torch.dtype, coeff: Any) -> None:
    """Compare every site of a model of all shapes with the reference, at the coeff that the model has."""
    with torch.no_grad():
        found = model(batch(dtype)).split([d_out for _, d_out, _ in SHAPES.values()], dim=-1)
    for (key, site), y in zip(held.items(), found, strict=True):
        check_output(y, site, batch(dtype), coeff)
        assert key in SHAPES


def test_every_registered_variant_has_a_reference_and_a_case():
    assert set(DELTAS) == set(REGISTRY)
    assert {config.name for config in CONFIGS} == set(REGISTRY)


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


@each_dtype
@each
def test_forward_in_place(name, dtype):
    model = in_place(name, dtype)
    for coeff in COEFFS:
        set_coeff(model, torch.tensor(coeff, dtype=torch.float64))
        for site in sites(model).values():
            x = batch(dtype)[..., : site.factors.Vh.shape[1]]
            y, term = site(x).detach(), site.adapter_term(x).detach()  # with gradients enabled
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
        assert_close(site(x).detach(), reference_output(site, x, coeff))


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
            check_model(set_coeff(model, torch.tensor(coeff, dtype=torch.float64)), held, dtype, coeff)
        if folded or form == "delta":
            for coeff in (0.0, torch.zeros(4)):
                assert torch.equal(set_coeff(model, coeff)(batch(dtype)), base)


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
            check_model(set_coeff(model, torch.tensor(coeff, dtype=torch.float64)), held, torch.float32, coeff)


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
            set_coeff(model, coeff)
            assert torch.equal(model(batch(dtype)), base)
            with torch.no_grad():
                assert torch.equal(model(batch(dtype)), base)


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


def test_a_coeff_is_not_rounded_below_the_dtype_of_the_core():
    model = set_coeff(in_place(FIRST["antipasto"], torch.float64), 0.1)
    for site in sites(model).values():
        x = batch(torch.float64)[..., : site.factors.Vh.shape[1]]
        assert_close(site(x).detach(), reference_output(site, x, 0.1))
