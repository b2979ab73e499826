"""Merge an adapter into a checkpoint folder, tensor by tensor: no model is instantiated.

Files without a site are hard-linked or copied. A file with sites is laid out first, by the base's header, and filled
tensor by tensor, so that memory holds one weight and its factors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from exporters.checkpoint.folder import INDEX, SINGLE, other_files
from exporters.checkpoint.hf_names import Group
from exporters.checkpoint.journal import Journal, resumable
from exporters.checkpoint.plan import MergePlan, plan_merge
from exporters.checkpoint.tensor_io import read_header, sync
from exporters.checkpoint.trained_tensors import trained_values
from exporters.checkpoint.verify import merge_error
from exporters.shared.export_report import ExportReport
from passes.analysis.linear_sites import part_of
from surgery.errors import ExportError
from surgery.hosting.checks import check_flags
from surgery.modules.adapter import Adapter
from surgery.modules.detached import detached_adapter
from surgery.modules.merged_weight import merged_weight
from surgery.storage.adapter_file import AdapterFile, is_adapter, is_checkpoint, open_adapter
from surgery.storage.site_entry import base_of, read_parts
from surgery.support.progress_bar import track, wanted_on
from surgery.support.untrusted_files import path_of


def merge_checkpoint(
    base_dir: str | os.PathLike[str],
    adapter_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    coeff: float = 1.0,
    untie: bool = False,
    progress: bool | None = None,
) -> ExportReport:
    """Write a checkpoint folder that holds ``W + dW``, from a base folder and an adapter, without loading the model.

    Every weight is checked against the adapter's fingerprint before it is merged, and read back and compared with the
    adapter's own forward after. A run that was killed goes on where it was when it is started again.

    Args:
        base_dir: a folder in the Hugging Face layout, with safetensors in one file or with an index.
        adapter_dir: what ``save_adapter`` wrote.
        out_dir: a new or empty directory. Files of the base without a site become hard links where possible.
        coeff: the steering coefficient to merge at.
        untie: give tied weights tensors of their own, and say so in config.json.
        progress: show a progress bar; None: on a terminal.

    Returns:
        Where it is, which files it has, and the largest deviation of a weight relative to its largest entry.

    Raises:
        AdapterError: the adapter is damaged, or of another base model.
        ExportError: the base cannot be read or mapped, or the folder not be written. Nothing is left behind.
        VariantError: a variant is not linear, so that no weight has the same effect.
        WeightError: a weight is tied and ``untie`` is false.
    """
    check_flags(untie=untie)
    bars = wanted_on(progress)
    base, adapter, out = (path_of(given, ExportError) for given in (base_dir, adapter_dir, out_dir))
    _check_order(base, adapter)
    with open_adapter(adapter) as file:
        plan = plan_merge(base, adapter, file.config, coeff, untie)
        with resumable(out, plan.digest) as (files, journal):
            touched = _write(plan, file, files, journal, progress=bars)
    names = sorted(file.name for file in out.iterdir())
    details = {"sites": len(plan.sites), "rewritten": touched}
    worst = max(journal.done.values(), default=0.0)
    return ExportReport("dense", out, tuple(out / name for name in names), worst, details)


def _check_order(base: Path, adapter: Path) -> None:
    """Refuse the folders in another order, of which each would be refused for what it lacks."""
    order = "the order is base_dir, adapter_dir, out_dir"
    if is_checkpoint(adapter):
        if is_adapter(base):
            raise ExportError(f"{str(base)!r} is an adapter and {str(adapter)!r} a checkpoint: {order}; swap the two")
        raise ExportError(f"adapter_dir={str(adapter)!r} is a model's checkpoint and no adapter: {order}")
    if is_adapter(base) and not (base / SINGLE).exists() and not (base / INDEX).exists():
        raise ExportError(f"base_dir={str(base)!r} is an adapter and no checkpoint: {order}")


def _write(plan: MergePlan, tensors: AdapterFile, folder: Path, journal: Journal, *, progress: bool) -> list[str]:
    """Take the steps that are not done yet; gives the names of the files that differ from the base's."""
    touched = [
        name
        for name, file in plan.result.files.items()
        if plan.rewritten & file.entries.keys() or file is not plan.base.files[name]
    ]
    steps: list[str | Group] = [*plan.result.files, *plan.groups]
    for step in track(steps, "merging", enabled=progress):
        label = f"file {step}" if isinstance(step, str) else f"group {step.name}"
        if label in journal.done:
            continue
        if isinstance(step, Group):
            journal.finish(label, _merge_group(plan, step, tensors, folder))
        else:
            _start_file(plan, step, folder, linked=step not in touched)
            journal.finish(label)
    _carry_along(plan, folder)
    _check_headers(plan, folder)
    return touched


