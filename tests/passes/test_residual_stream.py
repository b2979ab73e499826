"""Residual writers, found from dataflow alone: the exact set for known architectures, and what must not be one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from passes.analysis.linear_sites import Site, sites_from_graph
from passes.capture.capture import capture
from tests.support.zoo import small_model

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


class Forward(nn.Module):
    """A module whose forward is a given function of itself and one input, with linear modules ``a`` to ``d``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.router = nn.Linear(8, 2)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.1)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("cos", torch.rand(3, 8))
        self.register_buffer("sin", torch.rand(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def sites_of(model: nn.Module, inputs: Any = None) -> list[Site]:
    found = capture(model.eval(), inputs)
    assert found.graph is not None, found.note
    return sites_from_graph(found.graph, model)[0]


def writers(model: nn.Module, inputs: Any = None) -> set[str]:
    return {site.key for site in sites_of(model, inputs) if site.residual}


def expected(*patterns: str, layers: int = 2) -> set[str]:
    """Keys from patterns with ``*`` for the number of the layer."""
    return {pattern.replace("*", str(i)) for pattern in patterns for i in range(layers)}


LLAMA = ("model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj")
ZOO = {
    "qwen3": LLAMA,
    "llama": LLAMA,
    "gpt2": ("transformer.h.*.attn.c_proj", "transformer.h.*.mlp.c_proj"),
    "bert": ("bert.encoder.layer.*.attention.output.dense", "bert.encoder.layer.*.output.dense"),
    "vit": ("vit.layers.*.attention.o_proj", "vit.layers.*.mlp.fc2"),
    "t5": (
        "encoder.block.*.layer.0.SelfAttention.o",
        "encoder.block.*.layer.1.DenseReluDense.wo",
        "decoder.block.*.layer.0.SelfAttention.o",
        "decoder.block.*.layer.1.EncDecAttention.o",
        "decoder.block.*.layer.2.DenseReluDense.wo",
    ),
}


@pytest.mark.parametrize("name", ZOO)
def test_the_writers_of_a_known_architecture(name):
    given = small_model(name)
    assert writers(given.model, given.inputs) == expected(*ZOO[name])


def neox(parallel: bool) -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, use_parallel_residual=parallel))


def falcon() -> nn.Module:
    config = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**config))


def t5_gated() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    )


NEOX = ("gpt_neox.layers.*.attention.dense", "gpt_neox.layers.*.mlp.dense_4h_to_h")
HUB: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "parallel residual": (lambda: neox(True), NEOX),
    "sequential residual": (lambda: neox(False), NEOX),
    "parallel residual, stream first": (
        lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, num_key_value_heads=2)),
        LLAMA,
    ),
    "parallel residual and tanh GELU": (
        lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL)),
        ("model.layers.*.self_attn.dense", "model.layers.*.mlp.fc2"),
    ),
    "norms after the branch": (
        lambda: transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8)
        ),
        LLAMA,
    ),
    "in-place parallel sum": (
        falcon,
        ("transformer.h.*.self_attention.dense", "transformer.h.*.mlp.dense_4h_to_h"),
    ),
    "gated tanh GELU": (
        t5_gated,
        ("encoder.block.*.layer.0.SelfAttention.o", "encoder.block.*.layer.1.DenseReluDense.wo"),
    ),
    "experts behind a router": (mixtral, ("model.layers.*.self_attn.o_proj", "model.layers.*.mlp.experts.down_proj")),
}


@pytest.mark.parametrize("name", HUB)
def test_the_writers_of_an_architecture_with_a_twist(name):
    build, patterns = HUB[name]
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    assert writers(build(), inputs) == expected(*patterns)


def tanh_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def rotate(x):
    return torch.cat((-x[..., 4:], x[..., :4]), -1)


def in_place(m, x):
    h = m.norm(x) * 1.0
    h += m.a(torch.relu(h))
    return h


def experts(m, x):
    weights = torch.softmax(m.router(x), -1)
    return x + weights[..., :1] * m.a(torch.relu(m.b(x))) + weights[..., 1:] * m.c(torch.relu(m.d(x)))


