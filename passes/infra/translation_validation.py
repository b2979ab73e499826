"""Translation validation: run a graph before and after a pass, and name the first site where
the outputs diverge.

The graph after the pass goes on with the value that the graph before it had at every site, so that each stretch between
two sites is compared by itself: a fault is named where it is, and roundings do not add up over the depth of a model.

While a pass that keeps the cores live is validated, the trainable tensors of the adapters hold noise and the
coefficient another value: at identity the best adapter and a broken one give the same.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import fx, nn

from passes.errors import InputError, PassError
from passes.infra.tolerance import RELATIVE, disagreement, relative_error
from passes.ir.adapter_trace import InlinableAdapter, is_adapter
from passes.ir.forward_context import Call, copied, state_kept
from passes.ir.provenance import provenance_of
from passes.ir.torch_internals import tree_leaves, tree_map

Values = dict[str, object]
Reference = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
NOISE, COEFF_FACTOR = 0.3, 0.75


class Validation:
    """Inputs to compare graphs on.

    Args:
        call: example inputs, as positional and keyword arguments.
        random: how many more calls with random inputs of the same shapes.
        seed: of the random inputs and of the noise in the cores.
    """

    def __init__(self, call: Call, *, random: int = 1, seed: int = 0) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.calls = [call, *(_randomised(call, generator) for _ in range(random))]
        self.error = 0.0

    def observe(
        self,
        graph_module: fx.GraphModule,
        points: Mapping[str, str],
        *,
        references: Mapping[str, tuple[str, Reference]] | None = None,
        forced: list[Values] | None = None,
        frozen: Collection[str] = (),
    ) -> list[Values]:
        """Run a graph on every call and record the value at each point, and the outputs under the name "".

        Args:
            points: the key of each site to look at, by the name that its product's node had before surgery.
            references: by the name of a node, that of its input and the function that gives what it should be.
            forced: values to go on with after each point.
            frozen: tensors that the pass may take for constants, so that they keep their values.
        """
        observed = []
        with _noisy(graph_module, self.seed, frozen):
            for i, call in enumerate(self.calls):
                runner = _Runner(graph_module, points, references or {}, forced[i] if forced else {})
                with state_kept(graph_module), torch.no_grad():
                    torch.manual_seed(self.seed)
                    observed.append(runner.observe(*copied(call)))
        return observed

    def compare(self, name: str, before: list[Values], after: list[Values], points: Mapping[str, str]) -> None:
        """Compare two observations; the largest relative error is replaced in ``error``.

        Raises:
            PassError: names the pass, the first diverging site and its node.
        """
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            on = "the example inputs" if i == 0 else "random inputs"
            for at, value in old.items():
                what = f"first at site {points[at]!r} (node {at!r})" if at else "in its outputs, after the last site"
                if at not in new:
                    raise PassError(f"pass {name!r} lost site {points[at]!r} (node {at!r})")
                for expected, value_after in zip(tree_leaves(value), tree_leaves(new[at]), strict=True):
                    if problem := _difference(value_after, expected):
                        raise PassError(f"pass {name!r} changed what the model computes, {what}, on {on}: {problem}")
                    if isinstance(expected, torch.Tensor) and expected.dtype in RELATIVE and expected.isfinite().all():
                        self.error = max(self.error, relative_error(value_after, expected))


def _difference(actual: object, expected: object) -> str | None:
    if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
        same = type(actual) is type(expected) and actual == expected
        return None if same else f"{actual!r:.80}, expected {expected!r:.80}"
    if actual.dtype != expected.dtype:
        return f"dtype {actual.dtype}, expected {expected.dtype}"
    return disagreement(actual, expected)


class _Runner(fx.Interpreter):
    """Runs a graph, records the values at points, and applies references and forced values."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        points: Mapping[str, str],
        references: Mapping[str, tuple[str, Reference]],
        forced: Values,
    ) -> None:
        super().__init__(graph_module, garbage_collect_values=not references)
        self.graph_module, self.references, self.forced = graph_module, references, forced
        self.recorded: Values = {}
        self.by_name = {node.name: node for node in graph_module.graph.nodes}
        self.looked_at = {at: at for at in points if at in self.by_name}
        for node in graph_module.graph.nodes:
            provenance = provenance_of(node)
            if provenance is not None and provenance.at in points:
                self.looked_at.pop(provenance.at, None)
        for node in graph_module.graph.nodes:
            provenance = provenance_of(node)
            if provenance is not None and provenance.role == "out" and provenance.at in points:
                self.looked_at[node.name] = provenance.at

    def observe(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Values:
        signature = inspect.signature(self.graph_module.forward)
        known = {name: value for name, value in kwargs.items() if name in signature.parameters}  # no labels, no flags
        try:
            bound = signature.bind(*args, **known)
        except TypeError as error:
            raise InputError(f"the graph does not take the inputs to verify it on: {error}") from error
        bound.apply_defaults()
        output = self.run(*bound.args, *bound.kwargs.values())
        return {**self.recorded, "": output}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.name in self.references:
            source, function = self.references[n.name]
            value = function(self.env[self.by_name[source]] if source != n.name else value, value)
        at = self.looked_at.get(n.name)
        if at is not None:
            self.recorded[at] = value.detach().clone() if isinstance(value, torch.Tensor) else value
            value = self.forced.get(at, value)
            if isinstance(value, torch.Tensor) and at in self.forced:
                value = value.clone()  # the model may write to it
        return value


@contextlib.contextmanager
def _noisy(graph_module: fx.GraphModule, seed: int, frozen: Collection[str]) -> Iterator[None]:
    """Replace the trainable tensors of all adapters by noise, and scale their coefficients, but for frozen ones."""
    generator = torch.Generator().manual_seed(seed)
    undo: list[Callable[[], None]] = []
    adapters = [(path, module) for path, module in graph_module.named_modules() if is_adapter(module)]
    try:
        for prefix, adapter in adapters:
            assert isinstance(adapter, nn.Module)
            for path, module in adapter.named_modules(prefix=prefix):
                for name, parameter in module._parameters.items():
                    if parameter is None or not parameter.requires_grad or f"{path}.{name}" in frozen:
                        continue
                    undo.append(functools.partial(module._parameters.__setitem__, name, parameter))
                    change = NOISE * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    value = parameter.detach() + change.to(parameter)
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for holder, name in _live_coefficients(adapters, frozen):
            undo.append(functools.partial(holder._buffers.__setitem__, name, holder._buffers[name]))
            holder._buffers[name] = holder.get_buffer(name) * COEFF_FACTOR
        yield
    finally:
        for put_back in reversed(undo):
            put_back()


def _live_coefficients(
    adapters: list[tuple[str, InlinableAdapter]], frozen: Collection[str]
) -> Iterator[tuple[nn.Module, str]]:
    """The modules that hold a coefficient, each once, since adapters may share one; none that is frozen anywhere."""
    holders: dict[int, tuple[nn.Module, str]] = {}
    fixed: set[int] = set()
    for prefix, adapter in adapters:
        path, _, name = adapter.coefficient_name.rpartition(".")
        holder = adapter.get_submodule(path)
        holders[id(holder)] = holder, name
        if f"{prefix}.{adapter.coefficient_name}" in frozen:
            fixed.add(id(holder))
    yield from (found for key, found in holders.items() if key not in fixed)


def _randomised(call: Call, generator: torch.Generator) -> Call:
    """Inputs of the same shapes: normal noise of the same scale, integers and the like in another order."""

    def other(value: object) -> object:
        if not isinstance(value, torch.Tensor) or value.numel() == 0:
            return value
        value = value.detach()
        if value.is_floating_point() and value.isfinite().all():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            scale = float(value.to(torch.float64).square().mean().sqrt()) or 1.0
            return (noise * scale).to(value)
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        return value.flatten()[order].reshape(value.shape)

    args, kwargs = tree_map(other, call)
    return args, kwargs
