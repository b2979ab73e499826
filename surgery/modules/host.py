"""How an adapter meets a model: what it asks of its host. The hosts are in :mod:`surgery.hosting`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from passes.errors import SurgeryError


class Host:
    """What all hosts are, with the answers of a host in delta form, whose weight is there.

    Attributes:
        name: "module" (called), "weight" (read), or "graph" (inlined).
        in_place: how a model that is operated on in place hosts the site; "module" or "weight". None in a graph while
            its nodes are being looked up.
        inlined: whether the adapter's operations are nodes of a graph.
        changes_weight: whether the adapter gives a changed weight, and not a term that is added to a product.
        convolves: whether the owner is a convolution that is called.
        exact: whether the base's own forward is that of ``nn.Linear`` or ``Conv1D`` to the letter, so that its output
            may be added to in place.
        owner: the module that has the weight; of a graph, the graph module.
        weight_name, bias_name: names of the base parameters in the owner.
        order: names of the owner's own parameters before surgery.
        keeps_base: whether the base weight is there; in residual form it need not be.
        set_aside: the base parameter where the owner registers it no more, as in residual form; else None.
        base_error: of the weight that the tensors of the residual form give back; None in delta form.
        base_fingerprint: of a base weight that was not kept.
        entered: whether the module's own forward runs, which reads the base weight.
        cast: whether the model was cast since the base weight was dropped.
    """

    name: Literal["module", "weight", "graph"]
    in_place: Literal["module", "weight"] | None
    inlined = False
    changes_weight = False
    convolves = False
    exact = False
    keeps_base = True
    set_aside: nn.Parameter | None = None
    base_error: float | None = None
    base_fingerprint: str | None = None
    cast = False

    def __init__(self, owner: nn.Module, weight_name: str, bias_name: str | None) -> None:
        self.owner, self.weight_name, self.bias_name = owner, weight_name, bias_name
        self.entered = False  # of the instance from the start: compiled code asks whether it is there
        self.order = tuple(owner._parameters)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype that the base weight has, or had."""
        return self.parameter().dtype

    def parameter(self) -> torch.Tensor:
        """The parameter that holds the base weight; of a part of a packed weight, the whole."""
        raise NotImplementedError

    def place(self) -> tuple[Mapping[str, torch.Tensor | None], str]:
        """The table that holds the base parameter, and its name there; it has none where the weight is computed."""
        return self.owner._parameters, self.weight_name

    def registered(self) -> torch.Tensor | None:
        """The base parameter as it is registered, or None where there is none."""
        table, name = self.place()
        return table.get(name)

    def bias(self) -> torch.Tensor | None:
        """The frozen bias, of a part its entries; or None."""
        raise NotImplementedError

    def split(self) -> None:
        """Go over to residual form, in a graph."""
        raise SurgeryError("only a graph changes the form of its sites")

    def use_base(self) -> None:
        """Go over to delta form, in a graph."""
        raise SurgeryError("only a graph changes the form of its sites")

    def drop_base(self, fingerprint: str) -> None:
        """Let go of a base weight that a remainder stands in for; files know it by the fingerprint."""
        raise SurgeryError("only a module in residual form does without its base weight")

    def detach(self) -> None:
        """Take the adapter off its site; the owner is what it was."""
        raise NotImplementedError

    def put_weight(self, weight: torch.Tensor) -> None:
        """Take the adapter off and give the owner a new weight parameter; the old tensor is not written."""
        raise NotImplementedError
