"""Small mixture-of-experts models whose expert weights are stacked."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

import surgery
from tests.support.zoo import built_once

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
IDS = torch.arange(12).reshape(2, 6)
EXPERTS = "model.layers.0.mlp.experts"


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def qwen3_moe() -> nn.Module:
    sizes = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": []}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **sizes, decoder_sparse_step=1))


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM(config)


BUILD = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    with torch.no_grad():
        for parameter in model.get_submodule(EXPERTS).parameters():
            parameter.mul_(10)  # so that the experts matter beside the residual stream
    return model


@built_once
def operated(name: str, variant: Any = "antipasto", **options: Any) -> nn.Module:
    options = {"r": 4, "target_modules": ["gate_up_proj", "down_proj"], "progress": False, **options}
    model = build(name)
    surgery.apply_surgery(model, variant, **options)
    return model
