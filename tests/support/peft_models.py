"""Models exported as LoRA and loaded by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from surgery import (
    apply_surgery,
    merge,
    sites,
)
from tests.support.calibration_data import calibration_for
from tests.support.tolerance import assert_close
from tests.support.zoo import SmallModel, built_once, small_model


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in sites(model).values():
            for name, parameter in site.core.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise.abs().clamp(0.1, 0.9) if name == "alpha" else noise * 0.3)
    return model


def operate(p: SmallModel, variant: Any = "antipasto", **options: Any) -> SmallModel:
    options = {
        "example_inputs": p.inputs,
        "calibration": calibration_for(variant, p.inputs),
        "progress": False,
        **options,
    }
    options = {"target_modules": "all-linear", **options}
    if isinstance(variant, str):
        options = {"r": 6, **options}
    trained(apply_surgery(p.model, variant, **options))
    return p


@built_once
def operated(name: str, variant: Any = "antipasto", dtype: torch.dtype = torch.float32, **options: Any) -> SmallModel:
    return operate(small_model(name, dtype), variant, **options)


def loaded(p: SmallModel, base: nn.Module, path: Path) -> torch.Tensor:
    """What PEFT's model gives, adapters beside the weights."""
    model = PeftModel.from_pretrained(base, path).eval()
    return p.run(model)


def ranks(path: Path) -> dict[str, int]:
    tensors = load_file(path / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


def exact_change(site: Any) -> torch.Tensor:
    """``U D^T Vh`` (d_out, d_in) from the stored tensors, in float64."""
    change = site.delta_weight(torch.float64).detach()
    return change if site.layout == "out_in" else change.T


def assert_same_in_peft(p: SmallModel, base: Any, path: Path) -> None:
    """PEFT's outputs are the model's, and what it merges are the weights that ``merge`` gives."""
    dtype = next(p.model.parameters()).dtype
    assert_close(loaded(p, base(), path), p.run(), dtype)
    merged = PeftModel.from_pretrained(base(), path).eval().merge_and_unload().state_dict()
    expected = merge(p.model, untie=True).state_dict()
    assert merged.keys() == expected.keys()
    for name in expected:
        assert_close(merged[name], expected[name])
