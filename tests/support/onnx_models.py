"""Operated models to export to ONNX, and sessions that run them."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch

from surgery import apply_surgery, sites
from tests.support.zoo import SmallModel, built_once, small_model


@built_once
def operated(name: str, dtype: torch.dtype = torch.float32, **sizes: int) -> SmallModel:
    p = small_model(name, dtype, **sizes)
    apply_surgery(p.model, "antipasto", r=6, example_inputs=p.inputs, progress=False)
    generator = torch.Generator().manual_seed(1)
    for site in sites(p.model).values():
        site.core.g.data.normal_(std=0.3, generator=generator)
    return p


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
