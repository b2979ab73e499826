"""What the speed matrix runs on: decoder layers of given sizes, and the shapes of their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Qwen3 decoder; ``vocabulary`` 0 leaves norm and head out."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head: int
    layers: int
    vocabulary: int = 0


CONFIGS = {
    "tiny": Sizes(64, 96, 4, 2, 16, layers=2, vocabulary=128),
    "qwen3-0.6b-layer": Sizes(1024, 3072, 16, 8, 128, layers=1),
    "qwen3-0.6b": Sizes(1024, 3072, 16, 8, 128, layers=28, vocabulary=151936),
    "qwen3-4b": Sizes(2560, 9728, 32, 8, 128, layers=36, vocabulary=151936),
}


@dataclass(frozen=True)
class Shape:
    """Rows and tokens of a row; ``training`` for a step instead of a forward."""

    rows: int
    tokens: int
    training: bool = False


def shapes(tokens: int) -> dict[str, Shape]:
    """The shapes of the matrix, the most telling ones first; a decoding step has one token per row, and no past."""
    found = {"prefill": Shape(1, tokens), "decode 1": Shape(1, 1), "training": Shape(1, tokens, training=True)}
    return found | {"decode 8": Shape(8, 1), "decode 32": Shape(32, 1)}


class Decoder(nn.Module):
    """Decoder layers of transformers with random weights, from embeddings (rows, tokens, hidden) on.

    In inference the head sees the last token only, as when text is generated; ``every_token`` shows it all of them.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        from transformers import Qwen3Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

        config = Qwen3Config(
            hidden_size=sizes.hidden, intermediate_size=sizes.mlp, num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads, head_dim=sizes.head, num_hidden_layers=sizes.layers,
            attn_implementation="sdpa",
        )  # fmt: skip
        self.layers = nn.ModuleList(Qwen3DecoderLayer(config, i) for i in range(sizes.layers))
        self.rotary = Qwen3RotaryEmbedding(config)
        self.norm = Qwen3RMSNorm(sizes.hidden) if sizes.vocabulary else nn.Identity()
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False) if sizes.vocabulary else nn.Identity()
        self.every_token = False

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or hidden states where there is no head."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        embeddings = self.rotary(x, positions)
        for layer in self.layers:
            out = layer(x, position_embeddings=embeddings, position_ids=positions)
            x = out[0] if isinstance(out, tuple) else out
        if not self.every_token and not isinstance(self.head, nn.Identity):
            x = x[:, -1:]
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def decoder(sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int) -> Decoder:
    """A frozen decoder in eval mode."""
    with torch.random.fork_rng(devices=[]), device:  # made there: a large model takes long on a CPU
        torch.manual_seed(seed)
        model = Decoder(sizes)
    return model.to(dtype).eval().requires_grad_(False)


def inputs(sizes: Sizes, shape: Shape, like: Any, seed: int) -> Tensor:
    """Random embeddings, on the device and in the dtype of a tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape.rows, shape.tokens, sizes.hidden, generator=generator).to(like)
