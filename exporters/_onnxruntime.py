"""Run an exported graph in ONNX Runtime and compare it with PyTorch, output by output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path, tree_iter

from exporters._capture import valid_positions
from passes.errors import ExportError
from passes.tolerance import relative_error
from surgery.verbs import set_coeff

KNOB = "coeff"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2}


def compare(model: nn.Module, inputs: dict[str, Any], path: Path, coeffs: list[Any], dtype: torch.dtype) -> float:
    """Check the file and compare every output in ONNX Runtime with PyTorch, for several values of the knob.

    Raises:
        ExportError: the file is not valid, or the results differ by more than the dtype allows.
    """
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(path))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # both libraries raise types of their own
        raise ExportError(f"the exported graph is not valid: {str(error).strip()[:300]}") from error
    names = [value.name for value in session.get_inputs()]
    feed = {name: value for name, value in _flat_inputs(inputs) if name in names}
    if missing := sorted(set(names) - set(feed)):
        raise ExportError(f"the exported graph has inputs that the model does not have: {', '.join(missing)}")
    worst = 0.0
    for coeff in coeffs:
        if coeff is not None:
            set_coeff(model, coeff)
            feed[KNOB] = coeff.to(torch.float64 if dtype == torch.float64 else torch.float32).numpy()
        with torch.no_grad():
            expected = [leaf for leaf in tree_iter(model(**inputs)) if isinstance(leaf, torch.Tensor)]
        found = session.run(None, feed)
        if len(found) != len(expected):
            raise ExportError(f"the exported graph has {len(found)} outputs, the model {len(expected)}")
        pairs = zip(map(torch.from_numpy, found), expected, strict=True)
        deviation = max(
            relative_error(valid_positions(one, inputs), valid_positions(other.cpu(), inputs)) for one, other in pairs
        )
        if not deviation <= TOLERANCE[dtype]:
            at = "" if coeff is None else f" at coeff={coeff.tolist()}"
            raise ExportError(
                f"ONNX Runtime differs from PyTorch by {deviation:.3g} of the largest output{at}, "
                f"allowed for {dtype} is {TOLERANCE[dtype]:.0e}"
            )
        worst = max(worst, deviation)
    return worst


def coefficients(rows: int) -> list[torch.Tensor]:
    """Values of the knob to compare at: the default, identity, a negative one, and one per row."""
    values = [torch.tensor(value) for value in (1.0, 0.0, -0.5)]
    return values + ([torch.linspace(-1, 1, rows)] if rows > 1 else [])


def _flat_inputs(inputs: dict[str, Any]) -> list[tuple[str, Any]]:
    """Inputs as ONNX Runtime takes them: nested tensors by their dotted path, as the exporters name them."""
    flat = []
    for name, value in inputs.items():
        for key_path, leaf in tree_flatten_with_path(value)[0]:
            parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in key_path]
            if isinstance(leaf, torch.Tensor):
                flat.append((".".join([name, *parts]), leaf.detach().cpu().numpy()))
    return flat
