"""The runtimes of the speed matrix: each turns a contender into a function of one tensor.

``torch.compile`` does not guard forward hooks: of two instances of one class, the second runs the first's code, without
its hooks, if both are compiled through one code object. So every contender is compiled through one of its own;
``shared`` is what a user gets who compiles a base model and then one with hooks.
"""

from __future__ import annotations

import importlib.util
import itertools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.speed.contenders import BASE, BESIDE, Absent
from exporters import export
from passes.ir.torch_internals import load_package
from surgery import sites

RUNTIMES = ("eager", "compile", "aoti", "onnx", "max-autotune")
NEEDED = ("onnx", "onnxscript", "onnxruntime")  # packages of the runtime "onnx"
EXPORTED = (BASE, "live lowrank", "merged")  # an export always has the low-rank form
COUNTER = itertools.count()

Call = Callable[[Tensor], Tensor]


def exists(runtime: str, contender: str, device: torch.device, dtype: torch.dtype, *, training: bool) -> bool:
    """Whether there is such a cell: exports are not trained, and their adapters are low-rank or merged.

    ONNX is measured on the CPU, through NumPy's arrays, which bfloat16 has none of.
    """
    if runtime in ("aoti", "onnx"):
        possible = runtime == "aoti" or (device.type == "cpu" and dtype != torch.bfloat16)
        return contender in EXPORTED and not training and possible
    if contender == BESIDE:
        return runtime != "eager"  # where nothing is compiled
    return contender != "merged" or not training  # where nothing is left to train


def prepare(
    runtime: str, model: nn.Module, x: Tensor, folder: Path, *, shared: bool = False, backend: str = "inductor"
) -> Call:
    """A function that runs the model on an input like ``x``; it may compile when it is first called.

    Args:
        folder: for exported files, which the function goes on to need.
        shared: compile through the class's own code object, as ``torch.compile(model)`` does.
        backend: of ``torch.compile``; "max-autotune" is a mode of "inductor", and with another only its cheap stand-in.

    Raises:
        Absent: the runtime's packages are not installed.
    """
    if runtime == "eager":
        return model
    if runtime == "compile":
        return torch.compile(model if shared else own_code(model), dynamic=False, backend=backend)  # type: ignore[no-any-return]
    if runtime == "max-autotune":
        mode = "max-autotune" if backend == "inductor" else None
        return _marked(torch.compile(model if shared else own_code(model), dynamic=False, backend=backend, mode=mode))
    if runtime == "onnx" and (missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]):
        raise Absent(f"not installed: {', '.join(missing)}")
    path = folder / f"{next(COUNTER)}.{'onnx' if runtime == 'onnx' else 'pt2'}"
    export(model, runtime, path, example_inputs={"x": x}, mode="live" if sites(model) else "merged")
    if runtime == "aoti":
        package = load_package(path)
        return lambda x: _only(package(x=x))
    return _session(path)


def own_code(model: nn.Module) -> nn.Module:
    """The model, whose forward runs by a code object that no other has; compiled as users do, ``torch.compile(model)``.

    A function around the call would have the graph contain the call of the root, where sites run low-rank.
    """
    forward: Any = type(model).forward
    code = forward.__code__.replace(co_name=f"forward_{next(COUNTER)}")
    own = types.FunctionType(code, forward.__globals__, argdefs=forward.__defaults__, closure=forward.__closure__)
    model.forward = types.MethodType(own, model)  # type: ignore[method-assign]
    return model


def _marked(program: Any) -> Call:
    """Tell CUDA graphs that what an earlier call gave is no longer needed."""

    def call(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return program(x)  # type: ignore[no-any-return]

    return call


def _only(output: Any) -> Tensor:
    if isinstance(output, dict):
        output = list(output.values())
    return output[0] if isinstance(output, (list, tuple)) else output


def _session(path: Path) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle sessions would slow down the others
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
