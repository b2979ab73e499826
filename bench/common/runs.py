"""Forwards, and forwards with backwards, of any model on its inputs; and a base beside an operated model."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.common.timing import Run
from passes.errors import InputError
from passes.ir.forward_context import Call
from passes.ir.torch_internals import tree_iter, tree_map_only
from surgery import sites


def shadow(model: nn.Module) -> nn.Module:
    """A frozen copy of a model on the same memory: what happens to the model's modules does not happen to it."""
    made: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    made |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, made)


def first_output(output: Any) -> Tensor:
    """The first floating-point tensor of a model's output: its logits.

    Raises:
        InputError: there is none.
    """
    for leaf in tree_iter(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise InputError(f"the model's output is a {type(output).__name__} without a floating-point tensor")


def forward(model: nn.Module, call: Call) -> Run:
    """One forward without gradients."""
    args, kwargs = call

    def run() -> None:
        with torch.no_grad():
            model(*args, **kwargs)

    return run


def step(model: nn.Module, call: Call) -> Run:
    """Forward and backward, from a random gradient of the first output to what is trained, and to the inputs.

    To the inputs (for ids, to their embeddings), so that a frozen base has a backward to compare with: the one that
    anything trained in its first layer needs. Afterwards the cores change, as an optimiser would change them: no
    cached weight serves two steps.
    """
    args, kwargs = _open(call)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_open_embedding)
    cores = [p for site in sites(model).values() for p in site.core.parameters()]
    gradient: list[Tensor] = []

    def update() -> None:
        with torch.no_grad():
            for p in cores:
                p.mul_(1 + 1e-4)

    def run() -> Callable[[], None]:
        model.zero_grad(set_to_none=True)
        for leaf in tree_iter((args, kwargs)):
            if isinstance(leaf, Tensor):
                leaf.grad = None
        with torch.enable_grad():
            y = first_output(model(*args, **kwargs))
        if not y.requires_grad:
            raise InputError("no gradient goes through the model: its inputs are ids that no nn.Embedding reads")
        if not gradient:
            gradient.append(torch.randn_like(y))
        y.backward(gradient[0])
        return update

    return run


def _open(call: Call) -> Call:
    """The inputs, numbers among them as leaves that get a gradient; masks do not."""
    args, kwargs = call

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor

    opened = {n: v if n.endswith("mask") else tree_map_only(Tensor, leaf, v) for n, v in kwargs.items()}
    return tree_map_only(Tensor, leaf, args), opened


def _open_embedding(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def _in_place(y: Any, left: Any, right: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """FLOPs of a product that is added in place, by the shapes of its operands."""
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: _in_place}  # which the counter does not know, and low-rank forwards end with


def products(run: Run, device: torch.device) -> int:
    """Floating-point operations of the matrix products in one run.

    On the CPU attention is computed by its definition meanwhile, since its fused kernel is not counted.
    """
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with plain, FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        after = run()
    if callable(after):
        after()
    return int(counter.get_total_flops())


def lowerings(model: nn.Module, run: Run) -> dict[str, int]:
    """How many sites are computed by which lowering in one run; "weight" where the weight itself is changed."""
    found = {key: "weight" for key, site in sites(model).items() if site.host.name == "weight"}
    handles = []
    for key, site in sites(model).items():

        def see(module: Any, args: Any, kwargs: Any, key: str = key) -> None:
            found[key] = module.sspace.chosen(args[0] if args else next(iter(kwargs.values())))

        if site.host.name == "module":
            handles.append(site.host.owner.register_forward_pre_hook(see, with_kwargs=True))
    try:
        after = run()
    finally:
        for handle in handles:
            handle.remove()
    if callable(after):
        after()
    return dict(Counter(sorted(found.values())))
