"""What merging a checkpoint will do, found out and checked from headers alone before anything is written."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from exporters.checkpoint.folder import Checkpoint, read_checkpoint
from exporters.checkpoint.hf_names import INSTEAD, CheckpointNames, Group
from exporters.checkpoint.tensor_io import DTYPES
from exporters.checkpoint.ties import copies_to_untie
from exporters.checkpoint.trained_tensors import plan_trained
from passes.errors import InputError
from surgery.cli.inspect import load_model
from surgery.errors import AdapterError, ExportError, VariantError
from surgery.storage.site_entry import base_of, check_entry, variant_of
from surgery.support.fingerprint import dtype_name
from surgery.support.untrusted_files import JsonObject
from surgery.variants import Variant

if TYPE_CHECKING:
    import transformers


@dataclass(frozen=True)
class MergePlan:
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
        trained: parameters that were trained beside the cores, with the names of their tensors in the adapter.
        digest: of everything that the result depends on.
    """

    base: Checkpoint
    result: Checkpoint
    names: CheckpointNames
    copies: dict[str, str]
    groups: list[Group]
    rewritten: set[str]
    sites: dict[str, JsonObject]
    variant: Variant
    stored: str
    trained: dict[str, str]
    coeff: float
    digest: str


def plan_merge(folder: Path, adapter: Path, config: JsonObject, coeff: float, untie: bool) -> MergePlan:
    """MergePlan the merge of an adapter into a checkpoint.

    Args:
        config: the adapter's.

    Raises:
        SurgeryError: it cannot be done; see ``merge_checkpoint``.
    """
    if isinstance(coeff, bool) or not isinstance(coeff, int | float) or not abs(coeff) < math.inf:
        raise InputError(f"coeff must be a finite number, found {coeff!r}")
    variant = variant_of(config)
    base = read_checkpoint(folder)
    model = _meta_model(base)
    names = CheckpointNames(model, base.entries)
    known = set(names.groups) if model is None else {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key, entry in config["sites"].items():
        where = f"{str(adapter)!r}: site {key!r}"
        check_entry(where, entry, known)
        own = variant_of(entry) if "variant" in entry else variant
        if not own.linear:
            raise VariantError(f"site {key!r}: {own.name} is not linear in its input, so it cannot be merged")
    new = copies_to_untie(base, names, model, config["sites"], untie)
    copies = new or {}
    groups: dict[str, Group] = {}
    cast = False
    for key, entry in config["sites"].items():
        group = names.groups.get(entry["weight"])
        if group is None or group.problem:
            problem = "none of its tensors is" if group is None else f"its conversion fails ({group.problem}), as"
            raise ExportError(f"site {key!r}: {problem} {entry['weight']!r} in {str(folder)!r}; {INSTEAD}")
        weight = _check_weight(f"{str(adapter)!r}: site {key!r}", base, names, group, entry, copies)
        cast |= dtype_name(weight) != entry["dtype"]
        groups[group.name] = group
    trained = plan_trained(base, names, model, adapter, config, copies, cast=cast)
    groups |= {names.groups[name].name: names.groups[name] for name in trained}
    ordered = sorted(groups.values(), key=lambda group: min(_position(base, copies.get(k, k)) for k in group.sources))
    result = base.with_copies(copies)
    if new is not None and model is not None:
        result = replace(result, config={**(base.config or {}), "tie_word_embeddings": False})
    rewritten = {key for group in ordered for key in group.sources}
    digest = _digest(base, config, coeff, untie)
    return MergePlan(
        base, result, names, copies, ordered, rewritten, config["sites"], variant, config["factors"], trained, coeff,
        digest,
    )  # fmt: skip


def _meta_model(base: Checkpoint) -> transformers.PreTrainedModel | None:
    """The model that ``transformers`` would load the folder into, without weights; None for a plain state dict."""
    if base.config is None or "model_type" not in base.config:
        return None
    if base.config.get("quantization_config"):
        raise ExportError(f"{str(base.folder)!r} is quantised: merge into the checkpoint it was made from")
    try:
        model, _ = load_model(str(base.folder.resolve()))
    except InputError as error:
        raise ExportError(f"{error}; {INSTEAD}") from error
    hub: transformers.PreTrainedModel = model
    hub.tie_weights()
    return hub


def _check_weight(
    where: str, base: Checkpoint, names: CheckpointNames, group: Group, entry: JsonObject, copies: dict[str, str]
) -> torch.Tensor:
    """Check shape and dtype of a weight, of which only the header was read; gives it without values."""

    def meta_tensor(key: str) -> torch.Tensor:
        found = base.entries[copies.get(key, key)]
        if found.dtype not in DTYPES:
            raise AdapterError(f"{where}: the checkpoint has {key!r} in {found.dtype}, the adapter {entry['dtype']}")
        return torch.empty(found.shape, dtype=DTYPES[found.dtype], device="meta")

    weight = names.parameters(group, meta_tensor)[entry["weight"]]
    base_of(where, where, weight, entry, entry["host"])
    return weight


def _position(base: Checkpoint, key: str) -> tuple[str, int]:
    return base.where[key], base.files[base.where[key]].entries[key].start


def _digest(base: Checkpoint, config: JsonObject, coeff: float, untie: bool) -> str:
    """Of all that decides what is written; of the base's tensors, header, size and time stand for the content."""
    digest = hashlib.sha256(json.dumps(config).encode())  # it has the digest of the adapter's tensors
    state = {name: [file.path.stat().st_size, file.path.stat().st_mtime_ns] for name, file in base.files.items()}
    for file in base.files.values():
        digest.update(file.header)
    digest.update(json.dumps([str(base.folder.resolve()), state, base.index, base.config, coeff, untie]).encode())
    return digest.hexdigest()