def _start_file(plan: MergePlan, name: str, folder: Path, *, linked: bool) -> None:
    """Link or copy a file of the base; or lay out a new one, with all tensors that are not rewritten."""
    base, file, path = plan.base.files[name], plan.result.files[name], folder / name
    path.unlink(missing_ok=True)
    if linked:
        try:
            os.link(base.path.resolve(), path)
        except OSError:  # another file system, or one without links
            shutil.copyfile(base.path, path)
        return
    copies = {key: plan.copies.get(key, key) for key in file.entries if key not in plan.rewritten}
    file.begin(path, base, copies)


def _merge_group(plan: MergePlan, group: Group, tensors: AdapterFile, folder: Path) -> float:
    """Merge the sites of a group of tensors, write the tensors, and compare what was written."""
    originals = dict(plan.names.parameters(group, lambda key: plan.base.read(plan.copies.get(key, key))))
    originals |= trained_values(tensors, plan.trained, originals)
    merged, sites = dict(originals), {}
    for key, entry in plan.sites.items():
        if entry["weight"] in group.names:
            name = entry["weight"]
            sites[key] = site = _read_site(plan, tensors, key, originals[name])
            if "rows" not in entry:
                merged[name] = merged_weight(site, key)
                continue
            merged[name] = merged[name].clone() if merged[name] is originals[name] else merged[name]
            part_of(merged[name], entry["rows"]).copy_(merged_weight(site, key))
    files = {plan.result.where[key]: plan.result.files[plan.result.where[key]] for key in group.sources}
    for key, tensor in plan.names.tensors(group, merged).items():
        name = plan.result.where[key]
        with open(folder / name, "r+b") as out:
            files[name].write(out, key, tensor)
    for name in files:
        with open(folder / name, "r+b") as out:
            sync(out)
    del merged
    return _read_back(plan, group, sites, originals, folder)


def _read_site(plan: MergePlan, file: AdapterFile, key: str, weight: torch.Tensor) -> Adapter:
    entry, where = plan.sites[key], f"{str(file.folder)!r}: site {key!r}"
    base = base_of(where, key, weight, entry, entry["host"])
    with file.opened() as tensors:  # again for each site: what is read of a mapped file counts as memory
        parts = read_parts(where, key, entry, plan.variant, base, tensors, host=entry["host"], stored=plan.stored)
    variant, factors, core, _ = parts
    adapter = detached_adapter(base.tensor(), entry["layout"], variant, factors, core)
    adapter.steering.write(torch.tensor(plan.coeff, dtype=torch.float64))
    return adapter


def _read_back(
    plan: MergePlan,
    group: Group,
    sites: Mapping[str, Adapter],
    originals: Mapping[str, torch.Tensor],
    folder: Path,
) -> float:
    """Read a group back as ``from_pretrained`` would, and compare it with the adapters and with the base."""

    def read(key: str) -> torch.Tensor:
        name = plan.result.where[key]
        return replace(plan.result.files[name], path=folder / name).read(key)

    stored, worst = plan.names.parameters(group, read), 0.0
    for key, site in sites.items():
        entry = plan.sites[key]
        name, rows = entry["weight"], entry.get("rows")
        worst = max(worst, merge_error(site, key, part_of(stored[name], rows)))
        if rows is None:
            del stored[name]
        else:  # the other rows are compared below
            stored[name] = stored[name].clone()
            part_of(stored[name], rows).copy_(site.weight)
    for name, tensor in stored.items():
        if not torch.equal(tensor, originals[name]):
            raise ExportError(f"{name!r} has no site, but would not be what it was")
    return worst


def _carry_along(plan: MergePlan, folder: Path) -> None:
    """Write the index and the configuration, and copy the base's other files."""
    for file in other_files(plan.base.folder):
        shutil.copyfile(file, folder / file.name)
    base, result = plan.base, plan.result
    if result.index is not None and result.index != base.index:
        (folder / INDEX).write_text(json.dumps(result.index, indent=2, sort_keys=True) + "\n")
    elif result.index is not None:
        shutil.copyfile(base.folder / INDEX, folder / INDEX)
    if result.config is not None and result.config != base.config:
        (folder / "config.json").write_text(json.dumps(result.config, indent=2) + "\n")


def _check_headers(plan: MergePlan, folder: Path) -> None:
    """Every file must be complete and laid out as planned."""
    for name, file in plan.result.files.items():
        if read_header(folder / name).header != file.header:
            raise ExportError(f"{name!r} was not written as planned")
