"""Which sites of a model are operated on, with which rank, and hosted how: decided before anything is touched."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from passes.analysis.linear_sites import Site
from passes.capture.inspect_model import Inspection, graph_products, inspect_model
from passes.ir.forward_context import ExampleInputs
from surgery.errors import VariantError
from surgery.hosting.attach import check_not_operated
from surgery.hosting.checks import check_loaded, check_weight
from surgery.hosting.choose import choose_host, is_product
from surgery.hosting.graph_surgery import original_graph
from surgery.hosting.state import require_bases, state_of
from surgery.planning.peft_layers import base_sites
from surgery.planning.target_selection import GROUPS, Patterns, select_sites, site_ranks
from surgery.variants import Variant


@dataclass(frozen=True)
class Plan:
    """The chosen sites.

    Attributes:
        inspection: of the model.
        sites: in order of execution.
        ranks, hosts: by key.
    """

    inspection: Inspection
    sites: list[Site]
    ranks: dict[str, int]
    hosts: dict[str, str]

    @property
    def called(self) -> set[str]:
        """Keys of the sites whose module is called for every product."""
        return {key for key, host in self.hosts.items() if host == "module"}


def known_inspection(model: nn.Module) -> Inspection | None:
    """The inspection of a model that is already operated on, since its graph no longer shows the plain products."""
    state = state_of(model)
    return state.inspection if state else None


def inspection_of(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Inspection:
    """The inspection of a model, operated on or not; what belongs to PEFT is no site.

    Raises:
        InputError: the model does not run on the example inputs.
    """
    return known_inspection(model) or base_sites(model, inspect_model(model, example_inputs, is_product))


def make_plan(
    model: nn.Module,
    config: Variant,
    *,
    target_modules: Patterns | None = None,
    exclude_modules: Patterns | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    example_inputs: ExampleInputs | None = None,
) -> Plan:
    """Choose sites as the arguments of ``apply_surgery`` say.

    Raises:
        SurgeryError: nothing fits, or a chosen weight cannot be operated on.
    """
    check_loaded(model)
    require_bases(model)
    inspection = inspection_of(model, example_inputs)
    chosen = select_sites(
        model,
        inspection,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform,
        config=config,
    )
    check_not_operated(model, chosen)
    ranks = site_ranks(chosen, config, rank_pattern)
    for site in chosen:
        check_weight(model, site)
    products = graph_products(model, original_graph(model))[0] if isinstance(model, fx.GraphModule) else {}
    hosts = {s.key: "graph" if s.key in products else choose_host(model, s, inspection.calls) for s in chosen}
    if not config.linear and (read := [key for key, host in hosts.items() if host == "weight"]):
        message = (
            f"site {read[0]!r}: {config.name} is not linear in its input, and this product reads its weight without "
            f"calling a module, so that there is no place for it ({len(read)} such)"
        )
        chosen = _without(chosen, read, message, config, target_modules)
    if config.needs_calibration and (stacks := [site.key for site in chosen if site.stack is not None]):
        message = (
            f"site {stacks[0]!r}: {config.name} chooses its factors by data, and what reaches each matrix of a stack "
            f"is not seen, so that there are none for it ({len(stacks)} such)"
        )
        chosen = _without(chosen, stacks, message, config, target_modules)
    return Plan(inspection, chosen, ranks, hosts)


def _without(
    chosen: list[Site], unfit: list[str], message: str, config: Variant, target_modules: Patterns | None
) -> list[Site]:
    """Leave sites out with a warning, where a group of sites was asked for and others remain.

    Raises:
        VariantError: with the message.
    """
    target = config.default_targets if target_modules is None else target_modules
    chosen = [site for site in chosen if site.key not in unfit]
    if target not in GROUPS or not chosen:
        raise VariantError(f"{message}; leave it out with exclude_modules")
    warnings.warn(f"{message}: left alone", stacklevel=4)
    return chosen
