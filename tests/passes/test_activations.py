"""What a model feeds its sites, seen by hooks or by products, against inputs recorded or computed otherwise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from passes.analysis.linear_sites import Site
from passes.capture.activations import observed
from passes.capture.capture import forward_call
from surgery import inspect_sites
from tests.support.hooked_inputs import hooked
from tests.support.tolerance import assert_close
from tests.support.zoo import Forward, SmallModel, small_model

LINEAR = ("mlp", "gpt2", "bert", "t5")


def seen(model: nn.Module, sites: Any, inputs: Any, called: Any = ()) -> dict[str, list[torch.Tensor]]:
    """Every input that is observed at each site."""
    found: dict[str, list[torch.Tensor]] = {site.key: [] for site in sites}
    args, kwargs = forward_call(inputs)
    with torch.no_grad(), observed(model, sites, called, lambda key, x: found[key].append(x.clone())):
        model(*args, **kwargs)
    return found


def site(name: str, shape: tuple[int, int], layout: str = "out_in") -> Site:
    d_out, d_in = shape if layout == "out_in" else shape[::-1]
    return Site(name, name, None, layout, d_out, d_in)


def watched(function: Any, weight: torch.Tensor, x: torch.Tensor, layout: str = "out_in") -> list[torch.Tensor]:
    """What is seen of a function of a module with one parameter ``w``, and of an input."""
    model = Forward(function, w=nn.Parameter(weight))
    return seen(model, [site("w", tuple(weight.shape), layout)], x)["w"]


@pytest.mark.parametrize("by", ["hooks", "products"])
@pytest.mark.parametrize("name", LINEAR)
def test_modules_that_are_called(name, by):
    found = small_model(name)
    sites = [s for s in inspect_sites(found.model, found.inputs).sites if not s.tied]
    keys = [s.key for s in sites]
    expected = hooked(found.model, keys, found.inputs)
    inputs = seen(found.model, sites, found.inputs, keys if by == "hooks" else ())
    assert all(len(xs) > 0 for xs in inputs.values())
    for key, xs in expected.items():
        assert len(inputs[key]) == len(xs)
        for x, reference in zip(inputs[key], xs, strict=True):
            assert torch.equal(x, reference)


def test_raw_parameters_and_a_module_that_is_called_twice():
    found = small_model("raw")
    model, x = found.model, found.inputs
    sites = inspect_sites(model, x).sites
    with torch.no_grad():
        h = x @ model.w
        after = h + F.linear(torch.tanh(h), model.v)
        again = torch.relu(model.twice(after))
        last = model.twice(again)
    expected = {"w": [x], "v": [torch.tanh(h)], "twice": [after, again], "out": [last]}
    for called in ((), ("twice", "out")):
        inputs = seen(model, sites, x, called)
        assert {key: len(xs) for key, xs in inputs.items()} == {key: len(xs) for key, xs in expected.items()}
        for key, xs in expected.items():
            for found_x, reference in zip(inputs[key], xs, strict=True):
                assert_close(found_x, reference)


class Attention(nn.Module):
    """Self-attention; batch first outside, whatever is inside."""

    def __init__(self, batch_first: bool, need_weights: bool, heads: int = 4) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, heads, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.mha.batch_first else x.transpose(0, 1)
        y = self.mha(x, x, x, need_weights=self.need_weights)[0]
        return y if self.mha.batch_first else y.transpose(0, 1)


def heads_of(mha: nn.MultiheadAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What ``out_proj`` reads, (batch, sequence, width), by hand."""
    weights, biases = mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)
    parts = [F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True)]
    q, k, v = (x.unflatten(-1, (mha.num_heads, -1)).transpose(1, 2) for x in parts)
    scores = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
    return (scores @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 16), (4, 4, 16)])
def test_attention_is_seen_batch_first(shape, batch_first, need_weights, heads):
    model, x = Attention(batch_first, need_weights, heads).eval(), torch.randn(shape)
    inputs = seen(model, [s for s in inspect_sites(model, x).sites if s.key.startswith("mha")], x)
    assert torch.equal(inputs["mha.in_proj_weight"][0], x)
    with torch.no_grad():
        assert_close(inputs["mha.out_proj"][0], heads_of(model.mha, x, x, x))


def test_attention_across_two_inputs():
    mha = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    q, kv = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    inputs = seen(mha, inspect_sites(mha, (q, kv, kv)).sites, (q, kv, kv))
    assert [x.shape for x in inputs["in_proj_weight"]] == [q.shape, kv.shape]
    assert all(torch.equal(x, y) for x, y in zip(inputs["in_proj_weight"], (q, kv), strict=True))
    with torch.no_grad():
        assert_close(inputs["out_proj"][0], heads_of(mha, q, kv, kv))


