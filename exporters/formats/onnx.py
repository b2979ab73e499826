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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from exporters.onnx.adapter_inputs import AdapterInput, coefficient_input, core_inputs
from exporters.onnx.cores import write_core
from exporters.onnx.finish import finish, save, tensor_bytes, written_size
from exporters.onnx.generation import Cached, compare_generation
from exporters.onnx.onnx_program import convert, named_inputs, steerable_rows
from exporters.onnx.runtime import Runtime, check_file, coefficients, compare_with_runtime, providers
from exporters.shared.export_report import Exported, need, working_copy
from exporters.shared.functional import Function, FunctionalModel
from exporters.shared.options import option
from passes.ir.forward_context import state_kept
from surgery.errors import ExportError
from surgery.verbs.apply import detach_all
from surgery.verbs.merge import merge
from surgery.verbs.steer import set_coeff, sites

DEFAULT_NAME = "model.onnx"


@dataclass(frozen=True)
class Options:
    """Options of the format "onnx".

    Without ``check`` only ``onnx.checker`` looks at the graph, and the error is reported as NaN: for a dtype that does
    not run here, as bfloat16 on a CPU.
    """

    mode: Literal["merged", "live", "swappable"] = option(
        "merged", "merge the adapter, keep it with coeff as an input, or with its core as inputs too"
    )
    opset: int | None = option(None, "ONNX operator set; the exporter's default if None")
    use_cache: bool = option(
        False, "of a causal language model, take and give keys and values, in one graph for prefill and decoding"
    )
    check: bool = option(True, "run it in ONNX Runtime and compare")
    against_base: bool = option(False, "also convert the base model, to report its size")


def write(model: nn.Module, path: Path, example_inputs: object, options: Options) -> Exported:
    """Export to an ONNX file and compare it with PyTorch in ONNX Runtime.

    Raises:
        ExportError: the dtype is not supported, or ONNX Runtime's results differ from PyTorch's.
    """
    need("onnxscript", "onnx")
    need("onnxruntime", "onnx")
    mode = options.mode
    dtype = _dtype(model, check=options.check)
    reference = working_copy(model)
    operated = bool(sites(reference))
    if mode != "merged" and not operated:
        raise ExportError(f"mode={mode!r} needs an adapter, and {type(model).__name__} carries none")
    inputs = named_inputs(reference, example_inputs)
    with state_kept(reference):
        subject = _subject(reference, inputs, use_cache=options.use_cache)
    rows = 1 if mode == "merged" else steerable_rows(reference, inputs)
    steering = [] if mode == "merged" else [coefficient_input(reference, rows)]
    cores = core_inputs(reference) if mode == "swappable" else []
    source = merge(working_copy(model), untie=True) if mode == "merged" and operated else reference
    graph = convert(source, subject.inputs, [*steering, *cores], options.opset, subject.call)
    shared = finish(graph, subject.inputs, [*steering, *cores], subject.axes)
    details = {"mode": mode, "opset": graph.opset_imports.get(""), "bytes": save(graph, path), "shared": shared}
    if mode != "merged":
        parts = [t for s in sites(reference).values() for t in (*s.factors.buffers(), *s.core.tensors().values())]
        details["adapter_bytes"] = tensor_bytes(parts)
    if options.against_base:
        details["base_bytes"] = _base_size(model, subject, options.opset, path)
    check_file(path)
    if not options.check:
        return Exported(float("nan"), details)
    coeffs: list[torch.Tensor | None] = [*coefficients(rows)] if steering else [None]
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
    inputs: Mapping[str, object]
    call: Function | None
    axes: Mapping[str, Mapping[int, str]]
    cached: Cached | None

    def run(self, model: Function, inputs: Mapping[str, object]) -> object:
        with state_kept(self.model):
            return model(**inputs) if self.call is None else self.call(model, **inputs)


def _subject(model: nn.Module, inputs: dict[str, object], *, use_cache: bool) -> _Subject:
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
    subject: _Subject, runtime: Runtime, coeffs: list[torch.Tensor | None], cores: list[AdapterInput], path: Path
) -> tuple[float, dict[str, int]]:
    """Compare with PyTorch at several coeffs; with a cache in each of its uses, and with another core, from a file."""
    model, cached = subject.model, subject.cached
    worst, comparisons, tokens = 0.0, 0, 0
    moved = {one.name: _moved(one.default) for one in cores}
    functional = FunctionalModel(model)
    tensors: dict[str, torch.Tensor] = {}
    for one in cores:
        tensors |= one.mapping(moved[one.name])
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        other = Path(temporary) / "other.onnx_adapter"
        if moved:
            write_core({name: value.cpu() for name, value in moved.items()}, other)
        for core in (None, other) if moved else (None,):
            called = partial(functional, tensors) if core else model
            for coeff in coeffs:
                if coeff is not None:
                    set_coeff(model, coeff)
                with state_kept(model):
                    shapes = [*cached.shapes(called)] if cached else [subject.inputs]
                for inputs in shapes:
                    error = compare_with_runtime(runtime, partial(subject.run, called, inputs), inputs, coeff, core)
                    worst, comparisons = max(worst, error), comparisons + 1
            if cached:
                with state_kept(model):
                    tokens += compare_generation(cached, called, runtime, coeff, core)
    return worst, {"comparisons": comparisons} | ({"tokens": tokens} if cached else {})


def _moved(value: torch.Tensor) -> torch.Tensor:
    """Core values that differ from the present ones in every entry."""
    shift = torch.linspace(-0.2, 0.3, value.numel(), dtype=value.dtype, device=value.device)
    return value * 0.5 + shift.reshape(value.shape)
