"""ONNX, for ONNX Runtime and whatever reads ONNX.

``merged``     the dense model at the present coeff; nothing in the graph tells that there was an adapter.
``live``       the adapter stays in the graph and ``coeff`` is an input: a number or one per row, 1.0 when left out.
``swappable``  as ``live``, and the core's tensors are inputs too, the present ones by default: ``export_core`` writes
               other trained cores as files of some KB, which ONNX Runtime activates for a run.

``transformers`` models go through ``transformers.exporters.OnnxExporter``, all others through ``torch.onnx.export``.
Batch and sequence are dynamic. Names are the captured ones (``input_ids``, ``logits``, ...). No tensor is stored twice,
and no stack trace and no path is written, so that two exports are byte-identical.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporters.onnx.capture import Knob, convert, core_knobs, named_inputs, put, rows_of, steering_knob
from exporters.onnx.cores import write_core
from exporters.onnx.finish import finish, save, tensor_bytes, written_size
from exporters.onnx.generation import Cached, compare_generation
from exporters.onnx.runtime import Runtime, check_file, coefficients, compare, providers
from exporters.shared.report import Exported, need, working_copy
from surgery.errors import ExportError
from surgery.verbs.apply import detach_all
from surgery.verbs.steer_and_merge import merge, set_coeff, sites

DEFAULT_NAME = "model.onnx"
MODES = ("merged", "live", "swappable")


def write(
    model: nn.Module,
    path: Path,
    example_inputs: Any,
    mode: str = "merged",
    opset: int | None = None,
    use_cache: bool = False,
    check: bool = True,
    against_base: bool = False,
) -> Exported:
    """Export to an ONNX file and compare it with PyTorch in ONNX Runtime.

    Args:
        mode: "merged", "live" or "swappable".
        opset: ONNX operator set; the exporter's default if None.
        use_cache: of a causal language model, take and give keys and values, in one graph for prefill and decoding.
        check: run it in ONNX Runtime. Without, only ``onnx.checker`` looks at it and the error is reported as NaN: for
            a dtype that does not run here, as bfloat16 on a CPU.
        against_base: also convert the base model, to report its size.

    Raises:
        ExportError: mode or dtype is not supported, or ONNX Runtime's results differ from PyTorch's.
    """
    need("onnxscript", "onnx")
    need("onnxruntime", "onnx")
    if mode not in MODES:
        raise ExportError(f"mode must be one of {', '.join(map(repr, MODES))}, found {mode!r}")
    dtype = _dtype(model, check=check)
    reference = working_copy(model)
    operated = bool(sites(reference))
    if mode != "merged" and not operated:
        raise ExportError(f"mode={mode!r} needs an adapter, and {type(model).__name__} carries none")
    subject = _subject(reference, named_inputs(reference, example_inputs), use_cache=use_cache)
    rows = 1 if mode == "merged" else rows_of(reference, lambda: subject.run(subject.inputs), subject.inputs)
    knobs = [] if mode == "merged" else [steering_knob(reference, rows)]
    cores = core_knobs(reference) if mode == "swappable" else []
    source = merge(working_copy(model), untie=True) if mode == "merged" and operated else reference
    graph = convert(source, subject.inputs, [*knobs, *cores], opset, subject.call)
    shared = finish(graph, subject.inputs, [*knobs, *cores], subject.axes)
    details = {"mode": mode, "opset": graph.opset_imports.get(""), "bytes": save(graph, path), "shared": shared}
    if mode != "merged":
        parts = [t for s in sites(reference).values() for t in (*s.factors.buffers(), *s.core.tensors().values())]
        details["adapter_bytes"] = tensor_bytes(parts)
    if against_base:
        details["base_bytes"] = _base_size(model, subject, opset, path)
    check_file(path)
    if not check:
        return Exported(float("nan"), details)
    coeffs: list[torch.Tensor | None] = [*coefficients(rows)] if knobs else [None]
    error, counts = _compare(subject, Runtime(path, dtype), coeffs, cores, path)
    return Exported(error, details | counts)


@dataclass(frozen=True)
class _Subject:
    """A model, the inputs that it is exported with, and how it is called with them.

    Attributes:
        call: gets the model's forward and the inputs; None for the forward itself.
        axes: names of free sizes.
    """

    model: nn.Module
    inputs: dict[str, Any]
    call: Callable[..., Any] | None
    axes: Mapping[str, Mapping[int, str]]
    cached: Cached | None

    def run(self, inputs: Mapping[str, Any]) -> Any:
        return self.model(**inputs) if self.call is None else self.call(self.model, **inputs)


def _subject(model: nn.Module, inputs: dict[str, Any], *, use_cache: bool) -> _Subject:
    if not use_cache:
        return _Subject(model, inputs, None, {}, None)
    cached = Cached(model, inputs)
    return _Subject(model, cached.inputs, cached.forward, cached.axes, cached)


def _dtype(model: nn.Module, *, check: bool) -> torch.dtype:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if check and not providers(dtype):
        raise ExportError(
            f"ONNX Runtime cannot run {dtype} here, so an export could not be checked; use float32, float16 or float64,"
            " or pass check=False to export without a comparison"
        )
    return dtype


def _base_size(model: nn.Module, subject: _Subject, opset: int | None, path: Path) -> int:
    """The bytes of the same export of the model without its adapter."""
    base = working_copy(model)
    if sites(base):
        detach_all(base)
    graph = convert(base, subject.inputs, (), opset, subject.call)
    finish(graph, subject.inputs, (), subject.axes)
    return written_size(graph, path)


def _compare(
    subject: _Subject, runtime: Runtime, coeffs: list[torch.Tensor | None], cores: list[Knob], path: Path
) -> tuple[float, dict[str, int]]:
    """Compare with PyTorch at several coeffs; with a cache in each of its uses, and with another core, from a file."""
    model, cached = subject.model, subject.cached
    worst, comparisons, tokens = 0.0, 0, 0
    moved = {knob.name: _moved(knob.default) for knob in cores}
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        other = Path(temporary) / "other.onnx_adapter"
        if moved:
            write_core({name: value.cpu() for name, value in moved.items()}, other)
        for core in (None, other) if moved else (None,):
            with put(cores, list(moved.values())) if core else nullcontext():
                for coeff in coeffs:
                    if coeff is not None:
                        set_coeff(model, coeff)
                    for inputs in cached.shapes() if cached else (subject.inputs,):
                        error = compare(runtime, partial(subject.run, inputs), inputs, coeff, core)
                        worst, comparisons = max(worst, error), comparisons + 1
                if cached:
                    tokens += compare_generation(cached, runtime, coeff, core)
    return worst, {"comparisons": comparisons} | ({"tokens": tokens} if cached else {})


def _moved(value: torch.Tensor) -> torch.Tensor:
    """Core values that differ from the present ones in every entry."""
    shift = torch.linspace(-0.2, 0.3, value.numel(), dtype=value.dtype, device=value.device)
    return value * 0.5 + shift.reshape(value.shape)
