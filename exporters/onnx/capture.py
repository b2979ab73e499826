"""From a model to an ``onnx_ir.Model``: its forward with named inputs, the adapter's tensors among them.

``transformers`` models go through ``transformers.exporters.OnnxExporter``, all others through ``torch.onnx.export``.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from exporters.onnx.cores import core_slots
from exporters.shared.outputs import output_names
from exporters.shared.report import inputs_for
from passes.capture.capture import all_dynamic, hub_inputs, is_pretrained, keyword_inputs
from passes.errors import InputError
from passes.ir.forward_context import keep_forward, quiet
from passes.ir.torch_internals import tree_flatten_with_path, tree_iter, tree_map_only
from surgery.errors import ExportError
from surgery.hosting.hosts import host_of
from surgery.verbs.steer_and_merge import sites, steer

NOISY = ("transformers", "torch.onnx", "torch._export", "onnxscript", "onnx_ir")
KNOB = "coeff"


@dataclass(frozen=True)
class Knob:
    """A tensor of the adapter that becomes an input of the graph, with its value as the default.

    Attributes:
        name: of the input.
        default: what holds where the input is left out.
        example: what it is captured with; no special values, which a rule of the optimiser might remove.
        slots: tables of tensors and the names in them that the input is put in for, each with the shape to put it in.
        spread: give it as many entries as the batch has rows.
    """

    name: str
    default: torch.Tensor
    example: torch.Tensor
    slots: tuple[tuple[dict[str, Any], str, tuple[int, ...] | None], ...]
    spread: bool = False


def steering_knob(model: nn.Module, rows: int) -> Knob:
    """``coeff``: a number or one per row; 1.0 by default. It takes the place of every site's own.

    Args:
        rows: of the batch, where each can have a coeff of its own. The knob is then spread over them before anything
            is computed with it: what a number makes is inferred to be one number, and would lie in memory as such.
    """
    found = sites(model).values()
    slots = tuple((s.core._buffers, KNOB, () if host_of(s) == "weight" else None) for s in found)
    dtype = torch.promote_types(torch.float32, next(iter(found)).core.coeff.dtype)
    return Knob(KNOB, torch.ones((), dtype=dtype), torch.ones(1, dtype=dtype), slots, rows > 1)


def core_knobs(model: nn.Module) -> list[Knob]:
    """Every core tensor under the name that :func:`core_slots` gives it."""
    knobs = []
    for name, slot in core_slots(model).items():
        core, value = slot.core, slot.value()
        table = core._parameters if slot.local in core._parameters else core._buffers
        example = torch.linspace(0.3, 0.7, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
        knobs.append(Knob(name, value, example, ((table, slot.local, tuple(core.tensors()[slot.local].shape)),)))
    return knobs


def named_inputs(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
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


def flat_inputs(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Inputs as a graph takes them: nested tensors by their dotted path, as the exporters name them."""
    flat = {}
    for name, value in inputs.items():
        for key_path, leaf in tree_flatten_with_path(value)[0]:
            parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in key_path]
            if isinstance(leaf, torch.Tensor):
                flat[".".join([name, *parts])] = leaf
    return flat


def rows_of(model: nn.Module, run: Callable[[], Any], inputs: Mapping[str, Any]) -> int:
    """Rows of the batch if every site sees them as dimension 0 of its input, so that each can have its coeff, or 1."""
    rows = _first(inputs).shape[0]
    found = sites(model).values()
    hosts = {host_of(site) for site in found}
    if "graph" in hosts and "weight" not in hosts:
        try:
            with steer(model, torch.linspace(-1, 1, rows)), torch.no_grad():
                run()
        except (RuntimeError, InputError):  # the graph itself refuses rows that do not divide what a site sees
            return 1
        return rows
    fits = [host == "module" for host in hosts]

    def look(site: nn.Module, args: Any, kwargs: Any) -> None:
        x = next(iter((*args, *kwargs.values())))
        fits.append(x.dim() > 1 and x.shape[0] == rows)

    handles = [site.register_forward_pre_hook(look, with_kwargs=True) for site in found]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return rows if all(fits) else 1


def _first(inputs: Mapping[str, Any]) -> torch.Tensor:
    """The input that tells the number of rows."""
    return next(leaf for leaf in tree_iter(dict(inputs)) if isinstance(leaf, torch.Tensor) and leaf.dim())


