"""The names and layouts that a checkpoint has for the parameters of its model, by transformers' own conversion mapping.

Some models save other tensors than their state dict holds: per-expert matrices of a stack, halves of a fused one, other
names, names without the prefix of the base model. ``CheckpointNames`` groups the tensors of a checkpoint as
``from_pretrained`` does: each group is converted to the parameters that it stands for, and back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from exporters.checkpoint.tensor_io import DTYPES, Entry
from surgery.errors import ExportError

if TYPE_CHECKING:
    import transformers
    from transformers.core_model_loading import WeightConverter

Read = Callable[[str], torch.Tensor]


@dataclass
class Group:
    """Tensors of a checkpoint that belong together, and the parameters that are made of them.

    Attributes:
        name: the first parameter.
        sources: keys in the checkpoint in the order in which they are converted.
        converter: what converts them, with the pattern that each was matched by; None where only the name differs.
        names: all parameters.
        problem: why the group cannot be converted, or None.
    """

    name: str
    sources: list[str] = field(default_factory=list)
    patterns: list[str | None] = field(default_factory=list)
    converter: WeightConverter | None = None
    names: list[str] = field(default_factory=list)
    problem: str | None = None


class CheckpointNames:
    """Maps the parameters of a model to the tensors of a checkpoint.

    Args:
        model: a ``transformers`` model on the meta device; None where the checkpoint holds a plain state dict.
        entries: the checkpoint's tensors.
    """

    def __init__(self, model: transformers.PreTrainedModel | None, entries: Mapping[str, Entry]) -> None:
        self.model: transformers.PreTrainedModel = model
        self.groups: dict[str, Group] = {}
        if model is None:
            self.groups = {key: Group(key, [key], [None], None, [key]) for key in entries}
            return
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.state = model.state_dict()
        by_pattern = {pattern: t for t in self.converters for pattern in t.source_patterns}
        found: dict[str, Group] = {}
        for key in sorted(entries, key=dot_natural_key):
            name, pattern = self.parameter(key)
            if name not in self.state:
                continue  # as from_pretrained does
            group = found.setdefault(name, Group(name, converter=by_pattern[pattern] if pattern else None))
            group.sources.append(key)
            group.patterns.append(pattern)
        for group in found.values():
            self._dry_run(group, entries)
            self.groups |= dict.fromkeys(group.names, group)

    def parameter(self, key: str) -> tuple[str, str | None]:
        """The (first) parameter that a tensor of the checkpoint goes into, and the pattern that says so."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, self.renamings, self.converters, prefix, self.state)
        if name not in self.state and key in self.state:
            name, pattern = rename_source_key(key, [], [], prefix, self.state)
        return name, pattern

    def key_for(self, name: str) -> str:
        """The key that a parameter gets which the checkpoint does not have yet.

        Raises:
            ExportError: it would not be found again under that key.
        """
        if self.model is None:
            return name
        from transformers.core_model_loading import revert_weight_conversion

        keys = list(revert_weight_conversion(self.model, {name: self.state[name]}))
        if [self.parameter(key)[0] for key in keys] != [name]:
            raise ExportError(f"parameter {name!r} has no name of its own in a checkpoint; {INSTEAD}")
        return str(keys[0])

    def parameters(self, group: Group, read: Read) -> dict[str, torch.Tensor]:
        """The parameters of a group, from its tensors."""
        if group.converter is None:
            return {group.name: read(group.sources[0])}
        converter = copy.deepcopy(group.converter)
        for key, pattern in zip(group.sources, group.patterns, strict=True):
            converter.add_tensor(group.name, key, pattern, read(key))
        made = converter.convert(group.name, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def tensors(self, group: Group, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a group, from its parameters.

        Raises:
            ExportError: the conversion has no inverse.
        """
        if group.converter is None:
            return {group.sources[0]: parameters[group.name]}
        reverse = copy.deepcopy(group.converter).reverse_transform()
        for name in group.names:
            first, pattern = reverse.rename_source_key(name)
            reverse.add_tensor(first, name, pattern, parameters[name])
        made = reverse.convert(first, model=self.model, config=self.model.config)
        made = {self._bare(name): value[0] if isinstance(value, list) else value for name, value in made.items()}
        wanted = {self._bare(self._renamed(key)): key for key in group.sources}
        if set(made) != set(wanted):
            raise ExportError(f"the conversion of {group.name!r} cannot be undone; {INSTEAD}")
        return {wanted[name]: value for name, value in made.items()}

    def _renamed(self, key: str) -> str:
        """A key as the converters see it."""
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(key, self.renamings, [])[0]  # type: ignore[no-any-return]

    def _bare(self, name: str) -> str:
        """A name without the prefix of the base model, which a checkpoint may lack or have."""
        return name.removeprefix(f"{self.model.base_model_prefix}.")

    def _dry_run(self, group: Group, entries: Mapping[str, Entry]) -> None:
        """Find out which parameters a group gives, and try the way back, with tensors that hold no values."""
        if group.converter is None:
            group.names = [group.name]
            return

        def meta_tensor(key: str) -> torch.Tensor:
            dtype = DTYPES.get(entries[key].dtype, torch.uint8)
            return torch.empty(entries[key].shape, dtype=dtype, device="meta")

        try:
            made = self.parameters(group, meta_tensor)
            group.names = list(made)
            back = self.tensors(group, made)
            if {key: tuple(t.shape) for key, t in back.items()} != {k: entries[k].shape for k in group.sources}:
                group.problem = "its way back gives other shapes"
        except Exception as error:  # the operations of a conversion raise what they like
            group.names = group.names or [group.name]
            group.problem = f"{type(error).__name__}: {error}"


INSTEAD = 'load the model and use export(model, "dense", path)'


def owners(model: nn.Module) -> Iterable[list[str]]:
    """The names of each parameter, one for each module that has it."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    return found.values()
