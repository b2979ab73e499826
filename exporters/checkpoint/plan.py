"""What merging a checkpoint will do, found out and checked from headers alone before anything is written."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exporters.checkpoint.folder import Checkpoint, read_checkpoint
from exporters.checkpoint.hf_names import INSTEAD, Group, Names, owners
from exporters.checkpoint.tensor_io import DTYPES
from passes.analysis.linear_sites import part_of
from passes.errors import InputError
from surgery.cli.inspect import load_model
from surgery.errors import AdapterError, ExportError, VariantError, WeightError
from surgery.storage.site_entry import check_entry, matrix_shape, rows_of, variant_of
from surgery.variants import Variant


@dataclass(frozen=True)
class Plan:
    """What goes where.

    Attributes:
        base: the folder as it is.
        result: the folder as it will be.
        copies: keys of the result that the base lacks, and the key of the base that each is a copy of.
        groups: tensors to rewrite.
        rewritten: their keys.
        sites: of the adapter, by key.
        variant: of the adapter's first site.
        stored: what the adapter holds of factors.
        digest: of everything that the result depends on.
    """

    base: Checkpoint
    result: Checkpoint
    names: Names
    copies: dict[str, str]
    groups: list[Group]
    rewritten: set[str]
    sites: dict[str, dict[str, Any]]
    variant: Variant
    stored: str
    coeff: float
    digest: str


def make_plan(folder: Path, adapter: Path, config: dict[str, Any], coeff: float, untie: bool) -> Plan:
    """Plan the merge of an adapter into a checkpoint.

    Args:
        config: the adapter's.

    Raises:
        SurgeryError: it cannot be done; see ``merge_checkpoint``.
    """
    if isinstance(coeff, bool) or not isinstance(coeff, int | float) or not abs(coeff) < math.inf:
        raise InputError(f"coeff must be a finite number, found {coeff!r}")
    variant = variant_of(config)
    base = read_checkpoint(folder)
    model = _hollow_model(base)
    names = Names(model, base.entries)
    known = set(names.groups) if model is None else {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key, entry in config["sites"].items():
        where = f"{str(adapter)!r}: site {key!r}"
        check_entry(where, entry, known)
        own = variant_of(entry) if "variant" in entry else variant
        if not own.linear:
            raise VariantError(f"site {key!r}: {own.name} is not linear in its input, so it cannot be merged")
    new = _copies(base, names, model, config["sites"], untie)
    copies = new or {}
    groups: dict[str, Group] = {}
    for key, entry in config["sites"].items():
        group = names.groups.get(entry["weight"])
        if group is None or group.problem:
            problem = "none of its tensors is" if group is None else f"its conversion fails ({group.problem}), as"
            raise ExportError(f"site {key!r}: {problem} {entry['weight']!r} in {str(folder)!r}; {INSTEAD}")
        _check_weight(f"{str(adapter)!r}: site {key!r}", base, names, group, entry, copies)
        groups[group.name] = group
    ordered = sorted(groups.values(), key=lambda group: min(_place(base, copies.get(k, k)) for k in group.sources))
    result = base.with_copies(copies)
    if new is not None and model is not None:
        result = replace(result, config={**(base.config or {}), "tie_word_embeddings": False})
    rewritten = {key for group in ordered for key in group.sources}
    digest = _digest(base, config, coeff, untie)
    return Plan(
        base, result, names, copies, ordered, rewritten, config["sites"], variant, config["factors"], coeff, digest
    )


def _hollow_model(base: Checkpoint) -> Any:
    """The model that ``transformers`` would load the folder into, without weights; None for a plain state dict."""
    if base.config is None or "model_type" not in base.config:
        return None
    if base.config.get("quantization_config"):
        raise ExportError(f"{str(base.folder)!r} is quantised: merge into the checkpoint it was made from")
    try:
        model, _ = load_model(str(base.folder.resolve()))
    except InputError as error:
        raise ExportError(f"{error}; {INSTEAD}") from error
    hub: Any = model
    hub.tie_weights()
    return hub


def _copies(base: Checkpoint, names: Names, model: Any, sites: dict[str, Any], untie: bool) -> dict[str, str] | None:
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


def _untied(base: Checkpoint, model: Any) -> Any:
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


def _tied_to(base: Checkpoint, names: Names, model: Any, weight: str) -> list[str]:
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


def _check_weight(
    where: str, base: Checkpoint, names: Names, group: Group, entry: dict[str, Any], copies: dict[str, str]
) -> None:
    """Check shape and dtype of a weight, of which only the header was read."""

    def hollow(key: str) -> torch.Tensor:
        found = base.entries[copies.get(key, key)]
        if found.dtype not in DTYPES:
            raise AdapterError(f"{where}: the checkpoint has {key!r} in {found.dtype}, the adapter {entry['dtype']}")
        return torch.empty(found.shape, dtype=DTYPES[found.dtype], device="meta")

    weight = names.parameters(group, hollow)[entry["weight"]]
    matrix_shape(where, part_of(weight, rows_of(where, entry, weight)), entry, entry["host"])


def _place(base: Checkpoint, key: str) -> tuple[str, int]:
    return base.where[key], base.files[base.where[key]].entries[key].start


def _digest(base: Checkpoint, config: dict[str, Any], coeff: float, untie: bool) -> str:
    """Of all that decides what is written; of the base's tensors, header, size and time stand for the content."""
    digest = hashlib.sha256(json.dumps(config).encode())  # it has the digest of the adapter's tensors
    state = {name: [file.path.stat().st_size, file.path.stat().st_mtime_ns] for name, file in base.files.items()}
    for file in base.files.values():
        digest.update(file.header)
    digest.update(json.dumps([str(base.folder.resolve()), state, base.index, base.config, coeff, untie]).encode())
    return digest.hexdigest()
