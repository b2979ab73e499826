"""Sites: every matrix product with a parameter is found, named, shaped, grouped and tied; the others say why not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from passes.analysis.linear_sites import Site, Skipped, sites_from_graph, sites_from_walk
from passes.capture.capture import capture
from passes.capture.inspect_model import inspect_model
from tests.support.tolerance import assert_close
from tests.support.zoo import ALL_NAMES, HUB_NAMES, Forward, small_model

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
ACTIVATIONS = "both operands are activations"


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def read(model: nn.Module, inputs: Any = None) -> tuple[dict[str, Site], list[Skipped]]:
    """Sites by key and skipped products of a captured model."""
    found = capture(model.eval(), inputs)
    assert found.graph is not None, found.note
    sites, skipped = sites_from_graph(found.graph, model)
    assert len({site.key for site in sites}) == len(sites)
    return {site.key: site for site in sites}, skipped


@functools.cache
def read_model(name: str) -> tuple[nn.Module, dict[str, Site]]:
    """A model of the zoo and its sites; for reading only."""
    given = small_model(name)
    return given.model, read(given.model, given.inputs)[0]


def both_ways(function: Callable[..., Any], inputs: Any = X, **members: Any) -> list[Any]:
    """Read a model from its symbolic trace and from its export."""
    model = Forward(function, **members)
    return [read(model), read(model, inputs)]


def linear_paths(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def convolution_paths(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))}


def shared(**kwargs: Any) -> tuple[nn.Linear, nn.Linear]:
    """Two linear modules with one weight."""
    one, other = nn.Linear(4, 4, **kwargs), nn.Linear(4, 4, **kwargs)
    other.weight = one.weight
    return one, other


# --- names, keys, layouts, shapes ---


@pytest.mark.parametrize("name", HUB_NAMES)
def test_a_transformer_has_one_site_per_linear_module(name):
    model, sites = read_model(name)
    assert set(sites) == linear_paths(model) | convolution_paths(model)
    for key, site in sites.items():
        module = model.get_submodule(key)
        if key in convolution_paths(model):
            assert (site.stack, site.d_out, site.d_in) == (None, len(module.weight), module.weight[0].numel())
            continue
        assert site.weight == f"{key}.weight"
        assert site.bias == (f"{key}.bias" if module.bias is not None else None)
        assert site.layout == ("in_out" if isinstance(module, Conv1D) else "out_in")
        stored = (site.d_out, site.d_in) if site.layout == "out_in" else (site.d_in, site.d_out)
        assert stored == tuple(module.weight.shape)
        assert site.calls == 1


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("mlp", ["0", "2", "4"]),
        ("attention", ["in_proj_weight", "out_proj"]),
        ("encoder_layer", ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]),
        ("raw", ["w", "v", "twice", "out"]),
    ],
)
def test_keys_in_the_order_of_execution(name, keys):
    assert list(read_model(name)[1]) == keys


def test_the_order_is_that_of_execution_and_not_of_registration():
    for sites, _ in both_ways(lambda m, x: m.a(m.b(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4)):
        assert list(sites) == ["b", "a"]


def test_a_model_that_is_itself_linear_has_its_weight_as_key():
    model = nn.Linear(4, 2)
    for inputs in (None, X):
        sites, _ = read(model, inputs)
        assert (sites["weight"].weight, sites["weight"].bias) == ("weight", "bias")
    assert [site.key for site in sites_from_walk(model)[0]] == ["weight"]


LAYOUTS: dict[str, tuple[Callable[..., Any], tuple[int, int]]] = {
    "F.linear": (lambda m, x: F.linear(x, m.w), (5, 4)),
    "@": (lambda m, x: x @ m.w, (4, 5)),
    "mm": (lambda m, x: x.mm(m.w), (4, 5)),
    "t()": (lambda m, x: x @ m.w.t(), (5, 4)),
    "T": (lambda m, x: x @ m.w.T, (5, 4)),
    "mT": (lambda m, x: x @ m.w.mT, (5, 4)),
    "T twice": (lambda m, x: x @ m.w.T.T, (4, 5)),
    "transpose": (lambda m, x: x @ m.w.transpose(-1, -2), (5, 4)),
    "transpose of nothing": (lambda m, x: x @ m.w.transpose(1, -1), (4, 5)),
    "linear of t()": (lambda m, x: F.linear(x, m.w.t()), (4, 5)),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), (4, 5)),
}
EXPORTED = {
    "permute": (lambda m, x: x @ m.w.permute(1, 0), (5, 4)),
    "permute of nothing": (lambda m, x: x @ m.w.permute(0, 1), (4, 5)),
    "cast": (lambda m, x: F.linear(x.double(), m.w.to(torch.float64)).float(), (5, 4)),
    "contiguous": (lambda m, x: x @ m.w.t().contiguous(), (5, 4)),
}


@pytest.mark.parametrize("name", [*LAYOUTS, *EXPORTED])
def test_layout_and_shape_of_a_raw_parameter(name):
    function, shape = {**LAYOUTS, **EXPORTED}[name]
    model = Forward(function, w=parameter(*shape), b=parameter(5))
    for inputs in (None, X) if name in LAYOUTS else (X,):
        sites, skipped = read(model, inputs)
        assert skipped == []
        assert list(sites) == ["w"]
        site = sites["w"]
        assert (site.d_out, site.d_in) == (5, 4)
        matrix = model.w if site.layout == "out_in" else model.w.t()
        bias = model.get_parameter(site.bias) if site.bias else 0
        assert site.bias == ("b" if name == "addmm" else None)
        with torch.no_grad():
            assert_close(model(X), X @ matrix.t() + bias)


def test_an_activation_that_is_added_is_no_bias():
    for sites, _ in both_ways(lambda m, x: torch.addmm(x, torch.relu(x), m.w), w=parameter(4, 4)):
        assert sites["w"].bias is None


@pytest.mark.parametrize("inputs", [None, X], ids=["symbolic", "export"])
def test_a_conv1d_in_a_plain_model(inputs):
    sites, _ = read(nn.Sequential(Conv1D(5, 4), nn.ReLU()), inputs)
    site = sites["0"]
    assert (site.layout, site.d_out, site.d_in, site.bias, site.calls) == ("in_out", 5, 4, "0.bias", 1)


@pytest.mark.parametrize("name", ["mlp", "raw"])
def test_both_captures_find_the_same_sites(name):
    assert read(small_model(name).model)[0] == read_model(name)[1]


# --- groups ---


def test_query_key_value_share_their_input_and_so_do_gate_and_up():
    groups = {key: site.group for key, site in read_model("qwen3")[1].items()}
    for layer in ("model.layers.0.", "model.layers.1."):
        q, k, v, o = (groups[f"{layer}self_attn.{n}_proj"] for n in "qkvo")
        gate, up, down = (groups[f"{layer}mlp.{n}_proj"] for n in ("gate", "up", "down"))
        assert q == k == v
        assert gate == up
        assert len({q, o, gate, down}) == 4
    assert groups["model.layers.0.self_attn.q_proj"] != groups["model.layers.1.self_attn.q_proj"]


def test_cross_attention_reads_one_input_in_every_layer():
    groups = {key: site.group for key, site in read_model("t5")[1].items()}
    cross = {key: group for key, group in groups.items() if "EncDecAttention" in key}
    assert len({group for key, group in cross.items() if key[-1] in "kv"}) == 1
    assert len({group for key, group in cross.items() if key[-1] == "q"}) == 2


@pytest.mark.parametrize(
    ("function", "same"),
    [
        (lambda m, x: m.a(x) + m.b(x), True),
        (lambda m, x: m.a(x) + m.b(x.reshape(1, 3, 4)).reshape(3, 4), True),
        (lambda m, x: m.a(x) + m.b(m.drop(x)), True),
        (lambda m, x: m.a(x) + m.b(torch.relu(x)), False),
        (lambda m, x: m.a(m.b(x)), False),
        (lambda m, x: m.a(x) + m.b(x) + m.a(torch.relu(x)), False),
    ],
    ids=["same", "reshaped", "dropout", "nonlinear", "chained", "one also reads another"],
)
def test_a_group_is_the_sites_that_read_the_same_input(function, same):
    members = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "drop": nn.Dropout(0.5)}
    for sites, _ in both_ways(function, **members):
        assert (sites["a"].group == sites["b"].group) is same


def test_inputs_of_different_width_are_not_the_same_input():
    members = {"a": nn.Linear(4, 5), "b": nn.Linear(12, 5)}
    for sites, _ in both_ways(lambda m, x: m.a(x).sum(0) + m.b(x.flatten()), **members):
        assert sites["a"].group != sites["b"].group


# --- ties, several uses, several names ---


def test_a_tied_head_is_tied_to_the_embedding():
    _, sites = read_model("qwen3")
    assert {key: site.tied for key, site in sites.items() if site.tied} == {"lm_head": ("model.embed_tokens.weight",)}


def test_the_head_of_t5_is_tied_to_all_embeddings():
    _, sites = read_model("t5")
    assert [key for key, site in sites.items() if site.tied] == ["lm_head"]
    assert {"shared.weight", "encoder.embed_tokens.weight"} <= set(sites["lm_head"].tied)


@pytest.mark.parametrize("name", ["mlp", "raw", "llama", "bert"])
def test_untied_weights_are_not_tied(name):
    assert [site.key for site in read_model(name)[1].values() if site.tied] == []


@pytest.mark.parametrize("calls_of_b", [1, 2])
def test_two_modules_that_share_a_weight_are_two_sites(calls_of_b):
    a, b = shared()
    for sites, _ in both_ways(lambda m, x: [x := m.b(x) for _ in range(calls_of_b)][-1] + m.a(x), a=a, b=b):
        assert {key: (site.weight, site.bias, site.calls) for key, site in sites.items()} == {
            "a": ("a.weight", "a.bias", 1),
            "b": ("b.weight", "b.bias", calls_of_b),
        }
        assert "b.weight" in sites["a"].tied
        assert "a.weight" in sites["b"].tied
    walked = {site.key: site.tied for site in sites_from_walk(Forward(None, a=a, b=b))[0]}
    assert walked == {"a": ("b.weight",), "b": ("a.weight",)}


def raw_look_up(m, x):
    return F.embedding(x, m.w) @ m.w.t()


def look_up(m, x):
    return F.linear(m.embed(x), m.embed.weight)


@pytest.mark.parametrize(
    ("function", "members", "key"),
    [(raw_look_up, {"w": parameter(5, 4)}, "w"), (look_up, {"embed": nn.Embedding(5, 4)}, "embed")],
    ids=["functional", "module"],
)
def test_a_weight_that_is_also_looked_up_is_tied(function, members, key):
    for sites, _ in both_ways(function, torch.tensor([1, 2]), **members):
        assert list(sites) == [key]
        assert "embedding" in " ".join(sites[key].tied)


def test_a_module_called_twice_is_one_site():
    for sites, _ in both_ways(lambda m, x: m.a(torch.relu(m.a(x))), a=nn.Linear(4, 4)):
        assert {key: site.calls for key, site in sites.items()} == {"a": 2}
        assert sites["a"].tied == ()


def test_a_module_under_two_names_is_one_site_under_the_first():
    module = nn.Linear(4, 4)
    for sites, _ in both_ways(lambda m, x: m.second(torch.relu(m.first(x))), first=module, second=module):
        assert {key: (site.weight, site.calls, site.tied) for key, site in sites.items()} == {
            "first": ("first.weight", 2, ())
        }


def test_a_product_with_a_module_s_weight_counts_as_that_module_s():
    for sites, _ in both_ways(lambda m, x: F.linear(m.a(x), m.a.weight), a=nn.Linear(4, 4)):
        assert {key: site.calls for key, site in sites.items()} == {"a": 2}


def test_a_weight_used_both_ways_is_skipped_with_the_reason():
    for sites, skipped in both_ways(lambda m, x: F.linear(F.linear(x, m.w), m.w.t()), w=parameter(5, 4)):
        assert sites == {}
        assert [(s.where, s.reason) for s in skipped] == [("w", "its weight is used both as it is and transposed")]


# --- subclasses ---


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_subclass_with_its_own_forward_is_found_by_its_graph_and_refused_by_the_walk():
    model = nn.Sequential(Doubled(4, 5), nn.Linear(5, 2))
    for inputs in (None, X):
        assert list(read(model, inputs)[0]) == ["0", "1"]
    sites, skipped = sites_from_walk(model)
    assert [site.key for site in sites] == ["1"]
    assert [(s.where, s.operation) for s in skipped] == [("0", "Doubled")]
    assert "own forward" in skipped[0].reason


# --- what is skipped says why ---

X3 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SKIPPED: dict[str, tuple[Callable[..., Any], dict[str, Any], Any, str]] = {
    "activations": (lambda m, x: x @ x.mT, {}, X3, ACTIVATIONS),
    "bmm of activations": (lambda m, x: torch.bmm(x, x.transpose(1, 2)), {}, X3, ACTIVATIONS),
    "buffer": (lambda m, x: F.linear(x, m.w), {"w": torch.randn(5, 4)}, X, "a constant, not a parameter"),
    "transposed buffer": (lambda m, x: x @ m.w.t(), {"w": torch.randn(5, 4)}, X, "a constant, not a parameter"),
    "vector": (lambda m, x: x @ m.w, {"w": parameter(4)}, X, "'w' is a vector, not a matrix"),
    "strided": (lambda m, x: F.linear(x, m.w[::2]), {"w": parameter(6, 4)}, X, "are interleaved"),
    "both": (lambda m, x: x + torch.bmm(m.w, m.v)[0], {"w": parameter(1, 3, 5), "v": parameter(1, 5, 4)}, X, "both"),
    "scaled": (lambda m, x: F.linear(x, m.w * 2), {"w": parameter(5, 4)}, X, "computed from the parameter 'w'"),
    "scaled stack": (lambda m, x: torch.bmm(x, m.w * 2), {"w": parameter(2, 4, 5)}, X3, "computed from the parameter"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_product_that_is_no_site_says_why(name):
    function, members, inputs, reason = SKIPPED[name]
    for sites, skipped in both_ways(function, inputs, **members):
        assert sites == {}
        assert len(skipped) == 1
        assert reason in skipped[0].reason


MODULES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 2, groups=1), IMAGE[:, :, 0]),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 4, 3), IMAGE),
    "bilinear": (lambda: Forward(lambda m, x: m.inner(x, x), inner=nn.Bilinear(4, 4, 2)), X),
    "lstm": (lambda: nn.LSTM(4, 5), X),
    "gru_cell": (lambda: nn.GRUCell(4, 5), X),
}


@pytest.mark.filterwarnings("ignore:The tensor attribute", "ignore:RNN module weights")
@pytest.mark.parametrize("name", MODULES)
def test_no_product_with_a_parameter_is_passed_over_in_silence(name):
    build, inputs = MODULES[name]
    sites, skipped = read(Forward(lambda m, x: m.layer(x), layer=build()), inputs)
    assert sites == {}
    assert [s for s in skipped if name.split()[0] in s.operation and "with a parameter" in s.reason]


def test_a_transposed_convolution_in_a_symbolic_trace_is_skipped_with_a_reason():
    _, skipped = read(nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Flatten()))
    assert [(s.where, s.weights) for s in skipped] == [("0", ("0.weight",))]


def test_a_skipped_product_says_in_which_module_it_stands():
    block = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(3, 3, 3, padding=1))
    _, skipped = read(Forward(lambda m, x: m.block(m.block(x)), block=block), IMAGE)
    assert [s.where for s in skipped] == ["block.1", "block.1"]


def test_stacked_experts_are_sites_and_so_is_the_router():
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    sites, skipped = read(model, {"input_ids": torch.tensor([[1, 2, 3]])})
    experts = "model.layers.0.mlp.experts"
    stacks = {f"{experts}.gate_up_proj", f"{experts}.down_proj"}
    assert set(sites) - linear_paths(model) == {"model.layers.0.mlp.gate", *stacks}
    assert sites["model.layers.0.mlp.gate"].d_out == 4
    found = {key: (sites[key].stack, sites[key].d_out, sites[key].d_in, sites[key].layout) for key in stacks}
    assert found == {f"{experts}.gate_up_proj": (4, 96, 32, "out_in"), f"{experts}.down_proj": (4, 32, 48, "out_in")}
    assert [s.reason for s in skipped if s.reason != ACTIVATIONS] == []


@pytest.mark.parametrize(
    "region", [lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad, torch.no_grad]
)
def test_a_product_inside_a_region_is_found(region):
    def function(m, x):
        with region():
            h = m.a(x)
        return x + m.b(torch.relu(h.float()))

    sites, _ = read(Forward(function, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), X)
    assert list(sites) == ["a", "b"]
    assert [site.residual for site in sites.values()] == [False, True]


def test_the_packed_weight_of_cross_attention_is_accounted_for():
    model = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    inspection = inspect_model(model, (torch.randn(1, 3, 8), torch.randn(1, 5, 8)))
    told = {site.key for site in inspection.sites} | {s.where for s in inspection.skipped}
    told |= {name for name, _ in model.named_parameters() for s in inspection.skipped if repr(name) in s.reason}
    assert {"self_attn.in_proj_weight", "multihead_attn.in_proj_weight", "linear1", "linear2"} <= told


# --- the module walk ---


@pytest.mark.parametrize("name", [name for name in ALL_NAMES if name != "raw"])
def test_the_walk_finds_what_the_graph_finds(name):
    model, graph = read_model(name)
    walked = {site.key: site for site in sites_from_walk(model)[0]}
    assert set(walked) == set(graph)
    for key, site in walked.items():
        other = graph[key]
        assert (site.weight, site.bias, site.layout, site.d_out, site.d_in, site.tied) == (
            other.weight, other.bias, other.layout, other.d_out, other.d_in, other.tied
        )  # fmt: skip
        assert site.group is None
        assert site.residual is None


def test_the_walk_keeps_the_key_of_a_module_whose_weight_has_an_alias_at_the_root():
    linear = nn.Linear(4, 4)
    model = Forward(lambda m, x: m.linear(x), linear=linear, alias=linear.weight)
    assert list(read(model, X)[0]) == [site.key for site in sites_from_walk(model)[0]] == ["linear"]


def test_the_walk_accounts_for_attention_with_separate_weights():
    model = nn.MultiheadAttention(4, 2, kdim=2, vdim=2, batch_first=True)
    x, y = torch.randn(1, 3, 4), torch.randn(1, 3, 2)
    assert set(read(model, (x, y, y))[0]) == {site.key for site in sites_from_walk(model)[0]}


def test_the_walk_skips_weights_that_are_no_parameters_or_have_no_shape_yet():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    sites, skipped = sites_from_walk(nn.Sequential(normed, nn.LazyLinear(3), nn.Linear(3, 2)))
    assert [site.key for site in sites] == ["2"]
    assert [s.where for s in skipped] == ["0", "1"]
