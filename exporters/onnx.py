"""ONNX, for ONNX Runtime and whatever reads ONNX.

``merged``  the dense model at the present coeff; nothing in the graph tells that there was an adapter.
``live``    the adapter stays in the graph and ``coeff`` is an input: a number or one per row, 1.0 when left out.

``transformers`` models go through ``transformers.exporters.OnnxExporter``, all others through ``torch.onnx.export``.
Batch and sequence are dynamic. Names are the captured ones (``input_ids``, ``logits``, ...). No stack trace and no
path is written, so that two exports are byte-identical.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_iter, tree_map_only

from exporters._base import Exported, inputs_for, need, working_copy
from exporters._capture import output_names
from exporters._onnxruntime import KNOB, TOLERANCE, coefficients, compare
from passes.capture import hub_inputs, is_pretrained, keyword_inputs
from passes.errors import ExportError, InputError
from passes.forward import keep_forward, quiet
from surgery.hosts import host_of
from surgery.verbs import merge, sites

DEFAULT_NAME = "model.onnx"
NOISY = ("transformers", "torch.onnx", "torch._export", "onnxscript", "onnx_ir")
PROTOBUF_LIMIT = 2 * 10**9


def write(
    model: nn.Module, path: Path, example_inputs: Any, mode: str = "merged", opset: int | None = None
) -> Exported:
    """Export to an ONNX file and compare it with PyTorch in ONNX Runtime.

    Args:
        mode: "merged" or "live".
        opset: ONNX operator set; the exporter's default if None.

    Raises:
        ExportError: mode or dtype is not supported, or ONNX Runtime's results differ from PyTorch's.
    """
    need("onnxscript", "onnx")
    need("onnxruntime", "onnx")
    if mode not in ("merged", "live"):
        raise ExportError(f"mode must be 'merged' or 'live', found {mode!r}")
    dtype = _dtype(model)
    reference = working_copy(model)
    if mode == "live" and not sites(reference):
        raise ExportError(f"mode='live' needs an adapter, and {type(model).__name__} carries none")
    inputs = _inputs(reference, example_inputs)
    live = mode == "live"
    subject = merge(working_copy(model), untie=True) if mode == "merged" and sites(reference) else reference
    graph = _convert(subject, {**inputs, KNOB: torch.ones(1)} if live else inputs, opset)
    _finish(graph, inputs)
    _save(graph, path)
    coeffs = coefficients(_rows(reference, inputs)) if live else [None]
    error = compare(reference, inputs, path, coeffs, dtype)
    return Exported(error, {"mode": mode, "opset": graph.opset_imports.get(""), "comparisons": len(coeffs)})


def _dtype(model: nn.Module) -> torch.dtype:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype not in TOLERANCE:
        names = ", ".join(str(d).removeprefix("torch.") for d in TOLERANCE)
        raise ExportError(f"ONNX Runtime cannot run {dtype} here, so an export could not be checked; use {names}")
    return dtype


def _inputs(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Inputs by name, with a batch of one doubled, since ``torch.export`` takes a size of one to be fixed.

    Raises:
        InputError: the model does not run on the inputs.
    """
    call = inputs_for(model, example_inputs)
    inputs = hub_inputs(model, call) if is_pretrained(model) else keyword_inputs(model, call)
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"the model does not run on the example inputs: {reason}") from error
    tensors = [leaf for leaf in tree_iter(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if {tensor.shape[0] for tensor in tensors} != {1}:
        return inputs
    doubled: dict[str, Any] = tree_map_only(torch.Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, inputs)
    try:
        with torch.no_grad():
            model(**doubled)
    except (RuntimeError, ValueError, IndexError):  # dimension 0 is not a batch: keep it as it is
        return inputs
    return doubled


def _rows(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Rows of the batch if every site sees them as dimension 0 of its input, so that each can have its coeff, or 1."""
    rows = next(leaf for leaf in tree_iter(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()).shape[0]
    found = sites(model).values()
    fits = [host_of(site) == "module" for site in found]

    def look(site: nn.Module, args: Any, kwargs: Any) -> None:
        x = next(iter((*args, *kwargs.values())))
        fits.append(x.dim() > 1 and x.shape[0] == rows)

    handles = [site.register_forward_pre_hook(look, with_kwargs=True) for site in found]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return rows if all(fits) else 1


@contextlib.contextmanager
def _named_forward(model: nn.Module, inputs: dict[str, Any], fixed: dict[str, Any]) -> Iterator[None]:
    """Give ``model.forward`` exactly the named inputs, with ``coeff`` among them in place of every site's buffer.

    Flags such as ``use_cache`` are bound here: an exporter sets them in the outermost configuration only.
    """
    original = model.forward
    found = list(sites(model).values())

    def forward(**kwargs: Any) -> Any:
        if KNOB not in inputs:
            return original(**kwargs, **fixed)
        coeff = kwargs.pop(KNOB)  # (1,): a site reshapes it to (-1, 1, ..., 1), which takes any number of rows
        before = [site.core.coeff for site in found]
        try:
            for site, old in zip(found, before, strict=True):
                value = coeff if host_of(site) == "module" else coeff.reshape(())
                site.core._buffers[KNOB] = value.to(old.dtype)
            return original(**kwargs, **fixed)
        finally:
            for site, old in zip(found, before, strict=True):
                site.core._buffers[KNOB] = old

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with keep_forward(model):
        model.forward = forward
        yield


def _convert(model: nn.Module, inputs: dict[str, Any], opset: int | None) -> Any:
    """Capture and convert to an ``onnx_ir.Model`` whose batch, sequence and other free sizes are dynamic."""
    model = _Called(model) if isinstance(model, fx.GraphModule) else model
    fixed = {name: value for name, value in inputs.items() if value is None or isinstance(value, bool)}
    traced = {name: value for name, value in inputs.items() if name not in fixed}
    shapes = {name: _all_dynamic(value) if name != KNOB else None for name, value in traced.items()}
    try:
        with torch.no_grad(), _named_forward(model, traced, fixed), quiet(*NOISY):
            if is_pretrained(model):
                from transformers.exporters import OnnxConfig, OnnxExporter

                config = OnnxConfig(dynamic_shapes=shapes, opset_version=opset)
                exported = OnnxExporter().export(model, dict(traced), config)
                program = getattr(exported, "program", exported)  # transformers >= 5.20 wraps the program
            else:
                captured = torch.export.export(model, (), traced, dynamic_shapes=shapes, strict=False)
                program = torch.onnx.export(
                    captured,
                    input_names=list(traced),
                    output_names=output_names(model(**traced)),
                    opset_version=opset,
                    dynamo=True,
                    optimize=True,
                    verbose=False,
                )
    except Exception as error:  # any operation may lack a translation; the cause is chained
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise ExportError(
            f"{type(model).__name__} cannot be exported to ONNX: {type(error).__name__}: {reason}"
        ) from error
    return getattr(program, "model", program)


class _Called(nn.Module):
    """Calls a graph module, since ``torch.export`` interprets one that it is given and passes its ``forward`` by."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.inner = graph

    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**kwargs)


def _all_dynamic(value: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: dict.fromkeys(range(t.dim()), torch.export.Dim.AUTO), value)


def _finish(graph: Any, inputs: dict[str, Any]) -> None:
    """Give the knob its default, and drop stack traces and inferred shapes, which hold paths and change by the run."""
    import onnx_ir

    for value in [value for value in graph.graph.inputs if value.name == KNOB]:
        for node in list(value.consumers()) if value.dtype != onnx_ir.DataType.FLOAT else ():
            if node.op_type == "Cast" and node.attributes["to"].as_int() == onnx_ir.DataType.FLOAT:
                node.outputs[0].replace_all_uses_with(value)
                graph.graph.remove(node, safe=True)
        if value.dtype != onnx_ir.DataType.DOUBLE:
            value.dtype = onnx_ir.DataType.FLOAT
        # declared as a number: ONNX Runtime then takes a number, (1,) or (batch,), and the graph reshapes it
        value.shape = onnx_ir.Shape([])
        value.const_value = onnx_ir.tensor(1.0, dtype=value.dtype, name=KNOB)
        graph.graph.register_initializer(value)
    _name_sizes(graph.graph, inputs)
    kept = {id(v) for v in (*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values())}
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for node in onnx_ir.traversal.RecursiveGraphIterator(graph.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            if id(output) not in kept:
                output.shape, output.type = None, None
    for value in (*graph.graph.inputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()


def _name_sizes(graph: Any, inputs: dict[str, Any]) -> None:
    """Name the free sizes, which the capture calls s72 and the like: "batch", "sequence", else by input and axis."""
    import onnx_ir

    rows = {tuple(leaf.shape)[:1] for leaf in tree_iter(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()}
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or () if value.name != KNOB else ()):
            if not str(size).isdigit() and str(size) not in names:
                first = {0: "batch", 1: "sequence"}.get(axis, "")
                shared = axis == 0 and len(rows) == 1  # all inputs have the rows of one batch
                free = first and first not in names.values()
                names[str(size)] = first if shared or free else f"{value.name}_{axis}"
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None and value.name != KNOB:
            sizes = [names.get(str(size), str(size)) for size in value.shape]
            value.shape = onnx_ir.Shape([int(size) if size.isdigit() else size for size in sizes])


def _save(graph: Any, path: Path) -> None:
    import onnx_ir

    size = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value is not None)
    external = f"{path.name}.data" if size > PROTOBUF_LIMIT else None
    onnx_ir.save(graph, path, external_data=external)
