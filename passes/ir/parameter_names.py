"""The names that a model's parameters have, which of them are one tensor, and which nodes of a graph read them."""

from __future__ import annotations

import ast
import keyword
import re
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from torch import fx, nn

from passes.ir.torch_internals import dynamo_source

PARAMETER, BUFFER = "parameter_name", "buffer_name"  # metadata of placeholders


def tensor_name(node: fx.Node) -> str | None:
    """Name of the parameter or buffer that a node reads, or None.

    A node reads one by ``get_attr``, or is a placeholder that stands for one (:func:`name_placeholders`).
    """
    if node.op == "get_attr":
        return str(node.target)
    return node.meta.get(PARAMETER, node.meta.get(BUFFER)) if node.op == "placeholder" else None


def name_placeholders(
    graph: fx.Graph, parameters: Mapping[str, str] | None = None, buffers: Mapping[str, str] | None = None
) -> None:
    """Note which placeholders stand for parameters and buffers, as they do where a graph owns no tensors.

    Args:
        parameters, buffers: names of the tensors by placeholder, as ``inputs_to_parameters`` and ``inputs_to_buffers``
            of an ``ExportedProgram``'s signature give them; without either, the graph is one that ``torch.compile``
            gives a backend, and they are what Dynamo noted.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if parameters is not None or buffers is not None:
        for node in placeholders:
            for kind, names in ((PARAMETER, parameters or {}), (BUFFER, buffers or {})):
                if node.name in names:
                    node.meta[kind] = names[node.name]
        return
    sources = {node: dynamo_source(node) for node in placeholders}
    count = Counter(source[1] for source in sources.values() if source)
    for node, source in sources.items():
        is_parameter = isinstance(node.meta.get("example_value"), nn.Parameter)
        if source is not None:
            root, path = source
            node.meta[PARAMETER if is_parameter else BUFFER] = path if count[path] == 1 else f"{root}.{path}"
        elif is_parameter:  # Dynamo forgets the sources when the backend returns
            node.meta[PARAMETER] = str(node.target)


def placeholder_parameters(graph: fx.Graph) -> dict[str, torch.Tensor]:
    """The parameters that are placeholders of a graph, by name, as the fake tensors that it was traced with."""
    nodes = [node for node in graph.nodes if node.op == "placeholder" and PARAMETER in node.meta]
    values = {node.meta[PARAMETER]: node.meta.get("example_value", node.meta.get("val")) for node in nodes}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def unwritable(name: str) -> bool:
    """Whether a dotted name cannot stand in the code that torch writes of a graph, as a keyword or a quote cannot."""
    return any(keyword.iskeyword(part) or not _quotable(part) for part in name.split("."))


def _quotable(part: str) -> bool:
    try:
        return bool(ast.literal_eval(f'"{part}"') == part)
    except (SyntaxError, ValueError):
        return False


def original_names(model: nn.Module) -> dict[str, str]:
    """Names that parameters had before Dynamo flattened them, by their present names; empty for any other model."""
    known: dict[str, str] = getattr(model, "meta", {}).get("dynamo_flat_name_to_original_fqn", {})
    plain: dict[str, list[str]] = defaultdict(list)  # of numbered modules, it records names before their last cleaning
    for flat, original in known.items():
        plain[re.sub("_+", "_", flat.replace("getattr_", ""))].append(original)
    originals = {}
    for name, _ in model.named_parameters() if known else ():
        same = [known[name]] if name in known else plain[re.sub("_+", "_", name)]
        if len(same) == 1:
            originals[name] = same[0]
    return originals


class ParameterNames:
    """The model's parameters by every name they have, and which of these names are one tensor.

    Args:
        graph: of the model; parameters that are placeholders of it count too.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph | None = None) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.tensors: dict[str, torch.Tensor] = {
            f"{path}.{local}" if path else local: parameter
            for path, module in self.modules.items()
            for local, parameter in module._parameters.items()
            if parameter is not None
        }
        for name, tensor in placeholder_parameters(graph).items() if graph is not None else ():
            self.tensors.setdefault(name, tensor)
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
        path = name.rpartition(".")[0]
        return self.first_path[id(self.modules[path])] if path in self.modules else path

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
