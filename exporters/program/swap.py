"""Another adapter in a program that is already exported: same base, same shapes, other numbers; nothing is rebuilt.

With torch alone, by the names that ``state_dict`` has (nothing is checked: AOTInductor takes a wrong shape silently)::

    program = torch._inductor.aoti_load_package("model.pt2")
    program.load_constants({"coeff": torch.tensor(0.5)}, check_full_update=False)
    program.load_constants({"model.layers.0.mlp.up_proj.core.g": g}, check_full_update=False)

    program = torch.export.load("model.pt2").module()
    with torch.no_grad():
        program.coeff.fill_(0.5)
        program.get_parameter("model.layers.0.mlp.up_proj.core.g").copy_(g)
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch
from torch import nn
from torch.export import ExportedProgram

from exporters.program.metadata import PARTS, CompiledPackage, LoadedProgram, ProgramSite, read_metadata
from exporters.shared.site_signature import SiteSignature, TensorSignature, beside_fingerprints
from passes.errors import InputError
from surgery.errors import AdapterError, ExportError
from surgery.storage.adapter_reader import opened_adapter
from surgery.storage.site_entry import SITE_FIELDS, variant_of
from surgery.storage.trained_parameters import PREFIX, trained_field
from surgery.support.fingerprint import dtype_name, fingerprint
from surgery.support.untrusted_files import path_of
from surgery.verbs.steer import sites

Tensors = dict[str, dict[str, torch.Tensor]]  # by part and name


def swap(
    loaded: LoadedProgram, adapter: nn.Module | str | os.PathLike[str] | None = None, *, coeff: float | None = None
) -> None:
    """Put another adapter of the same base into a loaded live program, in place and all or nothing; steer it.

    Args:
        loaded: what ``torch._inductor.aoti_load_package`` or ``torch.export.load`` gave, or the latter's ``module()``.
        adapter: an adapter directory, or a model that is operated on; None to set the coefficient alone.
        coeff: the coefficient's new value; as it is if None.

    Raises:
        ExportError: the program is not a live one of this library.
        AdapterError: the adapter is of another base model, variant, rank or set of sites.
        InputError: coeff is not a finite number.
    """
    program = read_metadata(loaded)
    values: dict[str, torch.Tensor] = {}
    if adapter is not None:
        found, beside = _adapter(adapter)
        if odd := sorted(name for name, _ in set(beside.items()) ^ set(program.beside.items())):
            raise AdapterError(
                f"{odd[0].removeprefix(PREFIX)!r} was trained beside the cores, and the program has other values of it "
                f"({len(odd)} such): export the operated model again"
            )
        values = _values(program.sites, found)
    if coeff is not None:
        if not isinstance(coeff, int | float) or not math.isfinite(coeff):
            raise InputError(f"coeff of a program must be a finite number, found {coeff!r}")
        values[program.coefficient] = torch.tensor(float(coeff), dtype=program.dtype)
    _put(loaded, {name: tensor.detach().to(program.device) for name, tensor in values.items()})


def _adapter(
    adapter: nn.Module | str | os.PathLike[str],
) -> tuple[dict[str, tuple[SiteSignature, Tensors]], dict[str, str]]:
    """The signature of each site of an adapter, its tensors, and fingerprints of what was trained beside them."""
    if isinstance(adapter, nn.Module):
        of_sites = {
            key: (SiteSignature.of(site), {"core": site.core.tensors(), "factors": dict(site.factors.named_buffers())})
            for key, site in sites(adapter).items()
        }
        return of_sites, beside_fingerprints(adapter)
    found = {}
    with opened_adapter(path_of(adapter, AdapterError)) as (config, tensors):
        if config["factors"] != "exact":
            raise AdapterError(
                f"{str(adapter)!r} holds no factors, and a program has no weights to make them of: load it on the "
                "model, and give that, or save it with factors='exact'"
            )
        names = sorted(tensors.keys())
        for key, entry in config["sites"].items():
            if not isinstance(entry, dict) or any(not isinstance(entry.get(n), k) for n, k in SITE_FIELDS.items()):
                raise AdapterError(f"{str(adapter)!r}: the configuration of site {key!r} is damaged")
            variant = variant_of(entry if "variant" in entry else config)
            parts: Tensors = {}
            for part in PARTS:
                start = f"{key}.{part}."
                parts[part] = {n.removeprefix(start): tensors.get_tensor(n) for n in names if n.startswith(start)}
            found[key] = SiteSignature.of_file(variant, entry["r"], entry["fingerprint"], parts), parts
        trained = [PREFIX + name for name in trained_field(repr(str(adapter)), config)]
        beside = {name: fingerprint(tensors.get_tensor(name)) for name in trained if name in names}
    return found, beside


def _values(
    program: Mapping[str, ProgramSite], adapter: Mapping[str, tuple[SiteSignature, Tensors]]
) -> dict[str, torch.Tensor]:
    """New values by the program's names, after every check."""
    if odd := sorted(set(program) ^ set(adapter)):
        where, other = ("program", "adapter") if odd[0] in program else ("adapter", "program")
        raise AdapterError(f"site {odd[0]!r} is in the {where} and not in the {other} ({len(odd)} such)")
    values: dict[str, torch.Tensor] = {}
    for key, (signature, parts) in adapter.items():
        site = program[key]
        if difference := signature.difference(site.signature):
            raise AdapterError(f"site {key!r}: {difference}")
        for part, wanted in (("core", site.signature.core), ("factors", site.signature.factors)):
            for name, tensor in parts[part].items():
                where = f"site {key!r}: {part}.{name}"
                values |= _value(where, tensor, wanted[name], site.names[part][name])
    return values


def _value(where: str, tensor: torch.Tensor, wanted: TensorSignature, names: list[str]) -> dict[str, torch.Tensor]:
    if not wanted.fits(tensor):
        found = f"{dtype_name(tensor)} {list(tensor.shape)}"
        raise AdapterError(f"{where} is {found}, expected {wanted.dtype} {list(wanted.shape)}")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{where} is not finite")
    if wanted.fingerprint is not None and wanted.fingerprint == fingerprint(tensor):
        return {}  # the same factors
    if wanted.fingerprint is not None and not names:
        raise AdapterError(f"{where} differs from the program's, which has folded it: export the adapter again")
    return dict.fromkeys(names, tensor)  # none of a core that no product of the program reads


def _put(loaded: LoadedProgram, values: dict[str, torch.Tensor]) -> None:
    if isinstance(loaded, CompiledPackage):
        if missing := sorted(set(values) - set(loaded.get_constant_fqns())):
            raise ExportError(f"the package has no constant {missing[0]!r} ({len(missing)} such): export it again")
        loaded.load_constants(values, check_full_update=False)
        return
    tensors = loaded.state_dict if isinstance(loaded, ExportedProgram) else loaded.state_dict(keep_vars=True)
    for name, value in values.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise ExportError(f"the program has no tensor {name!r} of shape {list(value.shape)}: export it again")
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
