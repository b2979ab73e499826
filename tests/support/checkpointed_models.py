"""A model whose blocks are checkpointed in every way, and its gradients by the formula, without any checkpoint."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from surgery import apply_surgery, sites
from surgery.lowerings import REGISTRY

Function = Callable[[Tensor], Tensor]
BATCH, LENGTH, WIDTH = 4, 5, 6


def _save_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE


def _non_reentrant(f: Function, x: Tensor) -> Tensor:
    return checkpoint(f, x, use_reentrant=False)


def _reentrant(f: Function, x: Tensor) -> Tensor:
    return checkpoint(f, x, use_reentrant=True)


KINDS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "non-reentrant": _non_reentrant,
    "reentrant": _reentrant,
    "selective": partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _save_products)
    ),
    "non-reentrant in non-reentrant": lambda f, x: _non_reentrant(lambda y: _non_reentrant(f, y), x),
    "reentrant in non-reentrant": lambda f, x: _non_reentrant(lambda y: _reentrant(f, y), x),
    "non-reentrant in reentrant": lambda f, x: _reentrant(lambda y: _non_reentrant(f, y), x),
    "reentrant in reentrant": lambda f, x: _reentrant(lambda y: _reentrant(f, y), x),
}

COEFFICIENTS: dict[str, list[float | Tensor]] = {
    "scalar": [0.7, -1.0],
    "rows": [torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([1.0, -1.5, 0.2, 0.0])],
    "tokens": [
        torch.linspace(-1, 1, BATCH * LENGTH).reshape(BATCH, LENGTH),
        torch.linspace(2, -1, BATCH * LENGTH).reshape(BATCH, LENGTH),
    ],
    "mixed": [0.7, torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.linspace(-1, 1, BATCH * LENGTH).reshape(BATCH, LENGTH)],
}


class Block(nn.Module):
    """A residual block of two linear sites."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Blocks(nn.Module):
    """Three blocks, each of which is checkpointed."""

    kind: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.kind is None else KINDS[self.kind](layer, x)
        return x


@functools.cache
def _operated(lowering: str, dtype: torch.dtype) -> Blocks:
    torch.manual_seed(0)
    model = Blocks().to(dtype)
    apply_surgery(model, "antipasto", r=4, lowering=lowering, example_inputs=inputs(dtype), progress=False)
    for site in sites(model).values():
        nn.init.normal_(site.core.g, std=0.4)
    return model


def checkpointed(kind: str | None, lowering: str = "auto", dtype: torch.dtype = torch.float64) -> Any:
    """The operated model, its cores at random values."""
    model = copy.deepcopy(_operated(lowering, dtype))
    model.kind = kind
    return model


LOWERINGS = ("auto", *(name for name, lowering in REGISTRY.items() if lowering.form == "delta"))


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    """(batch, length, width), of which a gradient is wanted."""
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the input, and of each core."""
    found = [x.grad, *(site.core.g.grad for site in sites(model).values())]
    assert all(g is not None and g.abs().max() > 0 for g in found)
    return found  # type: ignore[return-value]


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    """A sum that is not linear in any output."""
    return sum((i + 1) * (y**3).sum() for i, y in enumerate(outputs))  # type: ignore[return-value]


def expected(model: Blocks, coefficients: Sequence[Sequence[float | Tensor]]) -> list[Tensor]:
    """The gradients of :func:`loss_of` by the formula in float64, of forwards with a coefficient for each block."""
    x, cores = inputs(), {key: site.core.g.detach().double().requires_grad_() for key, site in sites(model).items()}
    outputs = []
    for each in coefficients:
        y = x
        for i, coeff in enumerate(each):
            y = _block(model, f"layers.{i}", y, coeff, cores)
        outputs.append(y)
    loss_of(outputs).backward()
    return [x.grad, *(g.grad for g in cores.values())]  # type: ignore[misc]


def _block(model: Blocks, path: str, x: Tensor, coeff: float | Tensor, cores: dict[str, Tensor]) -> Tensor:
    return x + _site(model, f"{path}.down", torch.tanh(_site(model, f"{path}.up", x, coeff, cores)), coeff, cores)


def _site(model: Blocks, key: str, x: Tensor, coeff: float | Tensor, cores: dict[str, Tensor]) -> Tensor:
    linear, factors = model.get_submodule(key), sites(model)[key].factors
    U, S, Vh = (tensor.double() for tensor in (factors.U, factors.S, factors.Vh))
    c = torch.as_tensor(coeff, dtype=torch.float64)
    c = c.reshape(*c.shape, *[1] * (3 - c.dim())) if c.dim() else c
    y: Tensor = F.linear(x, linear.weight.double(), linear.bias.double())  # type: ignore[operator, union-attr]
    return y + ((x @ Vh.T) * S * F.elu(c * cores[key])) @ U.T


def apart(found: Sequence[Tensor], known: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest entry of each tensor."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in zip(found, known, strict=True)
    )
