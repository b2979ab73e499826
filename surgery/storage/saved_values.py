"""The values that are saved: those in memory, or of a state dict that was gathered from several processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import torch
from torch import nn

from surgery.errors import AdapterError
from surgery.modules.adapter import Adapter
from surgery.modules.base_weights import Held, base_weight_of
from surgery.support.distributed import is_sharded, whole
from surgery.support.untrusted_files import JsonObject


class SavedValues:
    """Whole values of a model's tensors.

    Args:
        model: an operated model.
        given: its state dict; None reads the model's own tensors, for which all processes that have shards are needed.
    """

    def __init__(self, model: nn.Module, given: JsonObject | None = None) -> None:
        self.given = given
        self.names: dict[int, list[str]] = defaultdict(list)
        if given is not None:
            parameters = model.named_parameters(remove_duplicate=False)
            for name, tensor in (*parameters, *model.named_buffers(remove_duplicate=False)):
                self.names[id(tensor)].append(name)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole value of a tensor.

        Raises:
            AdapterError: the state dict does not have it.
        """
        if self.given is None:
            return whole(tensor)
        found = self._given(tensor)
        if found is None:
            name = next(iter(self.names[id(tensor)]), "a tensor of a core")
            raise AdapterError(
                f"state_dict has no {name!r}: what is saved would not load as what was trained. Give the whole state "
                "dict of the operated model, or leave state_dict out"
            )
        if found.shape != tensor.shape:
            raise AdapterError(
                f"state_dict has {self.names[id(tensor)][0]!r} of shape {tuple(found.shape)}, and the model of shape "
                f"{tuple(tensor.shape)}"
            )
        return found

    def known_by(self, site: Adapter) -> JsonObject:
        """What a file says of the base weight of a site."""
        weight = site.host.parameter()
        found = self._given(weight) if self.given is not None and is_sharded(weight) else None
        if found is None:
            return site.base_weight.known_by()
        base = base_weight_of(site.key, Held(found), site.layout, site.base_weight.matrix_shape, site.rows)
        return base.known_by()

    def check_frozen(self, model: nn.Module, saved: Collection[int]) -> None:
        """Refuse a state dict with other values of what an adapter leaves to the base model.

        Args:
            saved: identities of the parameters that are saved.

        Raises:
            AdapterError: names the first one.
        """
        for tensor in model.parameters() if self.given is not None else ():
            found = None if id(tensor) in saved or is_sharded(tensor) else self._given(tensor)
            if found is None or found.data_ptr() == tensor.data_ptr():
                continue
            if found.shape != tensor.shape or not torch.equal(found, tensor.detach().to(found.device, found.dtype)):
                raise AdapterError(
                    f"state_dict has other values of {self.names[id(tensor)][0]!r}, which is frozen and so is left to "
                    "the base model: let it require gradients, and it is saved beside the cores"
                )

    def _given(self, tensor: torch.Tensor) -> torch.Tensor | None:
        given = self.given or {}
        found = next((given[name] for name in self.names[id(tensor)] if name in given), None)
        return found.detach() if isinstance(found, torch.Tensor) else None
