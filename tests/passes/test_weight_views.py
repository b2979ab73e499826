"""The digits of a view against the entries that the view really shows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import fx

from passes.analysis.operands import Operand, follow
from passes.analysis.weight_views import UNKNOWN, dim_size

SHAPE = (4, 6, 10)
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "t": lambda w: w.flatten(0, 1).t(),
    "transpose": lambda w: w.transpose(0, -1),
    "swapaxes": lambda w: w.swapaxes(1, 2),
    "movedim": lambda w: w.movedim(0, 2),
    "permute": lambda w: w.permute(2, 0, 1),
    "view": lambda w: w.view(8, 3, -1),
    "across": lambda w: w.view(4, 4, 15),
    "copied": lambda w: w.permute(2, 0, 1).reshape(10, 24),
    "copied and cut": lambda w: w.permute(2, 0, 1).reshape(10, 24)[:, 6:12],
    "unflatten": lambda w: w.unflatten(2, (5, 2)),
    "flatten": lambda w: w.transpose(0, 1).flatten(1),
    "narrow": lambda w: w.narrow(1, 2, 3),
    "select": lambda w: w.select(0, -1),
    "slice": lambda w: w[:, 1:5, :7],
    "step": lambda w: w[:, ::2],
    "uneven step": lambda w: w[..., ::3],
    "from the end": lambda w: w[-2, None, ..., -3:],
    "split": lambda w: w.split([1, 3], 0)[1],
    "split evenly": lambda w: w.split(4, 2)[-1],
    "chunk": lambda w: w.chunk(4, 1)[2],
    "unbind": lambda w: w.unbind(1)[2],
    "squeeze": lambda w: w.narrow(0, 2, 1).squeeze(0).unsqueeze(-1),
    "squeeze all": lambda w: w.unsqueeze(1).squeeze(),
    "expand": lambda w: w.unsqueeze(0).expand(3, -1, -1, 10),
    "diagonal": lambda w: w[0, :, :6].diagonal(),
    "over an edge": lambda w: w.flatten()[5:15],
    "along an edge": lambda w: w.flatten()[60:180],
    "unfold": lambda w: w.unfold(2, 4, 2),
    "heads": lambda w: w.view(4, 3, 2, 10).transpose(1, 2).contiguous().view(4, 2, 30).unbind(1)[1],
    "copy": lambda w: w.transpose(0, 1).clone(),
}
UNFOLLOWED = {"across", "uneven step", "diagonal", "over an edge"}


def shown_by(operand: Operand, shape: torch.Size) -> torch.Tensor:
    """The entries of the parameter that digits count, less the first."""
    assert [dim_size(dim) for dim in operand.dims] == list(shape)
    ranges = [[[i * stride for i in range(size)] for stride, size in dim] for dim in operand.dims]
    per_dim = [[sum(entry) for entry in itertools.product(*dim)] for dim in ranges]
    return torch.tensor([sum(entry) for entry in itertools.product(*per_dim)]).reshape(shape)


def followed(function: Callable[[torch.Tensor], torch.Tensor], *, exported: bool) -> Operand | str | None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(SHAPE))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(self.w), x

    module = Module()
    if exported:
        graph = torch.export.export(module, (torch.ones(1),), strict=False).module().graph
    else:
        graph = fx.symbolic_trace(module).graph
    (output,) = graph.find_nodes(op="output")
    shown = output.args[0][0]
    return follow(shown, lambda name: module.w if name == "w" else None)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_digits_are_the_entries_that_a_view_shows(name, exported):
    operand = followed(VIEWS[name], exported=exported)
    if name in UNFOLLOWED:
        assert isinstance(operand, str)
        assert "cannot be followed" in operand
        return
    assert isinstance(operand, Operand)
    entries = VIEWS[name](torch.arange(240).view(SHAPE))
    assert torch.equal(shown_by(operand, entries.shape), entries - entries.flatten()[0])


def test_random_chains_of_views():
    """Whatever torch makes of a chain, the digits say the same, or that it cannot be followed."""
    generator = random.Random(0)
    known = 0
    for _ in range(300):
        steps: list[tuple[str, tuple[int, ...]]] = []
        entries = torch.arange(240).view(SHAPE)
        for _ in range(generator.randint(1, 4)):
            name, args = _step(entries, generator)
            entries = getattr(entries, name)(*args)
            steps.append((name, args))

        def chain(w: torch.Tensor, steps: list[tuple[str, tuple[int, ...]]] = steps) -> torch.Tensor:
            for name, args in steps:
                w = getattr(w, name)(*args)
            return w

        operand = followed(chain, exported=False)
        if isinstance(operand, Operand):
            known += 1
            assert torch.equal(shown_by(operand, entries.shape), entries - entries.flatten()[0]), steps
        else:
            assert isinstance(operand, str), steps
    assert known > 200


def _step(x: torch.Tensor, generator: random.Random) -> tuple[str, tuple[int, ...]]:
    dim = generator.randrange(x.dim())
    kind = generator.choice(["transpose", "narrow", "flatten", "unflatten", "reshape"])
    if kind == "transpose":
        return kind, (dim, generator.randrange(x.dim()))
    if kind == "narrow":
        start = generator.randrange(x.shape[dim])
        return kind, (dim, start, generator.randint(1, x.shape[dim] - start))
    if kind == "flatten":
        return kind, (dim, generator.randint(dim, x.dim() - 1))
    divisors = [n for n in range(1, x.shape[dim] + 1) if x.shape[dim] % n == 0]
    if kind == "unflatten":
        return kind, (dim, (generator.choice(divisors), -1))
    return kind, (-1, generator.choice(divisors))


def test_what_an_index_picks_need_not_be_known():
    def picked(w: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.index.Tensor(w, [torch.ops.aten.new_zeros(w, [7], dtype=torch.long)]).flatten(0, 1)

    operand = followed(picked, exported=False)
    assert isinstance(operand, Operand)
    assert operand.dims == (((0, UNKNOWN), (10, 6)), ((1, 10),))
