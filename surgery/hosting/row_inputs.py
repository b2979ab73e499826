"""Inputs to measure rows with: a call whose rows are unlike, and the same call with one row changed at a time.

They are made of a call of the model's, so that they take the same way through it. Shapes stay while a row changes: the
same kernels run, and what does not depend on the row comes out as it was. In one of the rows all positions get the same
content, which sends its tokens to one expert wherever tokens are routed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from passes.ir.forward_context import Call, copied
from passes.ir.torch_internals import tree_flatten_with_path
from surgery.hosting.coefficient import CACHES, DECODER, Sequences
from surgery.hosting.row_contents import Vocabulary, noise_scale, noisy

ROWS = 3
LENGTHS = (8, 5)
NO_CONTENT = ("mask", "position", "length", "grid", "size", "type")  # in names of inputs that say where, not what


@dataclass(frozen=True)
class Trial:
    """A call, and what it becomes when a row changes.

    Attributes:
        batch: number of rows.
        call: with rows that are unlike.
        changed: the call by the row that is another one in it.
    """

    batch: int
    call: Call
    changed: dict[int, Call]


@dataclass(frozen=True)
class _Leaf:
    """A tensor of a call.

    Attributes:
        dim: along which its rows lie, or None.
        positions: dimensions that grow with the number of positions, and what that number becomes for one of the
            main sequence.
        content: whether it says what a row is about.
        mask: whether it says, for all rows alike, which positions count.
    """

    tensor: torch.Tensor
    dim: int | None
    positions: dict[int, int]
    content: bool
    mask: bool


class TrialMaker:
    """Makes trials of one call.

    Args:
        dim: the dimension of the inputs that the rows lie along, 0 or 1.
    """

    def __init__(self, model: nn.Module, call: Call, dim: int) -> None:
        args, kwargs = call
        found = Sequences(model, args, kwargs)
        names = [name for name, _ in zip(found.given, args, strict=False)]
        if any(found.given.get(name) is not None for name in CACHES):  # without the cache the call is its own text
            args = tuple(None if name in CACHES else value for name, value in zip(names, args, strict=True))
            kwargs = {name: value for name, value in kwargs.items() if name not in CACHES}
            length = None if found.first is None or found.first.dim() < 2 else found.first.shape[1 - dim]
            kwargs = {name: value for name, value in kwargs.items() if "mask" not in name or _spans(value, length)}
            found = Sequences(model, args, kwargs)
        self.vocabulary, self.main = Vocabulary.of(model), found.first
        self.dim, self.batch = dim, 0 if found.first is None else found.first.shape[dim]
        leaves, self.spec = tree_flatten_with_path((args, kwargs))
        self.leaves: list[object] = []
        for path, leaf in leaves:
            keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
            keys = [names[int(keys[1])] if keys[0] == "0" else keys[1], *keys[2:]]
            self.leaves.append(self._leaf(keys, leaf, found) if isinstance(leaf, torch.Tensor) else leaf)

    def _leaf(self, keys: list[str], x: torch.Tensor, found: Sequences) -> _Leaf:
        dims = [
            d for d in ((0,) if found.of_hub else (self.dim, 1 - self.dim)) if x.dim() > d and x.shape[d] == self.batch
        ]
        dim = dims[0] if dims else None
        sequences = any(x is one for one in (found.main, found.encoder))
        says_where = any(word in keys[-1] for word in NO_CONTENT)
        if x.is_floating_point():
            content = not says_where
        elif found.of_hub:
            content = sequences or keys[-1] in ("labels", *DECODER)
        else:
            content = sequences or (x.dtype != torch.bool and not says_where)
        positions: dict[int, int] = {}
        for sequence, longer in ((found.main, 0), (found.encoder, 2)):  # of unlike lengths, so that they stay apart
            if sequence is None or sequence.dim() <= 1 - self.dim:
                continue
            length = sequence.shape[1 - self.dim]
            last = x.dim() - 1 if x.is_floating_point() and x.dim() > 2 and x.shape[-2:] != (length, length) else -1
            for d in range(x.dim()):
                if d not in (dim, last) and x.shape[d] == length:
                    positions.setdefault(d, longer)
        alike = x.dim() == 2 and not x.is_floating_point() and x.numel() > 0 and bool((x == x[0, 0]).all())
        mask = alike and dim is not None and "mask" in keys[-1]
        return _Leaf(x.detach(), dim, positions, content and dim is not None, mask)

    def ways(self) -> Iterator[Callable[[int], Trial]]:
        """Ways to make trials by a seed, the cheapest first: a model that refuses one of them may take the next."""
        x = self.main
        if x is not None and x.dim() == (3 if x.is_floating_point() else 2):
            yield lambda seed: self._trial(seed, ROWS, LENGTHS[seed % len(LENGTHS)])
        yield lambda seed: self._trial(seed, ROWS, None)
        yield lambda seed: self._trial(seed, None, None)

    def _trial(self, seed: int, rows: int | None, length: int | None) -> Trial:
        """Calls with a number of rows and of positions, or as many as there are."""
        batch = self.batch if rows is None else rows
        sized = [self._sized(leaf, rows, length) if isinstance(leaf, _Leaf) else leaf for leaf in self.leaves]
        which = sorted({0, min(1, batch - 1), batch - 1})
        again = which[seed % len(which)]

        def call(changed: int | None) -> Call:
            made = [
                self._filled(leaf, x, seed, changed, again) if isinstance(leaf, _Leaf) else x  # type: ignore[arg-type]
                for leaf, x in zip(self.leaves, sized, strict=True)
            ]
            return copied(self.spec.unflatten(made))

        return Trial(batch, call(None), {row: call(row) for row in which})

    def _sized(self, leaf: _Leaf, rows: int | None, length: int | None) -> torch.Tensor:
        x = leaf.tensor
        if rows is not None and leaf.dim is not None:
            x = _taken(x, leaf.dim, rows)
        if length is not None:
            for d, longer in leaf.positions.items():
                x = _taken(x, d, length + longer)
        return x

    def _filled(self, leaf: _Leaf, x: torch.Tensor, seed: int, changed: int | None, again: int) -> torch.Tensor:
        """The contents of a tensor, all rows unlike, one of them another one than in the call that it is compared to.

        Args:
            again: the row that gets the same content at all positions where it is changed.
        """
        if leaf.mask and seed and leaf.dim is not None:
            return _cut_short(x, leaf.dim)
        if not leaf.content or leaf.dim is None or not x.numel():
            return x
        filled = x.clone().movedim(leaf.dim, 0)
        values, scale = self.vocabulary.values(x) if not x.is_floating_point() else None, 0.0
        if values is None:
            scale = noise_scale(x)
        elif not len(values):
            return x
        for row in range(len(filled)):
            other, same = row == changed, row == changed == again
            if values is not None:
                filled[row] = self.vocabulary.shifted(filled[row], values, row + seed + other, same=same)
            elif other or row + seed:
                filled[row] = noisy(filled[row], scale, 1000 * seed + 2 * row + other, same=same)
        return filled.movedim(0, leaf.dim)


def _spans(mask: object, length: int | None) -> bool:
    """Whether a mask is one of the positions of a call, and not also of what is in a cache."""
    return isinstance(mask, torch.Tensor) and mask.shape[-1] == length


def _cut_short(mask: torch.Tensor, dim: int) -> torch.Tensor:
    """A mask whose rows are of unlike lengths, as they are where what counts is packed."""
    rows = mask.clone().movedim(dim, 0)
    for i in range(1, min(len(rows), rows.shape[1] - 1)):
        rows[i, -i:] = ~rows[i, -i:] if mask.dtype == torch.bool else 1 - rows[i, -i:].clamp(0, 1)
    return rows.movedim(0, dim)


def _taken(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The first entries along a dimension, from the first on again where there are too few."""
    return x.index_select(dim, torch.arange(size, device=x.device) % x.shape[dim])
