"""Small models with random weights, each with inputs that fit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import pytest
import torch
from torch import nn

P = ParamSpec("P")
T = TypeVar("T")


def full(*names: str) -> list[Any]:
    """Parameters that only ``make test-full`` takes."""
    return [pytest.param(name, marks=pytest.mark.full) for name in names]


def in_the_gate(names: Iterable[str], *others: str) -> list[Any]:
    """All of them, the others for ``make test-full`` alone: what is registered later is in the gate."""
    return [pytest.param(name, marks=[pytest.mark.full] * (name in others)) for name in names]


# variants that share basis or core with one that the gate takes, where a case is an export
VARIED = ("antipasto_arrow", "antipasto_asvd", "antipasto_corda", "antipasto_dplr", "lora_xs", "sspace_scale")

PYTORCH: dict[str, Callable[..., tuple[nn.Module, Any]]] = {}
HUB: dict[str, Callable[..., tuple[nn.Module, Any]]] = {}


@dataclass
class SmallModel:
    """A model in eval mode and example inputs for it."""

    name: str
    model: nn.Module
    inputs: Any

    def run(self, model: nn.Module | None = None, inputs: Any = None) -> torch.Tensor:
        """First output of a model on the inputs, without gradients."""
        with torch.no_grad():
            return self.forward(model, inputs).detach()

    def forward(self, model: nn.Module | None = None, inputs: Any = None) -> torch.Tensor:
        """First output of a model on the inputs."""
        model = self.model if model is None else model
        inputs = self.inputs if inputs is None else inputs
        if isinstance(inputs, dict):
            out = model(**inputs)
        else:
            out = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        return out if isinstance(out, torch.Tensor) else out[0]


def built_once(build: Callable[P, T]) -> Callable[P, T]:
    """Let what a function builds, from a seed of its own, be built once in a process, and every caller get a copy.

    The copies are equal, and so are the random numbers that follow, whichever test asks first.
    """
    known: dict[tuple[Any, ...], tuple[T, torch.Tensor]] = {}

    @functools.wraps(build)
    def copied(*args: P.args, **kwargs: P.kwargs) -> T:
        key = (args, *sorted(kwargs.items()))
        try:
            found = known.get(key)
        except TypeError:  # a list, or a tensor of a test's own
            return build(*args, **kwargs)
        if found is None:
            found = known[key] = build(*args, **kwargs), torch.get_rng_state()
        torch.set_rng_state(found[1])
        return copy.deepcopy(found[0])

    return copied


def small_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> SmallModel:
    """Build a small model by name, always with the same weights and inputs.

    Args:
        sizes: ``layers`` of a decoder, where half of its nodes will do and take half of the time.
    """
    torch.manual_seed(seed)
    model, inputs = {**PYTORCH, **HUB}[name](**sizes)
    made: dict[int, torch.Tensor] = {}

    def cast(tensor: torch.Tensor) -> torch.Tensor:  # one tensor given twice stays one tensor
        return made.setdefault(id(tensor), tensor.to(dtype) if tensor.is_floating_point() else tensor)

    inputs = torch.utils._pytree.tree_map_only(torch.Tensor, cast, inputs)
    return SmallModel(name, model.to(dtype).eval(), inputs)


def _plain(build: Callable[[], tuple[nn.Module, Any]]) -> Any:
    PYTORCH[build.__name__] = build
    return build


def _hub(build: Callable[[], tuple[nn.Module, Any]]) -> Any:
    HUB[build.__name__] = build
    return build


def _tokens(vocabulary: int = 64) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (2, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@_plain
def mlp() -> tuple[nn.Module, Any]:
    return nn.Sequential(
        nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 20, bias=False), nn.Tanh(), nn.Linear(20, 6)
    ), torch.randn(5, 12)


@_plain
def attention() -> tuple[nn.Module, Any]:
    x = torch.randn(2, 5, 16)
    return nn.MultiheadAttention(16, 4, batch_first=True), (x, x, x)


@_plain
def encoder_layer() -> tuple[nn.Module, Any]:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), torch.randn(2, 5, 16)


class Raw(nn.Module):
    """Raw parameters used as ``x @ w`` and ``F.linear``, one module called twice, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 16) / 4)
        self.v = nn.Parameter(torch.randn(16, 16) / 4)
        self.twice = nn.Linear(16, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x @ self.w
        h = h + nn.functional.linear(torch.tanh(h), self.v)
        return self.out(self.twice(torch.relu(self.twice(h))))


class Forward(nn.Module):
    """A module whose forward is a given function of itself and one input; plain tensors become buffers."""

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


@_plain
def raw() -> tuple[nn.Module, Any]:
    return Raw(), torch.randn(4, 12)


@_hub
def qwen3(layers: int = 2) -> tuple[nn.Module, Any]:
    import transformers as t

    config = t.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return t.Qwen3ForCausalLM(config), _tokens()


@_hub
def llama(layers: int = 2) -> tuple[nn.Module, Any]:
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=64, attention_bias=True,
    )  # fmt: skip
    return t.LlamaForCausalLM(config), _tokens()


@_hub
def gpt2(layers: int = 2) -> tuple[nn.Module, Any]:
    import transformers as t

    config = t.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=layers, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    return t.GPT2LMHeadModel(config), _tokens()


@_hub
def bert() -> tuple[nn.Module, Any]:
    import transformers as t

    config = t.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return t.BertForSequenceClassification(config), _tokens()


@_hub
def vit() -> tuple[nn.Module, Any]:
    import transformers as t

    config = t.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        initializer_range=0.2, num_labels=12,
    )  # fmt: skip
    return t.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


@_hub
def t5() -> tuple[nn.Module, Any]:
    import transformers as t

    config = t.T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0)
    return t.T5ForConditionalGeneration(config), {**_tokens(), "decoder_input_ids": torch.randint(0, 64, (2, 4))}


PLAIN_NAMES = tuple(PYTORCH)
HUB_NAMES = tuple(HUB)
ALL_NAMES = PLAIN_NAMES + HUB_NAMES
