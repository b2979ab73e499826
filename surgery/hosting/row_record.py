"""What was measured of a root's rows: once for each way to call it, at the first use of a coefficient by row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from passes.errors import InputError
from passes.ir.forward_context import Call
from passes.ir.provenance import adapter_instances
from passes.ir.torch_internals import unseen_by_checkpoints
from surgery.hosting.coefficient import Coefficient, Sequences
from surgery.hosting.row_probe import DoesNotRunError, Layouts, Run, chosen, join, measure_rows
from surgery.modules.adapter import ROWS_FIRST, Adapter
from surgery.modules.coefficients import WAY_OUT, RowLayout
from surgery.modules.steering import Steering

IN_GRAPHS = (ROWS_FIRST, RowLayout(0, "blocks"))


@dataclass
class RowRecord:
    """Where the rows of a batch lie.

    Attributes:
        batch_dims: the dimension of the model's inputs that rows lie along, by the kind of call.
        refused: sites that have no coefficient by row, with the reason, by the kind of call that reaches them.
        layouts: what all measurements of a site agree on.
        sites: those that were measured; others are put on or taken off meanwhile, and it is measured again.
    """

    batch_dims: dict[tuple[object, ...], int] = field(default_factory=dict)
    refused: dict[tuple[object, ...], str | None] = field(default_factory=dict)
    layouts: dict[Adapter, Layouts | str] = field(default_factory=dict)
    sites: dict[str, Adapter] | None = None

    def batch_dim(
        self,
        root: nn.Module,
        sites: dict[str, Adapter],
        steering: Steering,
        call: Call,
        sequences: Sequences,
        coefficient: Coefficient,
    ) -> int:
        """The dimension of the inputs that the rows of a call lie along; measured where it is not known.

        Raises:
            InputError: a site that the call reaches has no coefficient by row.
        """
        self._follow(sites)
        kind, first = sequences.kind(), sequences.first
        if kind not in self.refused:
            dims, alike = coefficient.batch_dims(sequences), coefficient.value.shape == (1,)
            if first is None or not dims or alike or max(first.shape[dim] for dim in dims) == 1:
                return dims[0] if dims else 0  # one value for all rows, one row, or what will be refused for its size
            self._measure(root, steering, call, kind, dims)
        if (reason := self.refused[kind]) is not None and coefficient.value.shape != (1,):
            raise InputError(reason)
        return self.batch_dims[kind]

    def prepare(self, root: nn.Module, sites: dict[str, Adapter], steering: Steering, call: Call) -> bool:
        """Measure with inputs that the model should take, rows first, unless something has been measured already.

        Returns:
            Whether the rows are known.

        Raises:
            InputError: a site has no coefficient by row.
        """
        self._follow(sites)
        if self.refused:
            return True
        kind = Sequences(root, *call).kind()
        try:
            self._measure(root, steering, call, kind, (0,))
        except DoesNotRunError:
            return False  # the inputs are not what the model wants; those of the next call are
        if (reason := self.refused[kind]) is not None:
            raise InputError(reason)
        return True

    def _follow(self, sites: dict[str, Adapter]) -> None:
        """Begin anew where the sites are others than those that were measured."""
        if self.sites is not sites:
            self.batch_dims, self.refused, self.layouts, self.sites = {}, {}, {}, sites

    def _measure(
        self, root: nn.Module, steering: Steering, call: Call, kind: tuple[object, ...], dims: tuple[int, ...]
    ) -> None:
        """Measure along each dimension that the rows may lie along, until all sites agree."""
        assert self.sites is not None
        tried = []
        for dim in dims:
            with unseen_by_checkpoints():
                found = measure_rows(root, steering, call, dim, _run_of(root, self.sites))
            layouts = {site: found[site] for site in self.sites.values() if site in found}
            tried.append((dim, layouts))
            if not any(isinstance(one, str) for one in layouts.values()):
                break
        else:
            tried.reverse()  # none is better than the first
        dim, layouts = tried[-1]
        self.batch_dims[kind], self.refused[kind] = dim, None
        for key, site in self.sites.items():
            if site not in layouts:
                continue
            self.layouts[site] = join(self.layouts.get(site, layouts[site]), layouts[site])
            site.row_layout = chosen(self.layouts[site])
            if (reason := _reason(site)) and self.refused[kind] is None:
                self.refused[kind] = f"site {key!r}: {reason}; {WAY_OUT}"

    def __deepcopy__(self, memo: dict[int, object]) -> RowRecord:
        return RowRecord()

    def __reduce__(self) -> tuple[object, ...]:
        return RowRecord, ()


def _reason(site: Adapter) -> str | None:
    """Why a site has no coefficient by row, or None."""
    layout = site.row_layout
    if not isinstance(layout, RowLayout):
        return layout
    if site.host.inlined and layout not in IN_GRAPHS:
        return (
            f"its rows lie as {layout.kind} along dimension {layout.dim} of its input, and a graph takes them as "
            "blocks of the first; steer the model that the graph was made from"
        )
    return None


def _run_of(root: nn.Module, sites: Mapping[str, Adapter]) -> Run:
    """What calls a root, and tells what each adapter is given."""
    if isinstance(root, fx.GraphModule):
        return _Interpreter(root, sites).call
    return lambda call, see: root(*call[0], **call[1])


class _Interpreter(fx.Interpreter):
    """Runs a graph, and tells what its inlined adapters are given; those of modules tell it themselves."""

    def __init__(self, root: fx.GraphModule, sites: Mapping[str, Adapter]) -> None:
        super().__init__(root)  # type: ignore[no-untyped-call]
        self.root = root
        self.readers: dict[str, list[Adapter]] = {}
        instances = adapter_instances(root.graph)
        names = {node.name for node in root.graph.nodes}
        outs = {instance.provenance.at: instance.out.name for instance in instances}
        for instance in instances:
            site, source = sites[instance.provenance.key], instance.provenance.input
            if not site.host.changes_weight:
                self.readers.setdefault(source if source in names else outs[source], []).append(site)

    def call(self, call: Call, see: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        """Run the graph."""
        signature = inspect.signature(self.root.forward)
        known = {name: value for name, value in call[1].items() if name in signature.parameters}
        bound = signature.bind(*call[0], **known)
        bound.apply_defaults()
        self.see = see
        self.run(*bound.args, *bound.kwargs.values())

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        for site in self.readers.get(n.name, ()):
            assert isinstance(value, torch.Tensor)
            self.see(site, value)
        return value
