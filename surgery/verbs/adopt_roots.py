"""Surgery on a parent of models that were operated on: they become parts of one root, with one coefficient."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import nn

from passes.errors import SurgeryError
from surgery.errors import TargetError
from surgery.hosting.attach import AdapterPlan, plan_of
from surgery.hosting.beside_cores import beside_cores, brought_by_name, put_back, trained_in_place
from surgery.hosting.root import unmake_root
from surgery.hosting.state import (
    State,
    adapters_of,
    check_weights,
    module_paths,
    record_of,
    require_bases,
    restore_flags,
    state_of,
)
from surgery.support.untrusted_files import JsonObject


@dataclass
class Adopted:
    """What the roots below a model carried, as it can be put on again under the model's own names.

    Attributes:
        plans: their adapters, with their cores.
        factorisation: what is noted of each site's factors, by key.
        brought: what loads have brought beside the cores, by name.
        trainable: parameters beside the cores that require gradients.
        brought_in_place: see :class:`State`.
    """

    plans: list[AdapterPlan] = field(default_factory=list)
    factorisation: dict[str, JsonObject] = field(default_factory=dict)
    brought: dict[str, torch.Tensor] = field(default_factory=dict)
    trainable: list[torch.Tensor] = field(default_factory=list)
    brought_in_place: set[str] = field(default_factory=set)

    def keep_training(self, state: State) -> None:
        """Let what was trained beside the cores be trained and saved on."""
        for parameter in self.trainable:
            parameter.requires_grad_(True)
        state.brought_in_place |= self.brought_in_place

    def check_disjoint(self, keys: Collection[str]) -> None:
        """Refuse a second adapter on one site.

        Raises:
            TargetError: one of the keys carries an adapter.
        """
        if twice := [plan.site.key for plan in self.plans if plan.site.key in keys]:
            raise TargetError(
                f"site {twice[0]!r} already carries an adapter ({len(twice)} such): leave it out with exclude_modules, "
                "or call undo_surgery or merge first"
            )


def adopt_roots(model: nn.Module) -> Adopted:
    """Take the adapters off all roots below a model; within a transaction, which undoes it if the surgery fails.

    Raises:
        SurgeryError: one of them is a graph, whose adapters are nodes, or has lost its base weights.
    """
    adopted = Adopted()
    paths = module_paths(model)
    below = [(path, module) for module, path in paths.items() if path and state_of(module) is not None]
    for path, root in below:
        state = record_of(root)
        if state.original is not None:
            raise SurgeryError(
                f"{path!r} is a graph that was operated on: merge or undo it before surgery on its parent"
            )
        found = adapters_of(root)
        check_weights(found)
        require_bases(found)
        adopted.plans += [plan_of(paths, f"{path}.{key}", site) for key, site in found.items()]
        adopted.factorisation |= {f"{path}.{key}": note for key, note in state.factorisation.items()}
        adopted.brought |= brought_by_name(model, state)
        adopted.trainable += [parameter for parameter in beside_cores(root).values() if parameter.requires_grad]
        adopted.brought_in_place |= {f"{path}.{name}" for name in trained_in_place(root)}
        for site in found.values():
            site.host.detach()
        put_back(state)
        restore_flags(root, state.requires_grad)
        unmake_root(root)
    return adopted
