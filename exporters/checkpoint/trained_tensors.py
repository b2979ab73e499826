"""What was trained beside the cores, in the merge of an adapter into a checkpoint: it replaces the base's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from exporters.checkpoint.folder import Checkpoint
from exporters.checkpoint.hf_names import INSTEAD, CheckpointNames, owners
from exporters.checkpoint.tensor_io import DTYPES, read_header
from surgery.errors import ExportError
from surgery.storage.adapter_file import TENSORS, AdapterFile
from surgery.storage.site_entry import read_tensor
from surgery.storage.trained_parameters import PREFIX, trained_field
from surgery.support.fingerprint import DTYPES as FLOATS
from surgery.support.fingerprint import dtype_name
from surgery.support.untrusted_files import JsonObject

if TYPE_CHECKING:
    import transformers


def plan_trained(
    base: Checkpoint,
    names: CheckpointNames,
    model: transformers.PreTrainedModel | None,
    adapter: Path,
    config: JsonObject,
    copies: Mapping[str, str],
    *,
    cast: bool,
) -> dict[str, str]:
    """The tensor of the adapter that each parameter trained beside the cores becomes.

    Args:
        copies: new keys, each with the key of the base that it is copied from.
        cast: the checkpoint has another dtype than the adapter, which is cast to it.

    Raises:
        ExportError: the checkpoint has no tensor for one, or one of another shape or dtype, or ties more to it.
    """
    where, found = repr(str(adapter)), {}
    for saved, others in trained_field(where, config).items():
        known = (saved, *others)
        here = [name for name in known if name in names.groups]
        if not here:
            raise ExportError(
                f"{saved!r} was trained beside the cores, and {str(base.folder)!r} has no tensor for it; {INSTEAD}"
            )
        for group in owners(model) if model is not None else ():
            if set(group) & set(known) and (tied := sorted(set(group) - set(known))):
                raise ExportError(f"{saved!r} was trained beside the cores, and the checkpoint ties {tied[0]!r} to it")
        held = read_header(adapter / TENSORS).entries.get(PREFIX + saved)
        for name in here:
            own = _in_checkpoint(base, names, copies, name)
            if held is None or list(own.shape) != list(held.shape) or not (cast or DTYPES.get(held.dtype) == own.dtype):
                trained = "nothing that the file has" if held is None else f"{held.dtype} {list(held.shape)}"
                raise ExportError(
                    f"{name!r} was trained beside the cores as {trained}, and the checkpoint has it as "
                    f"{dtype_name(own)} {list(own.shape)}; {INSTEAD}"
                )
            found[name] = PREFIX + saved
    return found


def _in_checkpoint(base: Checkpoint, names: CheckpointNames, copies: Mapping[str, str], name: str) -> torch.Tensor:
    """A parameter as the checkpoint has it, without values."""
    group = names.groups[name]
    if group.problem:
        raise ExportError(f"{name!r} was trained beside the cores; its conversion fails ({group.problem}); {INSTEAD}")

    def meta_tensor(key: str) -> torch.Tensor:
        entry = base.entries[copies.get(key, key)]
        if entry.dtype not in DTYPES:
            raise ExportError(f"{name!r} was trained beside the cores, and the checkpoint has {key!r} in {entry.dtype}")
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

    return names.parameters(group, meta_tensor)[name]


def trained_values(
    file: AdapterFile, trained: Mapping[str, str], originals: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The values of those of a group's parameters that were trained beside the cores, in the checkpoint's dtype."""
    wanted = {name: tensor for name, tensor in trained.items() if name in originals}
    if not wanted:
        return {}
    where, values = repr(str(file.folder)), {}
    with file.opened() as tensors:
        for name, stored in wanted.items():
            own = originals[name]
            values[name] = read_tensor(where, tensors, stored, tuple(own.shape), tuple(FLOATS.values())).to(own.dtype)
            if not torch.isfinite(values[name]).all():
                raise ExportError(f"{name!r} overflows {dtype_name(own)}, which the checkpoint is in")
    return values