def test_encoder_layer_whose_fast_path_shows_no_products():
    found = small_model("encoder_layer")
    layer, x = found.model, found.inputs
    inputs = seen(layer, inspect_sites(layer, x).sites, x)
    with torch.no_grad():
        mixed = heads_of(layer.self_attn, x, x, x)
        h = layer.norm1(x + F.linear(mixed, layer.self_attn.out_proj.weight, layer.self_attn.out_proj.bias))
        wide = torch.relu(layer.linear1(h))
    expected = {"self_attn.in_proj_weight": x, "self_attn.out_proj": mixed, "linear1": h, "linear2": wide}
    assert set(inputs) == set(expected)
    for key, reference in expected.items():
        assert_close(inputs[key][0], reference)


@pytest.mark.parametrize("dialect", ["symbolic", "exported"])
def test_graphs(dialect):
    found = small_model("raw")
    trace = fx.symbolic_trace if dialect == "symbolic" else lambda m: torch.export.export(m, (found.inputs,)).module()
    model = trace(copy.deepcopy(found.model))
    inputs = seen(model, inspect_sites(model, found.inputs).sites, found.inputs)
    expected = seen(found.model, inspect_sites(found.model, found.inputs).sites, found.inputs)
    assert set(inputs) == set(expected)
    for key, xs in expected.items():
        for x, reference in zip(inputs[key], xs, strict=True):
            assert_close(x, reference)


SPELLINGS = {
    "linear": lambda m, x: F.linear(x, m.w),
    "transposed": lambda m, x: x @ m.w.t(),
    "addmm": lambda m, x: torch.addmm(torch.zeros(3), x.flatten(0, -2), m.w.t()),
    "from the left": lambda m, x: m.w @ x.mT,
    "cast": lambda m, x: F.linear(x.double(), m.w.double()),
    "cast twice": lambda m, x: F.linear(x, m.w.double().float()),
    "half": lambda m, x: F.linear(x.half(), m.w.half()),
    "cloned": lambda m, x: x @ m.w.clone().t(),
    "contiguous": lambda m, x: x @ m.w.t().contiguous(),
    "expanded": lambda m, x: torch.bmm(x.reshape(-1, 1, x.shape[-1]), m.w.t().expand(x.numel() // x.shape[-1], 4, 3)),
    "in pieces": lambda m, x: x @ m.w[:3].t(),
}


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_a_product(spelling, shape):
    x = torch.randn(shape)
    xs = watched(SPELLINGS[spelling], torch.randn(3, 4), x)
    assert sum(x.numel() for x in xs) == x.numel()
    assert_close(torch.cat([x.flatten(0, -2) for x in xs]).float(), x.flatten(0, -2), xs[0].dtype)


def test_one_vector():
    x = torch.randn(4)
    for function in (lambda m, x: m.w @ x, lambda m, x: torch.addmv(torch.zeros(3), m.w, x), F.linear):
        xs = watched(function if function is not F.linear else lambda m, x: F.linear(x, m.w), torch.randn(3, 4), x)
        assert len(xs) == 1
        assert torch.equal(xs[0].flatten(), x)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_square_weights_of_either_layout(layout):
    x = torch.randn(5, 4)
    function = (lambda m, x: x @ m.w.T) if layout == "out_in" else lambda m, x: x @ m.w
    xs = watched(function, torch.randn(4, 4), x, layout)
    assert len(xs) == 1
    assert torch.equal(xs[0], x)


def test_memory_that_is_used_again_is_no_weight():
    def function(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):  # the copy's memory is free after each step, and the next tensor takes it
            x = F.linear(x, m.w.double().float())
            x = x @ torch.eye(4)
        return x

    xs = watched(function, torch.eye(4), torch.randn(5, 4))
    assert len(xs) == 20


def test_products_of_the_observer_are_not_seen():
    found = small_model("raw")
    sites, keys = inspect_sites(found.model, found.inputs).sites, []

    def see(key: str, x: torch.Tensor) -> None:
        keys.append(key)
        x @ found.model.w if x.shape[-1] == 12 else x @ found.model.v

    with torch.no_grad(), observed(found.model, sites, (), see):
        found.model(found.inputs)
    assert keys == ["w", "v", "twice", "twice", "out"]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["mlp", "encoder_layer"])
def test_nothing_is_left_behind(name, fast, error):
    found: SmallModel = small_model(name)
    sites = inspect_sites(found.model, found.inputs).sites
    called = {s.key for s in sites if name == "mlp"}
    torch.backends.mha.set_fastpath_enabled(fast)
    output = found.run()

    def see(key: str, x: torch.Tensor) -> None:
        if error:
            raise error("injected")

    try:
        if error is None:
            with observed(found.model, sites, called, see):
                found.run()
        else:
            with pytest.raises(error, match="injected"), observed(found.model, sites, called, see):
                found.run()
        assert torch.backends.mha.get_fastpath_enabled() == fast
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in found.model.modules())
    assert torch.equal(found.run(), output) or not fast


def test_compiled_parts_are_run_as_they_are_written():
    found = small_model("mlp")
    sites = inspect_sites(found.model, found.inputs).sites
    expected = seen(found.model, sites, found.inputs)
    found.model.forward = torch.compile(found.model.forward, backend="eager")
    inputs = seen(found.model, sites, found.inputs)
    assert all(torch.equal(inputs[key][0], xs[0]) for key, xs in expected.items())
