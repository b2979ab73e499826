"""A model as one exported program: plain inputs and outputs, one knob, named tensors, and no trace of who made it.

What ``torch.export`` gives for it is written as a ``.pt2``, compiled ahead of time, or, before that, traced. A live
program holds one buffer ``coeff`` (a number) for all sites, and each site's core under the names that the model has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from exporters.program.swap import FORMAT, KNOB, contents
from exporters.shared.report import inputs_for, working_copy
from exporters.shared.subject import Subject, plain
from passes.capture.capture import export_program, hub_inputs, is_pretrained, with_two_rows
from passes.errors import InputError, SurgeryError
from passes.ir.forward_context import Call, copied, quiet, state_kept
from passes.ir.torch_internals import OpOverload, tree_map_only
from surgery.errors import ExportError
from surgery.modules.adapter import SSpaceLinear
from surgery.verbs.steer_and_merge import merge, sites

NOISY = ("transformers", "torch.export", "torch._export", "torch._dynamo", "torch._inductor")
INNER = "inner."
OWN = ("aten", "prim", "prims", "quantized", "quantized_decomposed")  # namespaces of torch


def subject_of(model: nn.Module, example_inputs: Any, mode: str) -> Subject:
    """Copies of a model, which share its tensors, to export and to compare with.

    Args:
        mode: "merged" (the dense model at the present coeff) or "live" (with its adapters, steered by ``coeff``).

    Raises:
        ExportError: the mode is unknown, or there is nothing to steer.
        InputError: the model does not run on the inputs.
    """
    if mode not in ("merged", "live"):
        raise ExportError(f"mode must be 'merged' or 'live', found {mode!r}")
    reference, root = working_copy(model), working_copy(model)
    call, fixed = call_of(reference, example_inputs)
    found = sites(root)
    if mode == "live":
        _check_live(root, found)
    elif found:
        root = merge(root, untie=True)
    if isinstance(root, fx.GraphModule):
        root = _Called(root)
    live = list(found.values()) if mode == "live" else []
    if live:
        dtype = torch.promote_types(torch.float32, live[0].core.coeff.dtype)
        root.register_buffer(KNOB, torch.ones((), dtype=dtype, device=live[0].core.coeff.device))
    vars(root)["forward"] = _forward(root, live, fixed)
    return Subject(root, reference, call, fixed, (1.0, 0.0, -0.5) if live else (None,))


def _check_live(root: nn.Module, found: Mapping[str, SSpaceLinear]) -> None:
    if not found:
        raise ExportError(f"mode='live' needs an adapter, and {type(root).__name__} carries none")
    if folded := [key for key, site in found.items() if getattr(site, "coeff_is_folded", False)]:
        raise ExportError(f"site {folded[0]!r}: coeff was folded into a constant; mode='live' needs it, use 'merged'")
    if hasattr(root, KNOB):
        raise ExportError(f"{type(root).__name__} has an attribute {KNOB!r} of its own, the name of the knob")


def call_of(model: nn.Module, example_inputs: Any) -> tuple[Call, dict[str, Any]]:
    """The call with a batch of one doubled, and apart from it the keywords that are not tensors."""
    call = inputs_for(model, example_inputs)
    args, kwargs = ((), hub_inputs(model, call)) if is_pretrained(model) else copied(call)
    flags = (bool, int, float, str, type(None))
    fixed = {name: value for name, value in kwargs.items() if isinstance(value, flags)}
    given = copied((args, kwargs))
    try:
        with state_kept(model), torch.no_grad():
            model(*given[0], **given[1])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"the model does not run on the example inputs: {reason}") from error
    args, kwargs = with_two_rows(model, (args, kwargs))
    kwargs = {name: value for name, value in kwargs.items() if name not in fixed}
    # one tensor given twice would be one input of the program
    call = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
    return call, fixed


class _Called(nn.Module):
    """Calls a graph module, since ``torch.export`` interprets one that it is given and passes its ``forward`` by."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = False


def _forward(root: nn.Module, found: list[SSpaceLinear], fixed: dict[str, Any]) -> Callable[..., Any]:
    """A forward with plain outputs, in which every site reads the root's ``coeff``."""
    inner = root.inner if isinstance(root, _Called) else root
    original: Callable[..., Any] = inner.forward
    dtypes = [site.core._buffers.pop(KNOB).dtype for site in found]  # type: ignore[union-attr]

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        for site, dtype in zip(found, dtypes, strict=True):
            vars(site.core)[KNOB] = root.get_buffer(KNOB).to(dtype)
        try:
            return plain(original(*args, **kwargs, **fixed))
        finally:
            for site in found:
                del vars(site.core)[KNOB]

    return forward


def program_of(subject: Subject) -> ExportedProgram:
    """Export with every size free that the model leaves free; the program holds no stack trace, path or example data.

    Experts whose product is an operation of ``transformers`` are exported as ``batched_mm``, which is torch's own.

    Raises:
        ExportError: the model cannot be exported; the cause is chained.
    """
    program = _exported(subject)
    root: Any = subject.root
    if foreign_operations(program) and hasattr(root, "set_experts_implementation"):
        root.set_experts_implementation("batched_mm")  # of the copy
        program = _exported(subject)
    if isinstance(subject.root, _Called):
        _rename(program, lambda name: name.removeprefix(INNER))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            for key in ("stack_trace", "from_node", "custom"):
                node.meta.pop(key, None)
    if subject.live:
        holder = root.inner if isinstance(root := subject.root, _Called) else root
        program.graph_module.meta["custom"] = {FORMAT: contents(holder, root.get_buffer(KNOB), _read(program))}
    program.example_inputs = tree_map_only(torch.Tensor, torch.zeros_like, program.example_inputs)
    return program


def _exported(subject: Subject) -> ExportedProgram:
    try:
        with quiet(*NOISY):
            return export_program(subject.root, subject.call, dynamic=True)
    except SurgeryError:
        raise
    except Exception as error:  # a model may resist in any way
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        name = type(subject.reference).__name__
        raise ExportError(f"{name} cannot be exported by torch.export: {type(error).__name__}: {reason}") from error


def foreign_operations(program: ExportedProgram) -> list[str]:
    """Operations that torch alone does not have, and whose library must be imported where the program is loaded."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    return sorted(str(t) for t in targets if isinstance(t, OpOverload) and t.namespace not in OWN)


def _rename(program: ExportedProgram, rename: Callable[[str], str]) -> None:
    signature = program.graph_signature
    for spec in (*signature.input_specs, *signature.output_specs):
        if spec.target is not None:
            spec.target = rename(spec.target)
    for tensors in (program.state_dict, program.constants):
        renamed = {rename(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)


def _read(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """The tensors that the program reads, by name."""
    users = {node.name: node.users for node in program.graph.nodes if node.op == "placeholder"}
    held = {**program.constants, **program.state_dict}
    specs = [spec for spec in program.graph_signature.input_specs if spec.target in held and users[spec.arg.name]]
    return {spec.target: held[spec.target] for spec in specs if isinstance(held[spec.target], torch.Tensor)}