def convert(
    model: nn.Module,
    inputs: Mapping[str, Any],
    knobs: Sequence[Knob] = (),
    opset: int | None = None,
    call: Callable[..., Any] | None = None,
) -> Any:
    """Capture and convert to an ``onnx_ir.Model`` whose batch, sequence and other free sizes are dynamic.

    Args:
        inputs: by the names that the graph's inputs get.
        knobs: further inputs; their defaults are not in the graph yet.
        call: what is captured in place of the model's own forward: it gets that forward, and the inputs by name.

    Raises:
        ExportError: an operation has no translation, or the capture fails.
    """
    model = _Called(model) if isinstance(model, fx.GraphModule) else model
    fixed = {name: value for name, value in inputs.items() if value is None or isinstance(value, bool)}
    traced = {name: value for name, value in inputs.items() if name not in fixed}
    names = [*traced, *(knob.name for knob in knobs)]
    alias = _identifiers(names)
    values = {alias[name]: value for name, value in traced.items()}
    shapes = {name: all_dynamic(value) for name, value in values.items()}
    values |= {alias[knob.name]: knob.example for knob in knobs}
    shapes |= {alias[knob.name]: None for knob in knobs}
    named = _named_forward(model, alias, fixed, knobs, call)
    try:
        with torch.no_grad(), named, quiet(*NOISY):
            graph = (_of_hub if is_pretrained(model) else _of_module)(model, values, shapes, opset)
    except Exception as error:  # any operation may lack a translation; the cause is chained
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise ExportError(
            f"{type(model).__name__} cannot be exported to ONNX: {type(error).__name__}: {reason}"
        ) from error
    original = {alias[name]: name for name in names if alias[name] != name}
    for value in graph.graph.inputs:
        value.name = original.get(value.name, value.name)
    return graph


def _of_hub(model: nn.Module, values: dict[str, Any], shapes: dict[str, Any], opset: int | None) -> Any:
    from transformers.exporters import OnnxConfig, OnnxExporter

    exported = OnnxExporter().export(model, dict(values), OnnxConfig(dynamic_shapes=shapes, opset_version=opset))
    program = getattr(exported, "program", exported)  # transformers >= 5.20 wraps the program
    return getattr(program, "model", program)


def _of_module(model: nn.Module, values: dict[str, Any], shapes: dict[str, Any], opset: int | None) -> Any:
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
    alias: Mapping[str, str],
    fixed: Mapping[str, Any],
    knobs: Sequence[Knob],
    call: Callable[..., Any] | None,
) -> Iterator[None]:
    """Give ``model.forward`` exactly the named inputs, with the knobs among them in place of the adapter's tensors.

    Flags such as ``use_cache`` are bound here: an exporter sets them in the outermost configuration only.
    """
    original = model.forward
    public = {name: key for key, name in alias.items()}

    def forward(**kwargs: Any) -> Any:
        given = {public[name]: value for name, value in kwargs.items()}
        values = [given.pop(knob.name) for knob in knobs]
        # a cast comes first, so that it is all that reads an input
        values = [value.to(knob.default.dtype) for value, knob in zip(values, knobs, strict=True)]
        values = [v.expand(_first(given).shape[0]) if k.spread else v for v, k in zip(values, knobs, strict=True)]
        with put(knobs, values):
            return original(**given, **fixed) if call is None else call(original, **given, **fixed)

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in public]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with keep_forward(model):
        model.forward = forward
        yield


@contextlib.contextmanager
def put(knobs: Sequence[Knob], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Put values in the slots of knobs, and back what was there."""
    before = [(table, name, table[name]) for knob in knobs for table, name, _ in knob.slots]
    try:
        for knob, value in zip(knobs, values, strict=True):
            for table, name, shape in knob.slots:
                table[name] = value if shape is None else value.reshape(shape)
        yield
    finally:
        for table, name, old in before:
            table[name] = old


class _Called(nn.Module):
    """Calls a graph module, since ``torch.export`` interprets one that it is given and passes its ``forward`` by."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.inner = graph

    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**kwargs)


def _identifiers(names: Sequence[str]) -> dict[str, str]:
    """A Python identifier for each name, which a signature needs; its own where it is one."""
    alias = {name: name for name in names if name.isidentifier()}
    for i, name in enumerate(names):
        alias.setdefault(name, f"x{i}_{re.sub(r'[^0-9A-Za-z]+', '_', name)}")
    return {name: alias[name] for name in names}
