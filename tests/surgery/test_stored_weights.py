"""Weights however they are stored: strided, expanded, overlapping, shared, of any dtype: bits, or a typed error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from surgery import SurgeryError, apply_surgery, load_adapter, merge, save_adapter, set_coeff, sites, undo_surgery
from tests.support.model_state import state_of

DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
OTHERS = [torch.complex64, torch.int8, torch.bool, torch.float8_e4m3fn]
N = 12
SIZES = [5, 8, 12, 33]


class Reads(nn.Module):
    """One product with a weight that it reads itself, beside modules that may share its memory."""

    def __init__(self, *linear: nn.Module, w: nn.Parameter | None = None, stack: nn.Parameter | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear)
        self.w, self.stack = w, stack

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        x = x if self.w is None else torch.tanh(x @ self.w)
        return x if self.stack is None else torch.bmm(x.expand(3, *x.shape), self.stack)


@st.composite
def stored(draw: Any, shape: tuple[int, ...], memory: torch.Tensor) -> torch.Tensor:
    """A view of memory with some shape: any strides, any offset, entries that overlap or are one and the same."""
    kind = draw(st.sampled_from(["dense", "permuted", "strided", "expanded", "anyhow"]))
    order = draw(st.permutations(range(len(shape)))) if kind != "dense" else range(len(shape))
    strides, unit = [0] * len(shape), draw(st.integers(1, 3)) if kind == "strided" else 1
    for at in reversed(list(order)):
        strides[at], unit = unit, unit * (shape[at] + (draw(st.integers(0, 2)) if kind == "strided" else 0))
    if kind == "expanded":
        strides[draw(st.integers(0, len(shape) - 1))] = 0
    if kind == "anyhow":
        strides = [draw(st.integers(0, 90)) for _ in shape]
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return memory.as_strided(shape, strides, draw(st.integers(0, max(0, memory.numel() - 1 - last))))


@st.composite
def models(draw: Any) -> tuple[nn.Module, torch.Tensor]:
    """A model whose weights lie anyhow in one memory or in several, with an input."""
    dtype, n = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SIZES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 3)))

    def memory() -> torch.Tensor:
        return (torch.randn(16000, generator=generator) / 4).to(dtype)

    one = memory()
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        layer = nn.Linear(n, n, dtype=dtype)
        layer.weight = nn.Parameter(draw(stored((n, n), one if draw(st.booleans()) else memory())))
        layers.append(layer)
    if draw(st.booleans()):
        layers.append(layers[0])
    raw = nn.Parameter(draw(stored((n, n), one))) if draw(st.booleans()) else None
    stack = nn.Parameter(draw(stored((3, n, n), one))) if draw(st.booleans()) else None
    x = torch.randn(draw(st.sampled_from([1, 5])), n, generator=generator)
    return Reads(*layers, w=raw, stack=stack).eval(), x.to(dtype)


def strides_of(model: nn.Module) -> list[Any]:
    return [(n, p.data_ptr(), p.stride(), p.storage_offset()) for n, p in model.named_parameters()]


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for site in sites(model).values():
            site.core.g.copy_(torch.linspace(-0.5, 0.5, site.core.g.numel()).reshape(site.core.g.shape))


def refused(model: nn.Module, x: torch.Tensor, **options: Any) -> str | None:
    """Operate on a model; what is said where that is refused."""
    try:
        apply_surgery(model, "antipasto", r=4, example_inputs=x, progress=False, **options)
    except SurgeryError as error:
        return str(error)
    return None


@given(models(), st.sampled_from(["auto", "lowrank", "output", "dense"]), st.booleans())
def test_bits_whatever_the_strides(drawn, lowering, grad):
    model, x = drawn
    model.requires_grad_(grad)
    state, strides, memory = state_of(model), strides_of(model), [p.detach().clone() for p in model.parameters()]
    with torch.set_grad_enabled(grad):
        base = frozen(model, x)
    if refusal := refused(model, x, lowering=lowering):
        assert "overlap in memory" in refusal
        assert state_of(model) == state
        return
    with torch.set_grad_enabled(grad):
        assert torch.equal(model(x), base)
        train(model)
        assert not torch.equal(model(x), base)
        set_coeff(model, 0.0)
        assert torch.equal(model(x), base)
    undo_surgery(model)
    assert state_of(model) == state
    assert strides_of(model) == strides
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), memory, strict=True))
    assert all(p.requires_grad == grad for p in model.parameters())
    with torch.set_grad_enabled(grad):
        assert torch.equal(frozen(model, x), base)


def frozen(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The base as surgery leaves it, in the present grad mode: frozen."""
    flags = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    y = model(x)
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    return y


def change_of(site: Any) -> torch.Tensor:
    """``U D^T Vh`` in float64, matrix by matrix: a product of a whole stack may round its last bit otherwise."""
    left, right = site.delta_factor(torch.float64), site.factors.Vh.double()
    product = (
        left @ right if left.dim() == 2 else torch.stack([one @ other for one, other in zip(left, right, strict=True)])
    )
    return site.base_weight.stored(product)


