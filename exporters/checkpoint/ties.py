"""Tied weights of a checkpoint: which there are, and what untying one takes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch

from exporters.checkpoint.folder import Checkpoint
from exporters.checkpoint.hf_names import INSTEAD, CheckpointNames, Group, owners
from surgery.errors import ExportError, WeightError
from surgery.support.untrusted_files import JsonObject

if TYPE_CHECKING:
    import transformers


def copies_to_untie(
    base: Checkpoint, names: CheckpointNames, model: transformers.PreTrainedModel | None, sites: JsonObject, untie: bool
) -> dict[str, str] | None:
    """New keys for tied weights that must have tensors of their own, each with the key that it is copied from.

    None where nothing is to be untied.

    Raises:
        WeightError: a site's weight is tied, and ``untie`` is false or the model's configuration cannot undo it.
    """
    tied: dict[str, list[str]] = {}
    for key, entry in sites.items():
        if others := _tied_to(base, names, model, entry["weight"]):
            tied[key] = others
    if not tied:
        return None
    if not untie:
        key, others = next(iter(tied.items()))
        raise WeightError(
            f"site {key!r} shares its weight with {', '.join(others)}: merging would change these too; "
            "untie=True gives the site a tensor of its own"
        )
    if model is None:
        return {}  # a state dict has every name
    untied = _untied(base, model)
    if untied is None:
        raise WeightError(
            f"site {next(iter(tied))!r}: {type(model).__name__} does not take tie_word_embeddings=false, or not as a "
            "mere flag, so it cannot be untied"
        )
    still = {name: group for group in owners(untied) for name in group if len(group) > 1}
    for key in tied:
        if sites[key]["weight"] in still:
            raise WeightError(
                f"site {key!r}: {type(model).__name__} ties its weight in any case, so it cannot be untied"
            )
    copies: dict[str, str] = {}
    for group in owners(model):
        there = next((names.groups[name] for name in group if name in names.groups), None)
        for name in group if there else ():
            alone = name not in names.groups and not any(other in names.groups for other in still.get(name, ()))
            if alone and there is not None:
                if there.converter is not None:
                    raise ExportError(f"{name!r} is tied to tensors that are saved in another form; {INSTEAD}")
                new = names.key_for(name)
                copies[new] = there.sources[0]
                names.groups[name] = Group(name, [new], [None], None, [name])
    return copies


def _untied(base: Checkpoint, model: transformers.PreTrainedModel) -> transformers.PreTrainedModel | None:
    """The model that the folder would give with a configuration that does not tie, or None where that changes more.

    T5's configuration takes the flag for another one, and the forward of some models scales by it.
    """
    config = type(model.config).from_dict({**(base.config or {}), "tie_word_embeddings": False})
    if getattr(config, "tie_word_embeddings", True) or "tie_word_embeddings" in inspect.getsource(type(model).forward):
        return None
    with torch.device("meta"):
        untied = type(model)(config)
    untied.tie_weights()
    return untied


def _tied_to(
    base: Checkpoint, names: CheckpointNames, model: transformers.PreTrainedModel | None, weight: str
) -> list[str]:
    """Parameters that a weight shares its tensor with; those that the checkpoint holds with other values are not."""
    group = names.groups.get(weight)
    if model is None:
        key = weight if group else None
        return [other for other in base.where if key and other != key and base.same(key, other)]
    found = next((group for group in owners(model) if weight in group), [weight])

    def apart(other: str) -> bool:
        theirs = names.groups.get(other)
        if group is None or theirs is None or group is theirs or group.converter or theirs.converter:
            return False
        return not base.same(group.sources[0], theirs.sources[0])

    return [other for other in found if other != weight and not apart(other)]
