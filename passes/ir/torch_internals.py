"""Everything of torch whose name begins with an underscore, and that these packages use: the one file to look through
when a torch release moves something. ``tests/contracts/test_torch_internals.py`` keeps it the only one.

What takes long to import (sympy, the inductor) is imported where it is called for.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeGuard, TypeVar, overload

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten_with_path, tree_iter, tree_leaves, tree_map, tree_map_only

if TYPE_CHECKING:
    from torch._subclasses import FakeTensor
    from torch._subclasses import FakeTensorMode as FakeTensorMode
    from torch.export.pt2_archive._package import AOTICompiledModel
    from torch.export.pt2_archive._package_weights import Weights

F = TypeVar("F", bound=Callable[..., object])
T = TypeVar("T")

__all__ = [
    "Convolution",
    "HigherOrderOperator",
    "OpOverload",
    "TorchDispatchMode",
    "tree_flatten_with_path",
    "tree_iter",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
]

NOT_BROADCAST = "_ddp_params_and_buffers_to_ignore"  # names that DistributedDataParallel asks a module for
REPLICA = "_is_replica"  # set on the instances that nn.DataParallel makes for its devices
# Asked in each forward, so without a function of our own around them.
script_tracing_state = torch._C._get_tracing_state  # None where TorchScript's tracer does not run
function_transforms = torch._C._functorch.peek_interpreter_stack  # None outside of ``vmap``, ``grad`` and their like
backward_task = torch._C._current_graph_task_id  # of the backward that this thread is in; -1 outside of any
sequence_number = torch._C._autograd._get_sequence_nr  # of the node that this thread records next
LEAF_NUMBER = 2**64 - 1  # the sequence number of what accumulates a gradient

Convolution = nn.modules.conv._ConvNd  # the base of all convolutions, transposed ones included

# The frames of a module's call, by which one sees that a thread is in it.
MODULE_CALLS = frozenset({nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__})


def convolve(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convolve as a module does, padding of any mode included, by another weight and without a bias."""
    return module._conv_forward(x, weight, None)  # type: ignore[operator, no-any-return]


def convolves_as_ever(module: nn.Module) -> bool:
    """Whether a convolution of one group is computed by torch's own code, whatever subclass it is of."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    own = [kind for kind in kinds if isinstance(module, kind) and type(module)._conv_forward is kind._conv_forward]
    return any(type(module).forward is kind.forward for kind in own)


def same_version(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Let writes to a tensor go uncounted: what was derived from its value is still right after them."""
    return torch.autograd.grad_mode._unsafe_preserve_version_counter(tensor)


def is_exporting() -> bool:
    """Whether ``torch.export`` runs: Dynamo of torch 2.11 takes ``torch.compiler.is_exporting()`` for always true."""
    return torch.compiler._is_exporting_flag


def node_in_backward() -> int:
    """The sequence number of the node whose gradient this thread is computing, given to it in the forward."""
    node = torch._C._current_autograd_node()
    return LEAF_NUMBER if node is None else int(node._sequence_nr())


def hold_during_backward(held: Callable[[], None]) -> None:
    """Let the backward that this thread is in hold an object, which it lets go when it ends or fails."""
    torch.autograd.Variable._execution_engine.queue_callback(held)