@given(models())
@settings(max_examples=15)
def test_merged_and_saved_whatever_the_strides(tmp_path_factory, drawn):
    model, x = drawn
    if refused(model, x):
        return
    train(model)
    y, path = model(x).detach(), save_adapter(model, tmp_path_factory.mktemp("adapter"))
    load_adapter(undo_surgery(model), path, progress=False)  # a copy's weights would have other strides
    assert torch.equal(model(x), y)
    want = {key: site.weight.double() + change_of(site) for key, site in sites(model).items()}
    weights = {key: site.host.parameter().dtype for key, site in sites(model).items()}
    owners = {key: (site.host.owner, site.host.weight_name) for key, site in sites(model).items()}
    merge(model, untie=True)
    for key, (owner, name) in owners.items():
        assert torch.equal(getattr(owner, name), want[key].to(weights[key]))


VIEWS = {
    "of complex numbers": lambda z: z.real,
    "negative": lambda z: z.conj().imag,
    "of NumPy": lambda z: torch.from_numpy(z.real.numpy().copy()),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("lowering", ["auto", "dense"])
def test_bits_of_a_weight_that_is_a_view(name, lowering):
    z = torch.randn(8, 8, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    model[0].weight = nn.Parameter(VIEWS[name](z))
    x = torch.randn(5, 8)
    base, state = frozen(model, x), state_of(model)
    with torch.no_grad():
        apply_surgery(model, "antipasto", r=4, lowering=lowering, progress=False)
        assert torch.equal(model(x), base)
        train(model)
        assert not torch.equal(model(x), base)
        set_coeff(model, 0.0)
        assert torch.equal(model(x), base)
    undo_surgery(model)
    assert state_of(model) == state
    assert torch.equal(frozen(model, x), base)


@pytest.mark.parametrize("where", ["module", "read"])
def test_a_weight_whose_entries_overlap(where):
    weight, x = nn.Parameter(torch.randn(1, 8).expand(8, 8)), torch.randn(5, 8)
    if where == "read":
        with pytest.raises(SurgeryError, match="site 'w': entries of its weight overlap in memory"):
            apply_surgery(Reads(w=weight), "antipasto", r=4, example_inputs=x, progress=False)
        return
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    model[0].weight = weight
    base = frozen(model, x)
    with pytest.raises(SurgeryError, match="overlap in memory"):
        apply_surgery(model, "antipasto", r=4, lowering="dense", progress=False)
    apply_surgery(model, "antipasto", r=4, progress=False)
    assert torch.equal(model(x), base)
    train(model)
    set_coeff(model, 0.0)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("dtype", OTHERS)
def test_a_dtype_that_cannot_be_factorised_is_called_by_its_name(dtype):
    model = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N)).eval()
    model[0].weight = nn.Parameter(torch.zeros(N, N).to(dtype), requires_grad=False)
    with pytest.raises(SurgeryError, match=str(dtype)) as caught:
        apply_surgery(model, "antipasto", r=4, progress=False)
    word = {torch.complex64: "complex", torch.bool: "integers"}.get(dtype, "quantised")
    assert word in str(caught.value)
    assert "exclude_modules" in str(caught.value)
    assert list(sites(apply_surgery(model, "antipasto", r=4, exclude_modules=["0"], progress=False))) == ["1"]


def sparse(layout: torch.layout) -> nn.Parameter:
    dense = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).relu()
    return nn.Parameter(dense.to_sparse(layout=layout), requires_grad=False)


class Sparse(nn.Module):
    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.w, self.layer = sparse(layout), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.mm(self.w, x.T).T)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo, torch.sparse_csc])
@pytest.mark.parametrize("given", [True, False])
def test_a_sparse_weight_is_named_and_can_be_left_out(layout, given):
    x = torch.randn(3, 8)
    model = Sparse(layout).eval()
    base = model(x).detach()
    inputs = x if given else None
    with pytest.raises(SurgeryError, match=f"'w'.*{layout}.*exclude_modules"):
        apply_surgery(model, "antipasto", r=4, example_inputs=inputs, target_modules=["w"], progress=False)
    apply_surgery(model, "antipasto", r=4, example_inputs=inputs, exclude_modules=["w"], progress=False)
    assert list(sites(model)) == ["layer"]
    assert torch.equal(model(x), base)
    undo_surgery(model)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("dtype", [torch.long, torch.int8, torch.bool, torch.complex64])
def test_residual_form_takes_no_integers(dtype):
    model = apply_surgery(nn.Sequential(nn.Linear(8, 8)), "antipasto", r=4, form="residual", progress=False)
    with pytest.raises(SurgeryError, match=f"site '0': its input is of {dtype}"):
        model(torch.ones(3, 8).to(dtype))
    with pytest.raises(RuntimeError):
        F.linear(torch.ones(3, 8).to(dtype), torch.ones(8, 8))
