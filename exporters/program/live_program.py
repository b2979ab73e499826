"""A model as one exported program: plain inputs and outputs, one coefficient, named tensors, and no trace of its maker.

What ``torch.export`` gives for it is written as a ``.pt2``, compiled ahead of time, or, before that, traced. A live
program holds one buffer ``coeff`` (a number) for all sites, and each site's core under the names that the model has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from exporters.program.metadata import FORMAT, contents
from exporters.shared.export_report import example_call, working_copy
from exporters.shared.failures import run_on_examples, type_and_message
from exporters.shared.functional import COEFF, CalledGraph, Function, FunctionalModel, coefficient_names
from exporters.shared.subject import Subject, plain
from passes.capture.capture import export_program, hub_inputs, is_pretrained, with_two_rows
from passes.errors import SurgeryError
from passes.ir.forward_context import Call, copied, quiet, state_kept
from passes.ir.parameter_names import unwritable
from passes.ir.torch_internals import OpOverload, tree_map_only
from surgery.errors import ExportError
from surgery.hosting.called_module import ATTRIBUTE
from surgery.hosting.root import call_as_it_is
from surgery.modules.adapter import Adapter
from surgery.verbs.merge import merge
from surgery.verbs.steer import sites

NOISY = ("transformers", "torch.export", "torch._export", "torch._dynamo", "torch._inductor")
INNER = "inner."
OWN = ("aten", "prim", "prims", "quantized", "quantized_decomposed")  # namespaces of torch


Mode = Literal["merged", "live"]


def subject_of(model: nn.Module, example_inputs: object, mode: Mode) -> Subject:
    """Copies of a model, which share its tensors, to export and to compare with.

    Args:
        mode: "merged" (the dense model at the present coeff) or "live" (with its adapters, steered by ``coeff``).

    Raises:
        ExportError: there is nothing to steer.
        InputError: the model does not run on the inputs.
    """
    reference, root = working_copy(model), working_copy(model)
    call, fixed = call_of(reference, example_inputs)
    found = sites(root)
    if mode == "live":
        _check_live(root, found)
    elif found:
        root = merge(root, untie=True)
    if isinstance(root, fx.GraphModule):
        root = CalledGraph(root)
    call_as_it_is(root)
    vars(root)["forward"] = _forward(root, fixed, live=mode == "live")
    return Subject(root, reference, call, fixed, (1.0, 0.0, -0.5) if mode == "live" else (None,))


def _check_live(root: nn.Module, found: Mapping[str, Adapter]) -> None:
    if not found:
        raise ExportError(f"mode='live' needs an adapter, and {type(root).__name__} carries none")
    if folded := [key for key, site in found.items() if site.coeff_is_folded]:
        raise ExportError(f"site {folded[0]!r}: coeff was folded into a constant; mode='live' needs it, use 'merged'")
    if hasattr(root, COEFF):
        raise ExportError(f"{type(root).__name__} has an attribute {COEFF!r} of its own, the name of what steers it")


def call_of(model: nn.Module, example_inputs: object) -> tuple[Call, dict[str, object]]:
    """The call with a batch of one doubled, and apart from it the keywords that are not tensors."""
    call = example_call(model, example_inputs)
    args, kwargs = ((), hub_inputs(model, call)) if is_pretrained(model) else copied(call)
    flags = (bool, int, float, str, type(None))
    fixed: dict[str, object] = {name: value for name, value in kwargs.items() if isinstance(value, flags)}
    with state_kept(model), torch.no_grad():
        run_on_examples(model, copied((args, kwargs)))
    args, kwargs = with_two_rows(model, (args, kwargs))
    kwargs = {name: value for name, value in kwargs.items() if name not in fixed}
    # one tensor given twice would be one input of the program
    call = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
    return call, fixed


def _forward(root: nn.Module, fixed: dict[str, object], *, live: bool) -> Function:
    """A forward with plain outputs, in which the sites of a live program read the one buffer ``coeff`` of the root."""
    original = (root.inner if isinstance(root, CalledGraph) else root).forward
    call = FunctionalModel(root, original)
    names = coefficient_names(root) if live else []
    if live:
        _move_coefficient(root, names)

    @functools.wraps(original)
    def forward(*args: object, **kwargs: object) -> object:
        tensors = dict.fromkeys(names, root.get_buffer(COEFF)) if live else {}
        return plain(call(tensors, *args, **kwargs, **fixed))

    return forward


def _move_coefficient(root: nn.Module, names: Sequence[str]) -> None:
    """Register one coefficient of 1 in place of those of the sites, never narrower than float32."""
    own = [root.get_buffer(name) for name in names]
    dtype = functools.reduce(torch.promote_types, (coeff.dtype for coeff in own), torch.float32)
    for path, _, name in (name.rpartition(".") for name in names):
        root.get_submodule(path)._buffers[name] = None
    root.register_buffer(COEFF, torch.ones((), dtype=dtype, device=own[0].device))


def program_of(subject: Subject) -> ExportedProgram:
    """Export with every size free that the model leaves free; the program holds no stack trace, path or example data.

    Experts whose product is an operation of ``transformers`` are exported as ``batched_mm``, which is torch's own.

    Raises:
        ExportError: the model cannot be exported; the cause is chained.
    """
    program = _exported(subject)
    if bad := [name for name in (*program.state_dict, *program.constants) if unwritable(name)]:
        raise ExportError(
            f"torch cannot load a program with a tensor named {bad[0]!r}: quotes, line ends and keywords of Python "
            'break the code that it makes; rename the module, or export another format, such as "dense"'
        )
    root: Any = subject.root
    if foreign_operations(program) and hasattr(root, "set_experts_implementation"):
        root.set_experts_implementation("batched_mm")  # of the copy
        program = _exported(subject)
    _rename(program, _public_name)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            for key in ("stack_trace", "from_node", "custom"):
                node.meta.pop(key, None)
    if subject.live:
        holder = root.inner if isinstance(root := subject.root, CalledGraph) else root
        program.graph_module.meta["custom"] = {FORMAT: contents(holder, root.get_buffer(COEFF), _read(program))}
    program.example_inputs = tree_map_only(torch.Tensor, torch.zeros_like, program.example_inputs)
    return program


def _exported(subject: Subject) -> ExportedProgram:
    try:
        with quiet(*NOISY):
            return export_program(subject.root, subject.call, dynamic=True)
    except SurgeryError:
        raise
    except Exception as error:  # a model may resist in any way
        name = type(subject.reference).__name__
        raise ExportError(f"{name} cannot be exported by torch.export: {type_and_message(error)}") from error


def foreign_operations(program: ExportedProgram) -> list[str]:
    """Operations that torch alone does not have, and whose library must be imported where the program is loaded."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    return sorted(str(t) for t in targets if isinstance(t, OpOverload) and t.namespace not in OWN)


def _public_name(name: str) -> str:
    """A tensor's name in a program: a site's tensors have the names that they have in an adapter's file."""
    return name.removeprefix(INNER).replace(f".{ATTRIBUTE}.", ".")


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
