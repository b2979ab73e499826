"""The names that a model's parameters have, and which of them are one tensor."""

from __future__ import annotations

import re
from collections import defaultdict

from torch import nn


def original_names(model: nn.Module) -> dict[str, str]:
    """Names that parameters had before Dynamo flattened them, by their present names; empty for any other model."""
    known: dict[str, str] = getattr(model, "meta", {}).get("dynamo_flat_name_to_original_fqn", {})
    plain: dict[str, list[str]] = defaultdict(list)  # of numbered modules, it records names before their last cleaning
    for flat, original in known.items():
        plain[re.sub("_+", "_", flat.replace("getattr_", ""))].append(original)
    found = {}
    for name, _ in model.named_parameters() if known else ():
        same = [known[name]] if name in known else plain[re.sub("_+", "_", name)]
        if len(same) == 1:
            found[name] = same[0]
    return found


class Names:
    """The model's parameters by every name they have, and which of these names are one tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = dict(model.named_parameters(remove_duplicate=False))
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.originals = original_names(model)
        self.first_path: dict[int, str] = {}
        for path, module in self.modules.items():
            self.first_path.setdefault(id(module), path)
        self.by_tensor: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            self.by_tensor[id(tensor)].append(name)

    def canonical(self, name: str) -> str:
        return self.by_tensor[id(self.tensors[name])][0]

    def same(self, one: str, other: str) -> bool:
        return self.tensors[one] is self.tensors[other]

    def owner(self, name: str) -> str:
        """First path of the module that registers a parameter."""
        module = self.modules[name.rpartition(".")[0]]
        return self.first_path[id(module)]

    def key(self, weight: str, module_path: str | None = None) -> str:
        """Key of the product that uses a weight: among tied names, the one whose module the product stands in."""
        owners = {self.owner(name): name for name in self.by_tensor[id(self.tensors[weight])]}
        if module_path in self.modules:
            module_path = self.first_path[id(self.modules[module_path])]
        name = weight if module_path is None else owners.get(module_path, weight)
        if name in self.originals:
            name = self.originals[name]
            return name.removesuffix(".weight")
        owner, local = self.owner(name), name.rpartition(".")[2]
        if not owner:
            return local
        return owner if local == "weight" else f"{owner}.{local}"

    def alias(self, name: str, key: str) -> str:
        """The name of a parameter that belongs to a key, where it has several."""
        aliases = self.by_tensor[id(self.tensors[name])]
        return next((a for a in aliases if a == key or a.rpartition(".")[0] == key), name)

    def ties(self, name: str) -> tuple[str, ...]:
        """Other names of the same tensor, those that merely reach the same module by another path left out."""
        aliases = self.by_tensor[id(self.tensors[name])]
        mine = (self.owner(name), name.rpartition(".")[2])
        return tuple(a for a in aliases if a != name and (self.owner(a), a.rpartition(".")[2]) != mine)
