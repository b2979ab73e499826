"""Capture: a model becomes one FX graph in one dialect, whatever it was.

============================  =============================================================================
model                         way
============================  =============================================================================
``transformers`` model        ``transformers.exporters.DynamoExporter`` (copes with caches), inputs optional
module with example inputs    ``torch.export.export(strict=False)``
module without inputs         ``fx.symbolic_trace``
``GraphModule``               as it is
``ExportedProgram``           ``ep.module()``
anything that fails           no graph; ``Capture.note`` says why, and sites come from the module walk
============================  =============================================================================

The captured graph is for reading. Its ``get_attr`` targets are the model's own parameter names and its parameters
alias the model's.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from passes.errors import InputError
from passes.ir.forward_context import Call, copied, inference_mode_of, partial_graph_unprinted, quiet, state_kept
from passes.ir.linear_modules import linear_layout
from passes.ir.module_utils import copy_graph
from passes.ir.parameter_names import name_placeholders
from passes.ir.torch_internals import tree_iter, tree_map, tree_map_only
from passes.transforms.normalize import Normalize

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Capture:
    """A captured graph (None if the model could not be captured), how it was captured, and why it was not."""

    graph: fx.GraphModule | None
    how: str
    note: str | None = None


def forward_call(example_inputs: object) -> Call:
    """Turn example inputs into ``(args, kwargs)``: a mapping gives keywords, a tuple positions, a tensor one argument.

    Raises:
        InputError: the inputs are none of these.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping) and all(isinstance(name, str) for name in example_inputs):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    raise InputError(
        "example inputs must be a dict (keyword arguments by name), a tuple (positional arguments) or a tensor "
        f"(the only argument), not {type(example_inputs).__name__}"
    )


def is_pretrained(model: object) -> TypeGuard[PreTrainedModel]:
    """Tell whether a model is a ``transformers`` one, without importing transformers."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def default_inputs(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Small inputs that a ``transformers`` model accepts, or None where it does not tell.

    Text models use their own ``dummy_inputs``; image models get two random images of the configured size.
    """
    if not is_pretrained(model):
        return None
    device, main, dtype, config = model.device, model.main_input_name, model.dtype, model.config
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None)
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(2, getattr(vision, "num_channels", 3), height, width, generator=generator)
        inputs: dict[str, torch.Tensor] = {main: pixels.to(dtype)}
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        inputs = {main: torch.zeros(2, config.num_mel_bins, 2 * config.max_source_positions, dtype=dtype)}
        inputs["decoder_input_ids"] = torch.zeros(2, 4, dtype=torch.long)
    elif main == "input_values":
        inputs = {main: torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)).to(dtype)}
    elif main == "input_ids":
        inputs = dict(model.dummy_inputs)
        if config.is_encoder_decoder and not any("decoder" in name for name in inputs):
            inputs["decoder_input_ids"] = inputs[main].clone()
        for name, value in inputs.items():  # unequal lengths, so that a capture keeps the two apart
            if name.startswith("decoder_") and isinstance(value, torch.Tensor) and value.dim() == 2:
                inputs[name] = value[:, :-1]
    else:
        return None
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def keyword_inputs(model: nn.Module, call: Call) -> dict[str, object]:
    """All inputs by the names of ``model.forward``, positional ones included."""
    args, kwargs = call
    if not args:
        return dict(kwargs)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    extra = bound.pop("kwargs", {})
    return {**bound, **extra}


def export_program(model: nn.Module, call: Call, *, dynamic: bool = False) -> ExportedProgram:
    """Export a model in eval mode with ``torch.export`` (non-strict), through transformers' exporter where it is one.

    The model is left as it was.

    Args:
        dynamic: leave every size of the inputs free that the model leaves free; else all are those of the inputs.
    """
    with state_kept(model), inference_mode_of(model), torch.no_grad(), partial_graph_unprinted():
        if not is_pretrained(model):
            args, kwargs = copied(call)
            shapes = all_dynamic(keyword_inputs(model, call)) if dynamic else None
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        from transformers.exporters import DynamoConfig, DynamoExporter

        inputs = hub_inputs(model, call)
        speaks = sys.modules[DynamoExporter.__module__].logger.name  # named after its file, outside of "transformers"
        with quiet("transformers", speaks):
            exported = DynamoExporter().export(model, inputs, DynamoConfig(dynamic=dynamic))
        program: ExportedProgram = getattr(exported, "program", exported)  # newer transformers wrap the program
        return program


