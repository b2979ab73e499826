"""A place in a graph: the adapter holds the tensors, and its forward is what was traced and inlined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from passes.errors import SurgeryError
from passes.ir.module_utils import attribute, private_module
from surgery.modules.host import Host

if TYPE_CHECKING:
    from surgery.modules.adapter import Adapter


class GraphSite(Host):
    """Host of an adapter that is inlined in a graph.

    Attributes:
        adapter: the adapter, whose forward is inlined.
        dtype: of the base weight.
    """

    inlined = True
    adapter: Adapter

    def __init__(
        self,
        owner: nn.Module,
        weight_name: str,
        bias_name: str | None,
        *,
        changes_weight: bool,
        in_place: Literal["module", "weight"] | None = None,
    ) -> None:
        super().__init__(owner, weight_name, bias_name)
        self.changes_weight, self.in_place = changes_weight, in_place
        self.name = "weight" if changes_weight else "graph"
        self.dtype = owner.get_parameter(weight_name).dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype that the base weight has, or had."""
        return self.dtype

    def parameter(self) -> torch.Tensor:
        """The base weight; where it was not kept, what the factors and the remainder give."""
        parameter = self.registered()
        return self.adapter.rebuilt_weight(self.weight_dtype) if parameter is None else parameter

    def registered(self) -> torch.Tensor | None:
        """The base parameter, which may be in a module of its own."""
        found = attribute(self.owner, self.weight_name)
        return found if isinstance(found, torch.Tensor) else None

    def bias(self) -> torch.Tensor | None:
        """The base bias, of a part its entries."""
        if self.bias_name is None:
            return None
        bias, rows = self.owner.get_parameter(self.bias_name), self.adapter.rows
        return bias if rows is None else bias[rows[0] : rows[1]]

    def split(self) -> None:
        """Go over to residual form."""
        self.base_error = self.adapter.split()

    def use_base(self) -> None:
        """Go over to delta form; a weight that was not kept is registered again, rounded once from float64."""
        if attribute(self.owner, self.weight_name) is None:
            path, _, local = self.weight_name.rpartition(".")
            weight = nn.Parameter(self.adapter.rebuilt_weight(self.weight_dtype), requires_grad=False)
            private_module(self.owner, path)._parameters[local] = weight
        self.adapter.form = "delta"

    def detach(self) -> None:
        """Adapters in a graph are taken out together, with their nodes."""
        raise SurgeryError(
            f"site {self.adapter.key!r} stands in a graph, from which all adapters are taken out together"
        )

    def put_weight(self, weight: torch.Tensor) -> None:
        """The pass ``merge`` gives a graph its dense weights."""
        raise SurgeryError(f"site {self.adapter.key!r} stands in a graph, whose weights the pass merge replaces")