def _checkpoint_hooks() -> list[dict[str, Any]]:
    """What the saved-tensor hooks that are on in this thread close over, the innermost first."""
    hooks, table = [], torch._C._autograd
    while (top := table._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        table._pop_saved_tensors_default_hooks()
    for pack, unpack in reversed(hooks):
        table._push_saved_tensors_default_hooks(pack, unpack)
    packs = [inspect.unwrap(pack) for pack, _ in hooks]
    cells = [(p.__code__.co_freevars, p.__closure__ or ()) for p in packs if inspect.isfunction(p)]
    return [{n: cell.cell_contents for n, cell in zip(names, found, strict=True)} for names, found in cells]


def checkpoints_within() -> list[object]:
    """The non-reentrant checkpoints whose forward this thread is in."""
    return [found["frame"] for found in _checkpoint_hooks() if "frame" in found]


def recomputed_checkpoint() -> object:
    """The non-reentrant checkpoint that this thread recomputes, or None."""
    refs = (found["target_frame_ref"] for found in _checkpoint_hooks() if "target_frame_ref" in found)
    return next((ref() for ref in refs), None)


def is_checkpointed_selectively() -> bool:
    """Whether selective checkpointing counts the operations of this thread, to store or recall what they give."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    from torch.utils import checkpoint
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
    return any(isinstance(mode, modes) for mode in _get_current_dispatch_mode_stack())


def unseen_by_checkpoints() -> contextlib.AbstractContextManager[object]:
    """Run operations that a checkpointed function may do another number of times when it is recomputed."""
    if not is_checkpointed_selectively():
        return contextlib.nullcontext()
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def pass_over(function: F, *, inner: bool = False) -> F:
    """Let Dynamo run the frame of a function as it stands, and compile what it calls.

    Told to the interpreter hook itself: ``torch.compiler.disable`` and ``torch._dynamo`` would import all of Dynamo.
    A torch without that call traces the frame instead, which then has to give the same result.

    Args:
        inner: run what it calls as it stands, too.
    """
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):
        action = frames._FrameAction
        strategy = frames._FrameExecStrategy(action.SKIP, action.SKIP if inner else action.DEFAULT)
        frames.set_code_exec_strategy(function.__code__, strategy)  # type: ignore[attr-defined]
    elif inner:
        return torch.compiler.disable(function)  # type: ignore[no-any-return]
    return function


def uncompiled(model: T) -> T:
    """The module behind ``torch.compile``'s wrapper; anything else as it is."""
    inner: T = getattr(model, "_orig_mod", model)
    return inner


def put_graph(model: fx.GraphModule, graph: fx.Graph) -> None:
    """Give a graph module another graph, which is not copied and not compiled to code yet."""
    model._graph = graph
    graph.owning_module = model


def module_of_script(
    model: torch.jit.ScriptModule, args: tuple[object, ...], kwargs: dict[str, object]
) -> fx.GraphModule:
    """A TorchScript module as a graph module, by torch's converter."""
    from torch._export.converter import TS2EPConverter

    return TS2EPConverter(model, args, kwargs).convert().module()  # type: ignore[return-value]


def graph_like(graph: fx.Graph) -> fx.Graph:
    """An empty graph with another's tracer."""
    return fx.Graph(tracer_cls=graph._tracer_cls)


def copy_signature(source: fx.Graph, target: fx.Graph) -> None:
    """Let a graph take its inputs and give its outputs in another's structure (a pytree, for a graph of ``export``)."""
    target._codegen = copy.copy(source._codegen)


def is_erased(node: fx.Node) -> bool:
    """Whether a node was erased from its graph."""
    return node._erased


@overload
def schema_of(target: OpOverload) -> torch.FunctionSchema: ...


@overload
def schema_of(target: object) -> torch.FunctionSchema | None: ...


def schema_of(target: object) -> torch.FunctionSchema | None:
    """The schema of an ATen overload; None for anything else."""
    return getattr(target, "_schema", None)


def storage_address(tensor: torch.Tensor) -> int:
    """What tells a storage from all others that are alive."""
    return int(tensor.untyped_storage()._cdata)


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a wrapper of tensors holds, such as a ``DTensor``; none for any other tensor."""
    if type(tensor) in (torch.Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return []
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def without_torch_function() -> contextlib.AbstractContextManager[None]:
    """Look at tensors of subclasses past what these make of it."""
    return torch._C.DisableTorchFunctionSubclass()  # type: ignore[return-value]


def without_modes() -> contextlib.AbstractContextManager[object]:
    """Compute past all modes of dispatch: an exporter's would take the operations for the model's."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def set_versions(tensors: list[torch.Tensor], versions: list[int]) -> None:
    """Let tensors count as written to so many times: for those whose values were put back."""
    torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(versions))


