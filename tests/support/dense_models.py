"""Operated models to export as dense checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from surgery import (
    apply_surgery,
)
from tests.support.calibration_data import calibration_for
from tests.support.checkpoints import disturb
from tests.support.zoo import SmallModel, built_once, small_model


@built_once
def operated(name: str, dtype: torch.dtype = torch.float32, variant: str = "antipasto", **options: Any) -> SmallModel:
    p = small_model(name, dtype)
    options.setdefault("calibration", calibration_for(variant, p.inputs))
    apply_surgery(p.model, variant, example_inputs=p.inputs, progress=False, **{"r": 6, **options})
    disturb(p.model)
    return p
