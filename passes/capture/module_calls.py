"""Which modules are really called, and which weights are read without the call: one train and one eval forward.

``nn.MultiheadAttention`` reads ``out_proj.weight``, and ``nn.TransformerEncoderLayer`` (eval, no_grad) reads
``linear1.weight``, without calling the module: a module replaced there is silently dead. The graph cannot tell, so the
model is run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from passes.errors import InputError
from passes.ir.forward_context import Call, copied, inference_mode_of, set_mode, state_kept
from passes.ir.torch_internals import OpOverload, TorchDispatchMode, tree_iter


@dataclass(frozen=True)
class CallRecord:
    """What recorded forwards showed.

    Attributes:
        called: paths of the modules that were called.
        read: names of the parameters that were used outside their module's call.
        built: parameters that a forward made, or gave to another module, by name: the class of the module that owns
            them after it. They are gone again.
    """

    called: frozenset[str]
    read: frozenset[str]
    note: str | None = None
    built: Mapping[str, str] = field(default_factory=dict)


def record_calls(model: nn.Module, call: Call) -> CallRecord:
    """Run the model twice (eval without gradients, train) and record calls; random state and buffers are put back.

    Raises:
        InputError: the model does not run on the inputs.
    """
    recorder = _Recorder(model)
    before = {name: id(owner) for name, owner in _owners(model)}
    note = None
    with state_kept(model), inference_mode_of(model):
        try:
            with torch.no_grad(), recorder.running():
                _run(model, call)
        except Exception as error:
            message = str(error).strip().splitlines() or [""]
            raise InputError(
                f"{type(model).__name__} does not run on the example inputs: {type(error).__name__}: {message[0][:300]}"
            ) from error
        set_mode(model, training=True)
        try:
            with torch.enable_grad(), recorder.running():
                _run(model, call)
        except Exception as error:  # e.g. BatchNorm on one sample: what eval mode showed still holds
            note = f"not recorded in train mode: {type(error).__name__}"
        built = {name: type(owner).__name__ for name, owner in _owners(model) if before.get(name) != id(owner)}
    return CallRecord(frozenset(recorder.called), frozenset(recorder.read), note, built)


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module that owns each initialised parameter, by the parameter's names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for local, parameter in module._parameters.items():
            if parameter is not None and not nn.parameter.is_lazy(parameter):
                yield f"{path}.{local}".lstrip("."), module


def _run(model: nn.Module, call: Call) -> None:
    args, kwargs = copied(call)
    model(*args, **kwargs)


class ModuleStack(TorchDispatchMode):
    """Sees every ATen operation while a forward runs, and keeps the stack of modules that are being called.

    Neither hooks on the modules nor a torch-function mode would do: PyTorch leaves its fast paths where it finds them.
    """

    supports_higher_order_operators = True  # flex_attention, torch.cond

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = dict(model.named_modules())
        self.paths = {id(module): path for path, module in self.modules.items()}
        self.called: set[str] = set()
        self.stack: list[nn.Module] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, always_call=True)
        try:
            with torch.compiler.set_stance("force_eager"), self:
                yield
        finally:
            self.stack.clear()
            before.remove()
            after.remove()

    def _enter(self, module: nn.Module, args: object) -> None:
        if id(module) in self.paths:
            self.called.add(self.paths[id(module)])
        self.stack.append(module)

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if self.stack:
            self.stack.pop()


class _Recorder(ModuleStack):
    """Notes which parameters are used outside of their modules' calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.read: set[str] = set()
        self.owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for path, module in self.modules.items():
            for local, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{local}".lstrip(".")
                self.owners.setdefault(id(parameter), []).append((module, name))

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        for leaf in tree_iter((args, kwargs)):
            owners = self.owners.get(id(leaf), ()) if isinstance(leaf, nn.Parameter) else ()
            if not any(owner in self.stack for owner, _ in owners):
                self.read.update(name for _, name in owners)
        return func(*args, **(kwargs or {}))