def tensor_hooks(tensor: torch.Tensor) -> tuple[dict[int, object] | None, ...]:
    """The hooks of a tensor's gradient."""
    tables = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    return tuple(None if table is None else dict(table) for table in tables)


def put_tensor_hooks(tensor: torch.Tensor, hooks: tuple[dict[int, object] | None, ...]) -> None:
    """Give a tensor the hooks that it had."""
    for name, before in zip(("_backward_hooks", "_post_accumulate_grad_hooks"), hooks, strict=True):
        now: dict[int, object] | None = getattr(tensor, name)
        if before is None and now is not None:
            setattr(tensor, name, None)
        elif before is not None and now is not None and list(now.items()) != list(before.items()):
            now.clear()
            now.update(before)


def is_fake(value: object) -> TypeGuard[FakeTensor]:
    """Whether a value is a fake tensor."""
    from torch._subclasses import FakeTensor

    return isinstance(value, FakeTensor)


def fake_mode_with_symbols() -> FakeTensorMode:
    """A fake tensor mode whose sizes may be symbols."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv())


def python_dispatcher() -> contextlib.AbstractContextManager[None]:
    """Run operations by torch's Python kernels: native ones may ask for symbolic sizes as numbers."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()  # type: ignore[no-any-return]


def sizes_of_one_are_free() -> contextlib.AbstractContextManager[None]:
    """Let ``torch.export`` treat a size of 1 like any other."""
    from torch.fx.experimental import _config

    return _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined, no-any-return]


def load_package(path: Path) -> AOTICompiledModel:
    """Load an AOTInductor package."""
    return torch._inductor.aoti_load_package(str(path))


def compile_ahead_of_time(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], options: dict[str, object]
) -> list[str | Weights]:
    """Compile a graph module with the inductor; the paths of the files that belong in a package.

    ``aoti_compile_and_package`` would write the package itself, with the sources and the paths of this machine.
    """
    return list(torch._inductor.aot_compile(module, args, kwargs, options=options))  # type: ignore[arg-type]


def write_package(file: IO[bytes], files: list[str | Weights]) -> None:
    """Write compiled files into an AOTInductor package."""
    from torch._inductor.package.package import package_aoti

    package_aoti(file, files)


def missing_cpp_compiler() -> Exception | None:
    """Why the inductor has no C++ compiler, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return error
    return None


def has_line_tables() -> bool:
    """Whether the inductor of this torch may write line tables, which name source files."""
    from torch._inductor import config

    return hasattr(config.aot_inductor, "enable_line_tables")


def parametrised_class(module: nn.Module, names: Iterable[str]) -> None:
    """Give a module that has no state yet the class that ``register_parametrization`` gives it, for these tensors."""
    torch.nn.utils.parametrize._inject_new_class(module)
    for name in names:
        torch.nn.utils.parametrize._inject_property(module, name)


def plainly(function: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object]) -> T:
    """Call a function of tensors without ``__torch_function__`` of their subclasses."""
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


_ENTRY = re.compile(r"\b_(?:modules|parameters|buffers)\['([^']+)'\]")


def dynamo_source(node: fx.Node) -> tuple[str, str] | None:
    """The root and the path of the module's tensor that a placeholder of Dynamo's stands for; None for any other.

    Dynamo names a source ``L['self']._modules['lin']._parameters['weight']``: the root is ``L['self']``, and the path
    ``lin.weight``.
    """
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    text = str(name() if callable(name) else name)  # a method until torch 2.12
    path = _ENTRY.findall(text)
    return (_ENTRY.split(text)[0].rstrip("."), ".".join(path)) if path else None
