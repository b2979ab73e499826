"""What is in force in a forward: the coefficient, the lasting factors of sites, and the cores."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Protocol

import torch


class CoreVersions(Protocol):
    """The tensors of all cores of a root at some time."""

    def changed(self, core: torch.nn.Module | None) -> bool:
        """Whether a core (None: any of them) was written to since."""


@dataclass(eq=False)
class Setting:
    """What is in force in a forward.

    Attributes:
        coeff, second: the coefficient along both sequences; see :class:`surgery.modules.steering.Steering`.
        copies: of both on other devices.
        rows, known: how rows relate to a batch, and whether they are those of a call of the root.
        given: what was set, where it is more than a number.
        number: what was set, where it is one.
        scales: lasting factors of sites by their cores, where they have changed since.
        snapshot: of the cores; None where no call of the root has looked at them.
        within: the non-reentrant checkpoints in whose forward it was set, which set it again when they are recomputed.
        graph: what all graphs hold that were recorded under it, as far as outputs of the root tell.
    """

    coeff: torch.Tensor
    second: torch.Tensor | None
    copies: dict[tuple[int, torch.device], torch.Tensor]
    rows: str = "exact"
    known: bool = False
    given: object = None
    number: float | None = None
    scales: dict[torch.nn.Module, torch.Tensor | None] = field(default_factory=dict)
    snapshot: CoreVersions | None = None
    within: tuple[weakref.ref[object], ...] = ()
    graph: weakref.ref[Graph] | None = None

    def value(self, stream: int, device: torch.device) -> torch.Tensor:
        """The coefficient for a site on a device, which follows the main (0) or the second sequence (1) of a model."""
        coeff = self.second if stream and self.second is not None else self.coeff
        if coeff.device == device:
            return coeff
        copy = self.copies.get((stream, device))
        return coeff.to(device) if copy is None else copy

    def needed(self) -> bool:
        """Whether a graph is known to be left that was recorded under it."""
        return self.graph is not None and self.graph() is not None

    def held(self) -> Graph:
        """What a graph is to hold."""
        graph = None if self.graph is None else self.graph()
        if graph is None:
            graph = Graph()
            self.graph = weakref.ref(graph)
        return graph

    def like(self, other: Setting) -> bool:
        """Whether a forward under both is the same."""
        if self is other:
            return True
        return (
            self.snapshot is other.snapshot
            and not (self.scales or other.scales)
            and self.number is not None
            and self.number == other.number
        )


class Graph:
    """Held by the nodes of the outputs of a root."""


Entries = list[tuple[int, Setting | None]]  # from which number on, in order; None: no longer known


def find(entries: Entries, number: int, checkpoint: object) -> tuple[Setting | None, Setting | None] | None:
    """What was in force at a number, and when the checkpoint that the number lies in began; None before the first."""
    i = bisect_right(entries, number, key=lambda entry: entry[0]) - 1
    if i < 0:
        return None
    found = now = entries[i][1]
    while i and now is not None and checkpoint is not None and any(ref() is checkpoint for ref in now.within):
        i -= 1
        now = entries[i][1]
    return now, found
