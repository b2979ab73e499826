"""Lowerings: ways to compute one adapted linear, ``y = x W^T + b + delta(x Vh^T) U^T``, at different costs.

A file in this package defines one :class:`Lowering` and is found without any list. Which one runs is decided in each
forward by the number of tokens and by whether the core is being trained, along a :class:`Schedule` of the site.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch

from surgery.lowerings._site import Base, LinearSite
from surgery.support.configuration import import_all

ALWAYS = "lowrank"  # what is possible at every site, with every coefficient, and what traces and exports show
AMORTISED_FORWARDS = 16  # forwards assumed per core update when pricing a materialised weight


class Size(NamedTuple):
    """What a cost depends on: tokens, sizes of the site, products in its core per token, bytes of an entry, operations
    of the core.
    """

    tokens: int
    d_out: int
    d_in: int
    r: int
    core: int
    itemsize: int
    launches: int = 1


@dataclass(frozen=True)
class Work:
    """One kernel: floating-point operations, bytes that it reads and writes, launches."""

    flops: float
    bytes: float
    launches: float = 1

    @classmethod
    def product(cls, rows: int, columns: int, inner: int, itemsize: int) -> Work:
        """A matrix product (rows, inner) by (inner, columns)."""
        return cls(2.0 * rows * columns * inner, itemsize * (rows * inner + inner * columns + rows * columns))

    @classmethod
    def pointwise(cls, entries: int, itemsize: int, operands: int = 3) -> Work:
        """An elementwise operation."""
        return cls(float(entries), itemsize * operands * entries)

    def times(self, count: int) -> Work:
        """A batch of it, launched once."""
        return Work(self.flops * count, self.bytes * count, self.launches)

    def amortised(self) -> Work:
        """Its share of one of the forwards that what it makes serves."""
        return Work(
            self.flops / AMORTISED_FORWARDS, self.bytes / AMORTISED_FORWARDS, self.launches / AMORTISED_FORWARDS
        )


class Lowering(Protocol):
    """One way to compute a site.

    Attributes:
        name: as in ``apply_surgery(lowering=...)``.
        steers_rows: whether a coeff per row of the batch is possible.
        caches: whether inference reads what was derived from the core before, under the lowering's name in the site's
            cache, so that the root has to have checked it.
        takes_projection: whether it relies on ``U^T W = S Vh``, so that the root has to have checked the weight.
        form: of the sites that it computes; the residual form has one lowering.
    """

    name: str
    form: str
    steers_rows: bool
    caches: bool
    takes_projection: bool

    def why_not(self, site: LinearSite) -> str | None:
        """Why a site cannot be computed so, or None."""

    def advised(self, site: LinearSite) -> bool:
        """Whether it may be chosen where it is not asked for by name."""

    def run(self, site: LinearSite, x: torch.Tensor, base: Base) -> torch.Tensor:
        """The site's output (..., d_out) for an input x (..., d_in)."""

    def work(self, size: Size, *, training: bool) -> list[Work]:
        """The kernels beside those of the plain base."""


Kind = TypeVar("Kind", bound=Lowering)
REGISTRY: dict[str, Lowering] = {}


def register(cls: type[Kind]) -> type[Kind]:
    """Class decorator: make a lowering known by its name."""
    lowering = cls()
    REGISTRY[lowering.name] = lowering
    return cls


class Schedule(NamedTuple):
    """Which lowering runs from how many tokens on, as ``((0, "lowrank"), (180, "dense"))``, in four cases."""

    inference: tuple[tuple[int, str], ...]
    training: tuple[tuple[int, str], ...]
    rows_inference: tuple[tuple[int, str], ...]
    rows_training: tuple[tuple[int, str], ...]

    def case(self, *, training: bool, rows: bool) -> tuple[tuple[int, str], ...]:
        """The steps of one case."""
        if rows:
            return self.rows_training if training else self.rows_inference
        return self.training if training else self.inference


def step(steps: tuple[tuple[int, str], ...], tokens: int) -> str:
    """The lowering for a number of tokens."""
    name = steps[0][1]
    for least, other in steps[1:]:
        if tokens >= least:
            name = other
    return name


def describe(steps: Iterable[tuple[int, str]]) -> str:
    """Steps in words: ``lowrank, dense from 180``."""
    return ", ".join(f"{name} from {least:,}" if least else name for least, name in steps)


import_all(__name__, __path__)
IN_RESIDUAL = next(name for name, lowering in REGISTRY.items() if lowering.form == "residual")  # its one lowering
