"""From a model to an ``onnx_ir.Model``: its forward with named inputs, the adapter's tensors among them.

``transformers`` models go through ``transformers.exporters.OnnxExporter``, all others through ``torch.onnx.export``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from exporters.onnx.adapter_inputs import AdapterInput
from exporters.shared.export_report import example_call
from exporters.shared.failures import run_on_examples, type_and_message
from exporters.shared.functional import CalledGraph, Function, FunctionalModel, set_forward
from exporters.shared.outputs import output_names
from passes.capture.capture import all_dynamic, hub_inputs, is_pretrained, keyword_inputs, with_two_rows
from passes.errors import InputError
from passes.ir.forward_context import copied, quiet, state_kept
from passes.ir.torch_internals import tree_flatten_with_path, tree_iter
from surgery.errors import ExportError
from surgery.hosting.state import record_of, sites_of
from surgery.verbs.steer import sites

if TYPE_CHECKING:
    import onnx_ir

NOISY = ("transformers", "torch.onnx", "torch._export", "onnxscript", "onnx_ir")


def named_inputs(model: nn.Module, example_inputs: object) -> dict[str, object]:
    """Inputs by name, with a batch of one doubled, since ``torch.export`` takes a size of one to be fixed.

    Raises:
        InputError: the model does not run on the inputs.
    """
    call = example_call(model, example_inputs)
    inputs = hub_inputs(model, call) if is_pretrained(model) else keyword_inputs(model, call)
    with state_kept(model), torch.no_grad():
        run_on_examples(model, copied(((), inputs)))
    return with_two_rows(model, ((), inputs))[1]


def flat_inputs(inputs: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Inputs as a graph takes them: nested tensors by their dotted path, as the exporters name them."""
    flat = {}
    for name, value in inputs.items():
        for key_path, leaf in tree_flatten_with_path(value)[0]:
            parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in key_path]
            if isinstance(leaf, torch.Tensor):
                flat[".".join([name, *parts])] = leaf
    return flat


def steerable_rows(model: nn.Module, inputs: Mapping[str, object]) -> int:
    """Rows of the batch if the rows of every site are known, so that each can have its coeff, or 1."""
    rows = _first(inputs).shape[0]
    state = record_of(model)
    if any(site.host.changes_weight for site in sites(model).values()):
        return 1
    try:
        known = state.rows.prepare(model, sites_of(model, state), state.steering, ((), dict(inputs)))
    except InputError:  # the exported graph then takes one coeff for all rows
        return 1
    return rows if known else 1


def _first(inputs: Mapping[str, object]) -> torch.Tensor:
    """The input that tells the number of rows."""
    return next(leaf for leaf in tree_iter(dict(inputs)) if isinstance(leaf, torch.Tensor) and leaf.dim())


def convert(
    model: nn.Module,
    inputs: Mapping[str, object],
    extra: Sequence[AdapterInput] = (),
    opset: int | None = None,
    call: Function | None = None,
) -> onnx_ir.Model:
    """Capture and convert to an ``onnx_ir.Model`` whose batch, sequence and other free sizes are dynamic.

    Args:
        inputs: by the names that the graph's inputs get.
        extra: further inputs; their defaults are not in the graph yet.
        call: what is captured in place of the model's own forward: it gets that forward, and the inputs by name.

    Raises:
        ExportError: an operation has no translation, or the capture fails.
    """
    called = CalledGraph(model) if isinstance(model, fx.GraphModule) else model
    fixed = {name: value for name, value in inputs.items() if value is None or isinstance(value, bool)}
    traced = {name: value for name, value in inputs.items() if name not in fixed}
    names = [*traced, *(one.name for one in extra)]
    alias = _identifiers(names)
    values = {alias[name]: value for name, value in traced.items()}
    shapes = all_dynamic(values)
    values |= {alias[one.name]: one.example for one in extra}
    shapes |= {alias[one.name]: None for one in extra}
    named = _named_forward(called, FunctionalModel(model, called.forward), alias, fixed, extra, call)
    try:
        with torch.no_grad(), named, quiet(*NOISY):
            graph = (_of_hub if is_pretrained(model) else _of_module)(called, values, shapes, opset)
    except Exception as error:  # any operation may lack a translation; the cause is chained
        raise ExportError(f"{type(model).__name__} cannot be exported to ONNX: {type_and_message(error)}") from error
    original = {alias[name]: name for name in names if alias[name] != name}
    for value in graph.graph.inputs:
        value.name = original.get(value.name, value.name)
    return graph


def _of_hub(model: nn.Module, values: dict[str, object], shapes: dict[str, object], opset: int | None) -> onnx_ir.Model:
    from transformers.exporters import OnnxConfig, OnnxExporter

    exported = OnnxExporter().export(model, dict(values), OnnxConfig(dynamic_shapes=shapes, opset_version=opset))
    program = getattr(exported, "program", exported)  # transformers >= 5.20 wraps the program
    return getattr(program, "model", program)


def _of_module(
    model: nn.Module, values: dict[str, object], shapes: dict[str, object], opset: int | None
) -> onnx_ir.Model:
    captured = torch.export.export(model, (), values, dynamic_shapes=shapes, strict=False)
    program = torch.onnx.export(
        captured,
        input_names=list(flat_inputs(values)),
        output_names=output_names(model(**values)),
        opset_version=opset,
        dynamo=True,
        optimize=True,
        verbose=False,
    )
    return program.model  # type: ignore[union-attr]


@contextlib.contextmanager
def _named_forward(
    model: nn.Module,
    functional: FunctionalModel,
    alias: Mapping[str, str],
    fixed: Mapping[str, object],
    extra: Sequence[AdapterInput],
    call: Function | None,
) -> Iterator[None]:
    """Give ``model.forward`` exactly the named inputs, among them those that stand for tensors of the adapter.

    Flags such as ``use_cache`` are bound here: an exporter sets them in the outermost configuration only.
    """
    public = {name: key for key, name in alias.items()}

    def forward(**kwargs: torch.Tensor) -> object:
        given = {public[name]: value for name, value in kwargs.items()}
        # a cast comes first, so that it is all that reads an input
        values = [given.pop(one.name).to(one.default.dtype) for one in extra]
        tensors: dict[str, torch.Tensor] = {}
        for one, value in zip(extra, values, strict=True):
            tensors |= one.mapping(value.expand(_first(given).shape[0]) if one.spread else value)
        original = functools.partial(functional, tensors)
        return original(**given, **fixed) if call is None else call(original, **given, **fixed)

    with state_kept(model):
        set_forward(model, forward, public, inspect.Parameter.KEYWORD_ONLY)
        yield


def _identifiers(names: Sequence[str]) -> dict[str, str]:
    """A Python identifier for each name, which a signature needs; its own where it is one."""
    alias = {name: name for name in names if name.isidentifier()}
    for i, name in enumerate(names):
        alias.setdefault(name, f"x{i}_{re.sub(r'[^0-9A-Za-z]+', '_', name)}")
    return {name: alias[name] for name in names}
