"""FX graphs and nothing else: capture a model, find its linear sites, insert, fold, merge, and check every step."""

from passes.base import Pass, PassResult
from passes.capture import Capture, capture, forward_call
from passes.errors import (
    AdapterError,
    CaptureError,
    ExportError,
    InputError,
    PassError,
    RankError,
    SurgeryError,
    TargetError,
    VariantError,
    WeightError,
)
from passes.inspection import Inspection, inspect_model
from passes.sites import Site, Skipped

__all__ = [
    "AdapterError",
    "Capture",
    "CaptureError",
    "ExportError",
    "InputError",
    "Inspection",
    "Pass",
    "PassError",
    "PassResult",
    "RankError",
    "Site",
    "Skipped",
    "SurgeryError",
    "TargetError",
    "VariantError",
    "WeightError",
    "capture",
    "forward_call",
    "inspect_model",
]