def all_dynamic(inputs: Mapping[str, object]) -> dict[str, object]:
    """A specification of shapes in which every size is free, unless the model fixes it."""
    shapes: dict[str, object] = tree_map(
        lambda x: dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) if isinstance(x, torch.Tensor) else None,
        dict(inputs),
    )
    return shapes


def with_two_rows(model: nn.Module, call: Call) -> Call:
    """The call with a batch of one doubled, since ``torch.export`` takes a size of one to be fixed.

    The call is given back as it is where its dimension 0 is not a batch, or not of one.
    """
    tensors = [leaf for leaf in tree_iter(call) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if {len(tensor) for tensor in tensors} != {1}:
        return call
    doubled: Call = tree_map_only(torch.Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, call)
    args, kwargs = copied(doubled)
    try:
        with state_kept(model), inference_mode_of(model), torch.no_grad():
            model(*args, **kwargs)
    except (RuntimeError, ValueError, IndexError):
        return call
    return doubled


def hub_inputs(model: nn.Module, call: Call) -> dict[str, object]:
    """Keyword inputs for a ``transformers`` exporter: no labels (no loss is exported) and no cache unless given."""
    inputs = keyword_inputs(model, copied(call))
    inputs.pop("labels", None)
    if getattr(model.config, "use_cache", False):
        inputs.setdefault("use_cache", False)
    return inputs


def capture(model: nn.Module | ExportedProgram, example_inputs: object = None) -> Capture:
    """Capture a model as one normalised FX graph; the model is left as it was.

    Args:
        model: any ``nn.Module``, a ``GraphModule``, or an ``ExportedProgram``.
        example_inputs: dict, tuple or tensor; ``transformers`` models have defaults.

    Returns:
        The capture; ``graph`` is None where the model resists, with the reason in ``note``.
    """
    if isinstance(model, ExportedProgram):
        return Capture(_normalised(model.module()), "ExportedProgram")
    if isinstance(model, fx.GraphModule):
        return Capture(normalised(model, model.graph), "GraphModule")
    if example_inputs is None:
        example_inputs = default_inputs(model)
    try:
        if example_inputs is None:
            with state_kept(model), inference_mode_of(model):
                graph = fx.GraphModule(model, _Tracer().trace(model))
            return Capture(_normalised(graph), "fx.symbolic_trace")
        program = export_program(model, forward_call(example_inputs))
        how = "transformers.exporters" if is_pretrained(model) else "torch.export"
        return Capture(_normalised(program.module()), how)
    except InputError:
        raise
    except (MemoryError, torch.OutOfMemoryError):  # no fault of the model's
        raise
    except Exception as error:  # a model may resist in any way; the walk takes over and the report says why
        reason = str(error).strip().splitlines() or [""]
        return Capture(None, "module walk", f"{type(error).__name__}: {reason[0][:200]}")


class _Tracer(fx.Tracer):
    """Keeps every plain linear module a call, GPT-2's ``Conv1D`` and subclasses of ``nn.Linear`` included."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return linear_layout(module) is not None or super().is_leaf_module(module, path)


REGIONS = (torch.ops.higher_order.wrap_with_set_grad_enabled, torch.ops.higher_order.wrap_with_autocast)


def _inline_regions(graph_module: fx.GraphModule) -> None:
    """Put the operations of ``autocast`` and ``enable_grad`` regions in line: the graph is for reading."""
    graph, changed = graph_module.graph, False
    for node in list(graph.nodes):
        if node.target not in REGIONS:
            continue
        at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node))
        region = node.args[at]
        assert isinstance(region, fx.Node)
        inner = graph_module.get_submodule(str(region.target))
        assert isinstance(inner, fx.GraphModule)
        _inline_regions(inner)
        holes = [n for n in inner.graph.nodes if n.op == "placeholder"]
        with graph.inserting_before(node):
            outputs = graph.graph_copy(inner.graph, dict(zip(holes, node.args[at + 1 :], strict=True)))
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index, call-overload]
            graph.erase_node(user)
        graph.erase_node(node)
        changed = True
    if changed:
        graph_module.recompile()


def normalised(model: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A normalised graph module of a graph whose attributes are a model's; neither is changed, no tensor is copied."""
    return _normalised(fx.GraphModule(model, copy_graph(graph)))


def _normalised(graph_module: fx.GraphModule) -> fx.GraphModule:
    _inline_regions(graph_module)
    name_placeholders(graph_module.graph)
    Normalize().run(graph_module)
    return graph_module
