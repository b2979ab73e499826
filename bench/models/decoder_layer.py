"""What the lowerings' benchmark compares: a decoder layer of Qwen3-0.6B's sizes, operated on, naive, and with LoRA."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from surgery import apply_surgery, sites

SEED = 0
HIDDEN, MLP, HEADS, KV_HEADS, HEAD = 1024, 3072, 16, 8, 128
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Layer(nn.Module):
    """A decoder layer of transformers, called with hidden states (1, tokens, hidden) alone."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import Qwen3Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

        config = Qwen3Config(
            hidden_size=HIDDEN, intermediate_size=MLP, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
            head_dim=HEAD, num_hidden_layers=1, attn_implementation="sdpa",
        )  # fmt: skip
        self.layer = Qwen3DecoderLayer(config, 0)
        self.rotary = Qwen3RotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states after the layer."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        out = self.layer(x, position_embeddings=self.rotary(x, positions), position_ids=positions)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def layer() -> tuple[nn.Module, Tensor]:
    """The layer and 512 tokens, for ``surgery cost bench.models.decoder_layer:layer``."""
    return Layer(), torch.randn(1, 512, HIDDEN)


class Naive(nn.Module):
    """The residual form as it is usually written: ``x W_res^T + ((x Vh^T) (S + S elu(g))) U^T``."""

    def __init__(self, site: Any) -> None:
        super().__init__()
        for name in ("U", "S", "Vh"):
            self.register_buffer(name, getattr(site.factors, name).clone())
        self.register_buffer("W_res", site.weight.detach() - (self.U * self.S) @ self.Vh)
        self.g = nn.Parameter(site.core.g.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """The site's output."""
        gain = self.S * (1 + nn.functional.elu(self.g))
        return x @ self.W_res.T + ((x @ self.Vh.T) * gain) @ self.U.T


def operated(base: nn.Module, r: int, lowering: str) -> nn.Module:
    """A copy of the layer with live cores."""
    model = apply_surgery(copy.deepcopy(base), "antipasto", r=r, lowering=lowering, progress=False)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for site in sites(model).values():
            site.core.g.copy_(0.2 * torch.randn(len(site.core.g), generator=generator))
    return model


def naive(base: nn.Module, r: int) -> nn.Module:
    """A copy of the layer in residual form."""
    model, live = copy.deepcopy(base).requires_grad_(False), operated(base, r, "lowrank")
    for key, site in sites(live).items():
        owner, _, name = key.rpartition(".")
        setattr(model.get_submodule(owner), name, Naive(site))
    return model


def lora(base: nn.Module, r: int) -> nn.Module:
    """A copy of the layer with PEFT's LoRA on the same projections."""
    from peft import LoraConfig, inject_adapter_in_model

    model = copy.deepcopy(base)
    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=r, target_modules=list(PROJECTIONS)), model)
    return model
