"""Small models whose sites see the rows of a batch in every way, and each row by itself in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from surgery import apply_surgery, sites, undo_surgery

WIDTH = 8


class Pair(nn.Module):
    """Two linear modules, with what each kind does to the batch around them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def both(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class SequenceFirst(Pair):
    """Rows along dimension 1 of the sites, as in Longformer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(x.transpose(0, 1)).transpose(0, 1)


class Flattened(Pair):
    """Tokens of a row are neighbours."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Interleaved(Pair):
    """Tokens of one position are neighbours."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = x.transpose(0, 1)
        return self.both(turned.flatten(0, 1)).unflatten(0, turned.shape[:2]).transpose(0, 1)


class Windows(Pair):
    """Windows of two positions, as in Swin."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (0, 0, 0, x.shape[1] % 2))
        cut = self.both(padded.reshape(-1, 2, WIDTH)).reshape(padded.shape)
        return cut[:, : x.shape[1]]


class InnerBlocks(Pair):
    """Blocks along dimension 1, behind a dimension of heads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, WIDTH // 2)).permute(2, 0, 1, 3).flatten(1, 2)
        done = self.both(torch.cat([heads, heads.flip(0)], -1))
        return done.sum(0).unflatten(0, x.shape[:2])


class Recurrent(Pair):
    """A recurrent network between, whose input and output are sequence-first: so are the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.rnn(torch.tanh(self.a(x)))[0])


class Called(Pair):
    """Half of the tokens, by a rule that reads them, as experts are given theirs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.a(x).flatten(0, 1)
        to = (x.flatten(0, 1)[:, 0] > 0).nonzero().flatten()
        return flat[:, :WIDTH].index_add(0, to, self.b(torch.tanh(flat[to]))).unflatten(0, x.shape[:2])


class Packed(Pair):
    """The tokens that count, of all rows in one sequence."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        counts = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        out = torch.zeros_like(x)
        out[counts] = self.both(x[counts])
        return out


class Sorted(Pair):
    """All tokens in an order that reads them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.tanh(self.a(x)).flatten(0, 1)
        order = x.flatten(0, 1)[:, 0].argsort()
        return self.b(flat[order])[order.argsort()].unflatten(0, x.shape[:2])


class AcrossRows(Pair):
    """Each row sees the mean of all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.a(x))
        return self.b(h + h.mean(0))


class Positions(Pair):
    """One site is given positions alone, as many as the input has rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        where = torch.linspace(-1, 1, 12, dtype=x.dtype).expand(len(x), 12)
        return self.a(x)[..., :WIDTH] + self.b(where)[:, None]


class Conditioned(Pair):
    """One site is given what is alike in all rows, as a time step is, and what it gives is added to each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = torch.linspace(-1, 1, 12, dtype=x.dtype).expand(len(x), 12)
        return self.a(x + self.given(self.b(step))[:, None])

    def given(self, steps: torch.Tensor) -> torch.Tensor:
        return steps


class Turned(Conditioned):
    """What is alike goes to the rows in another order."""

    def given(self, steps: torch.Tensor) -> torch.Tensor:
        return steps.flip(0)


class Shared(Conditioned):
    """What is alike is there as often as there are rows, and goes to all of them together."""

    def given(self, steps: torch.Tensor) -> torch.Tensor:
        return steps.mean(0, keepdim=True)


LAYOUTS: dict[str, tuple[type[Pair], int, tuple[int, str]]] = {
    "sequence_first": (SequenceFirst, 0, (1, "entries")),
    "flattened": (Flattened, 0, (0, "blocks")),
    "interleaved": (Interleaved, 0, (0, "cycles")),
    "windows": (Windows, 0, (0, "blocks")),
    "inner_blocks": (InnerBlocks, 0, (1, "blocks")),
    "recurrent": (Recurrent, 1, (1, "entries")),
}
REFUSED: dict[str, tuple[type[Pair], str]] = {
    "called": (Called, "changes in size with the contents"),
    "sorted": (Sorted, "mixes the rows"),
    "across_rows": (AcrossRows, "mixes the rows"),
    "positions": (Positions, "does not depend on what a row"),
    "turned": (Turned, "does not depend on what a row"),
    "shared": (Shared, "does not depend on what a row"),
}


def shaken(model: nn.Module, variant: Any = "antipasto", **options: Any) -> Any:
    """A model after surgery, its cores at values of their own."""
    apply_surgery(model, variant, **{"r": 6, "progress": False, **options})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in sites(model).values():
            for parameter in site.core.parameters():
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return model


def operated(kind: type[Pair], **options: Any) -> Any:
    """One of the models above."""
    torch.manual_seed(0)
    return shaken(
        kind().eval(), **{"target_modules": ["a", "b"], "example_inputs": torch.randn(2, 5, WIDTH), **options}
    )


def one_by_one(model: nn.Module, coeffs: torch.Tensor, run: Callable[[nn.Module], torch.Tensor], dim: int = 0) -> Any:
    """Each row of a model of gains, from dense weights that are formed for it in float64 without any adapter.

    Args:
        run: gives the output of a model in float64, for the whole batch.
        dim: the dimension of the output that the rows lie along.
    """
    rows = []
    for i, coeff in enumerate(coeffs.tolist()):
        wide = copy.deepcopy(model).double()
        changes = {}
        for key, site in sites(wide).items():
            U, S, Vh, g = (t.detach().double() for t in (site.factors.U, site.factors.S, site.factors.Vh, site.core.g))
            change = (U * (S * F.elu(coeff * g))) @ Vh
            changes[key] = change if site.layout == "out_in" else change.T
        undo_surgery(wide)
        with torch.no_grad():
            for key, change in changes.items():
                wide.get_submodule(key).weight.add_(change)
            rows.append(run(wide).select(dim, i))
    return torch.stack(rows, dim).float()
