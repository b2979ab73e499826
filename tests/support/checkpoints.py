"""Checkpoint folders to merge into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from surgery import (
    sites,
)
from tests.support.zoo import small_model

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 16, "num_experts_per_tok": 2}


def build(name: str) -> Any:
    """A tiny model of an architecture that saves other names than its state dict has, or a model of the zoo."""
    torch.manual_seed(0)
    if name == "gpt_neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, intermediate_size=48)).eval()
    if name == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**EXPERTS, num_local_experts=4)).eval()
    if name == "olmoe":
        return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**EXPERTS, num_experts=4)).eval()
    if name == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **EXPERTS, num_experts=4, moe_intermediate_size=16, head_dim=8, decoder_sparse_step=1
        )
        return transformers.Qwen3MoeForCausalLM(config).eval()
    if name == "switch":
        sizes = {"num_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}
        config = transformers.SwitchTransformersConfig(
            vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_heads=4, decoder_start_token_id=0, **sizes
        )
        return transformers.SwitchTransformersForConditionalGeneration(config).eval()
    if name == "bert_lm":
        return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=48)).eval()
    if name == "bart":
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        config = transformers.BartConfig(
            vocab_size=64, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, **sizes
        )
        return transformers.BartForConditionalGeneration(config).eval()
    return small_model(name).model


def disturb(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for site in sites(model).values():
        for name, parameter in site.core.named_parameters():
            parameter.data.normal_(std=0.3, generator=generator)
            if name == "alpha":  # is clamped to [0, 1]
                parameter.data.abs_().add_(0.2)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype
        assert torch.equal(value, second[key]), key