BLOCKS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "x + f(x)": (lambda m, x: x + m.a(torch.relu(x)), "a"),
    "f(x) + x": (lambda m, x: m.a(torch.relu(x)) + x, "a"),
    "torch.add": (lambda m, x: torch.add(x, m.a(torch.relu(x))), "a"),
    "x.add": (lambda m, x: x.add(m.a(torch.relu(x))), "a"),
    "+=": (in_place, "a"),
    "last of two": (lambda m, x: x + m.b(torch.relu(m.a(x))), "b"),
    "pre-norm": (lambda m, x: x + m.b(torch.tanh(m.a(m.norm(x)))), "b"),
    "post-norm": (lambda m, x: m.norm(x + m.b(torch.tanh(m.a(x)))), "b"),
    "norm after the branch": (lambda m, x: x + m.norm(m.a(x)), "a"),
    "dropout": (lambda m, x: x + m.drop(m.a(x)), "a"),
    "layer scale": (lambda m, x: x + m.scale * m.a(x), "a"),
    "scaled branch": (lambda m, x: x + 0.5 * m.a(x), "a"),
    "scaled stream": (lambda m, x: 2.0 * x + m.a(torch.relu(x)), "a"),
    "reshaped": (lambda m, x: x.view(-1, 8) + m.a(torch.relu(x)).view(-1, 8), "a"),
    "two layers": (lambda m, x: (h := x + m.a(torch.relu(x))) + m.b(torch.relu(h)), "ab"),
    "parallel, branches first": (lambda m, x: m.a(torch.relu(x)) + m.b(torch.tanh(x)) + x, "ab"),
    "parallel, stream first": (lambda m, x: x + m.a(torch.relu(x)) + m.b(torch.tanh(x)), "ab"),
    "parallel behind one norm": (lambda m, x: x + m.a(h := m.norm(x)) + m.b(torch.relu(m.c(h))), "ab"),
    "two layers, both parallel": (
        lambda m, x: (h := x + m.a(torch.relu(x)) + m.b(torch.tanh(x))) + m.c(torch.relu(h)) + m.d(torch.tanh(h)),
        "abcd",
    ),
    "stream that is itself a product": (lambda m, x: (h := m.a(x)) + m.b(torch.relu(h)), "b"),
    "low-rank update of a writer": (lambda m, x: x + (m.a(h := m.norm(x)) + m.c(m.b(h))), "ac"),
    "gated branch": (lambda m, x: x + torch.sigmoid(m.a(x)) * m.b(x), "b"),
    "gated linear unit": (lambda m, x: x + m.c(torch.sigmoid(m.a(x)) * m.b(x)), "c"),
    "experts": (experts, "ac"),
    # no stream, or no product that reaches it
    "chain": (lambda m, x: m.b(torch.relu(m.a(x))), ""),
    "low-rank sum": (lambda m, x: m.a(x) + m.c(m.b(x)), ""),
    "gate": (lambda m, x: torch.sigmoid(m.a(x)) * m.b(x), ""),
    "nonlinear branch": (lambda m, x: x + torch.relu(m.a(x)), ""),
    "tanh GELU of a product": (lambda m, x: tanh_gelu(m.a(x)), ""),
    "tanh GELU of a reshaped product": (lambda m, x: tanh_gelu(m.a(x).view(-1, 8)), ""),
    "tanh GELU inside a branch": (lambda m, x: x + m.b(tanh_gelu(m.a(x))), "b"),
    "product plus its own mean": (lambda m, x: (h := m.a(x)) + h.mean(-1, keepdim=True), ""),
    "rotary": (lambda m, x: (q := m.a(x)) * m.cos + rotate(q) * m.sin, ""),
    "rotary from the product itself": (lambda m, x: (q := m.a(x)) + rotate(q) * m.sin, ""),
    "attention scores": (lambda m, x: torch.softmax(m.a(x) @ m.b(x).transpose(1, 2) + 1.0, -1) @ m.c(x), ""),
    "sum of constants": (lambda m, x: m.a(x) + m.scale, ""),
    "one bias in two places": (lambda m, x: m.b(torch.relu(m.a(x) + m.scale)) + m.scale, ""),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_writers_of_a_block(name):
    function, keys = BLOCKS[name]
    model = Forward(function)
    assert writers(model) == set(keys), "traced symbolically"
    assert writers(model, X) == set(keys), "exported"


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_writers_of_pytorch_s_own_encoder_layer(norm_first):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    assert writers(model, X) == {"self_attn.out_proj", "linear2"}


def test_a_linear_stack_without_sums_has_no_writer():
    given = small_model("mlp")
    assert {site.residual for site in sites_of(given.model, given.inputs)} == {False}


@pytest.mark.parametrize("name", ["raw", "gpt2"])
def test_five_captures_agree(name):
    given = small_model(name)
    first, *others = [sites_of(given.model, given.inputs) for _ in range(5)]
    assert all(other == first for other in others)
