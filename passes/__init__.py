"""FX graphs and nothing else: capture a model, find its linear sites, insert, fold, merge, and check every step."""

from passes.analysis.linear_sites import Site, Skipped
from passes.capture.capture import Capture, capture, forward_call
from passes.capture.inspect_model import Inspection, inspect_model
from passes.errors import CaptureError, InputError, PassError, SurgeryError
from passes.infra.pass_base import Pass, PassResult

__all__ = [
    "Capture",
    "CaptureError",
    "InputError",
    "Inspection",
    "Pass",
    "PassError",
    "PassResult",
    "Site",
    "Skipped",
    "SurgeryError",
    "capture",
    "forward_call",
    "inspect_model",
]
