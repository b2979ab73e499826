"""The names that sites and parameters have in files: those of the plain model, whatever is wrapped around its modules.

``torch.compile`` of a layer in place puts it below ``_orig_mod``, data parallelism puts the model below ``module``, and
Dynamo flattens the names of a graph. Files have none of these, so that an adapter fits the model in either form.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from passes.ir.parameter_names import original_names


class SavedNames:
    """Names of one model, to those in files and back.

    Args:
        model: the model, with or without adapters.
        parameters: names of its parameters, among them those that adapters host.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[str]) -> None:
        self._originals = original_names(model)
        self._plain = _plain_paths(model)
        self._in_model = {name: name for name in parameters}
        for name in list(self._in_model):
            self._in_model.setdefault(self.saved(name), name)

    def saved(self, name: str) -> str:
        """The name of a parameter in files."""
        if name in self._originals:
            return self._originals[name]
        owner, _, local = name.rpartition(".")
        owner = self._plain.get(owner, owner)
        return f"{owner}.{local}" if owner else local

    def saved_key(self, key: str, weight: str) -> str:
        """The key of a site in files, which begins as the name of its weight does."""
        return key if weight in self._originals else _with_owner(key, weight, self.saved(weight))

    def in_model(self, name: str) -> str:
        """The name in the model of a parameter in a file; a name that the model does not have is given back."""
        plain = ".".join(part for part in name.split(".") if part != "_orig_mod")  # files of formats 1 and 2 had it
        known = (self._in_model.get(one) for one in (name, plain, plain.removeprefix("module.")))
        return next((one for one in known if one is not None), name)

    def key_in_model(self, key: str, weight: str) -> str:
        """The key in the model of a site in a file, of whose weight this is the name there."""
        found = self.in_model(weight)
        return key if found in self._originals else _with_owner(key, weight, found)


def _with_owner(key: str, weight: str, renamed: str) -> str:
    owner = weight.removesuffix(".weight")
    return renamed.removesuffix(".weight") + key.removeprefix(owner) if key.startswith(owner) else key


def _plain_paths(model: nn.Module) -> dict[str, str]:
    """The path of each module without the wrappers above it, by the path that it has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    plain = {"": ""}
    for path in modules:
        parent, _, name = path.rpartition(".")
        if not path:
            continue
        if name == "_orig_mod" or (
            name == "module" and isinstance(modules[parent], DistributedDataParallel | nn.DataParallel)
        ):
            plain[path] = plain[parent]
        else:
            plain[path] = f"{plain[parent]}.{name}" if plain[parent] else name
    return plain
