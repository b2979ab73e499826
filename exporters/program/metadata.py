"""The description of its adapter that a live program carries in its metadata, for another one to be checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.export import ExportedProgram

from exporters.shared.functional import COEFF
from exporters.shared.site_signature import SiteSignature, TensorSignature, beside_fingerprints
from surgery.errors import ExportError
from surgery.support.fingerprint import dtype_name
from surgery.support.untrusted_files import JsonObject, parse_json
from surgery.verbs.steer import sites

FORMAT, VERSION = "sspace-program", 1
PARTS = ("core", "factors")


@runtime_checkable
class CompiledPackage(Protocol):
    """What ``aoti_load_package`` gives, whose class torch keeps to itself."""

    def get_metadata(self) -> dict[str, str]: ...
    def get_constant_fqns(self) -> list[str]: ...
    def load_constants(self, constants_map: dict[str, torch.Tensor], *, check_full_update: bool) -> None: ...


class CallablePackage(CompiledPackage, Protocol):
    """A compiled package that can be run."""

    def __call__(self, *args: object, **kwargs: object) -> object: ...


LoadedProgram = ExportedProgram | nn.Module | CompiledPackage
DTYPES = {"float32": torch.float32, "float64": torch.float64}
Names = dict[str, list[str]]  # of one part of a site: its tensors, and what the program calls each


@dataclass(frozen=True)
class ProgramSite:
    """A site of a program, and by part the names that its tensors have there; none of those that nothing reads."""

    signature: SiteSignature
    names: Mapping[str, Names]


@dataclass(frozen=True)
class ProgramMetadata:
    """What a live program says of its adapter.

    Attributes:
        coefficient: name of the buffer that steers, of this dtype and on this device.
        beside: fingerprints of what was trained beside the cores, which the program holds as it is.
    """

    coefficient: str
    dtype: torch.dtype
    device: str
    sites: Mapping[str, ProgramSite]
    beside: Mapping[str, str]


def contents(model: nn.Module, coeff: torch.Tensor, read: Mapping[str, torch.Tensor]) -> JsonObject:
    """The metadata of a live program, as JSON.

    Args:
        coeff: the buffer that steers.
        read: the tensors that the program reads, by its names; others cannot be replaced.
    """
    names: dict[object, list[str]] = {}  # by identity: a module that is registered twice has several names
    for name, tensor in read.items():
        names.setdefault(_memory(tensor), []).append(name)
    entries = {}
    for key, site in sites(model).items():
        signature = SiteSignature.of(site)
        tensors = {"core": site.core.tensors(), "factors": dict(site.factors.named_buffers())}
        parts = {"core": signature.core, "factors": signature.factors}
        entries[key] = {
            "variant": signature.variant,
            "hyperparameters": signature.hyperparameters,
            "r": signature.r,
            "fingerprint": signature.fingerprint,
            **{
                part: {n: _tensor_entry(s, names.get(_memory(tensors[part][n]), [])) for n, s in signatures.items()}
                for part, signatures in parts.items()
            },
        }
    beside = beside_fingerprints(model)
    # "knob" is the word of format version 1
    return {
        "version": VERSION,
        "knob": COEFF,
        "dtype": dtype_name(coeff),
        "device": str(coeff.device),
        "sites": entries,
        **({"beside": beside} if beside else {}),
    }


def replaceable_names(meta: JsonObject) -> set[str]:
    """Names of all tensors of a live program that can be replaced, from the metadata of its graph."""
    held = meta.get("custom", {}).get(FORMAT)
    if held is None:
        return set()
    found = _parsed(held)
    return {found.coefficient} | {
        n for s in found.sites.values() for p in s.names.values() for ns in p.values() for n in ns
    }


def read_metadata(loaded: LoadedProgram) -> ProgramMetadata:
    """The metadata of a loaded program.

    Args:
        loaded: what ``torch._inductor.aoti_load_package`` or ``torch.export.load`` gave, or the latter's ``module()``.

    Raises:
        ExportError: it is no live program of this library, or the metadata is damaged.
    """
    if isinstance(loaded, CompiledPackage):
        try:
            held = parse_json(loaded.get_metadata().get(FORMAT, "null"))
        except ValueError as error:
            raise ExportError(f"the program's description of its adapter is damaged: {error}") from error
    else:
        graph = loaded.graph_module if isinstance(loaded, ExportedProgram) else loaded
        held = getattr(graph, "meta", {}).get("custom", {}).get(FORMAT)
    if held is None:
        raise ExportError(
            f"this {type(loaded).__name__} holds no adapter that can be replaced: export with mode='live', and give "
            "what aoti_load_package or torch.export.load returned"
        )
    version = held.get("version") if isinstance(held, dict) else None
    if type(version) is not int or version != VERSION:
        raise ExportError(f"the program has format version {version!r:.80}, expected {VERSION}: export it again")
    if not _is_whole(held):
        raise ExportError("the program's description of its adapter is damaged: export it again")
    return _parsed(held)


def _parsed(held: JsonObject) -> ProgramMetadata:
    found = {}
    for key, entry in held["sites"].items():
        core, factors = (
            {n: TensorSignature(tuple(t["shape"]), t["dtype"], t.get("fingerprint")) for n, t in entry[part].items()}
            for part in PARTS
        )
        own = entry["variant"], entry["hyperparameters"], entry["r"], entry["fingerprint"]
        names = {part: {name: tensor["names"] for name, tensor in entry[part].items()} for part in PARTS}
        found[key] = ProgramSite(SiteSignature(*own, core, factors), names)
    return ProgramMetadata(held["knob"], DTYPES[held["dtype"]], held["device"], found, held.get("beside", {}))


def _is_whole(held: JsonObject) -> bool:
    """Whether what a program says of its adapter is what :func:`contents` makes."""
    kinds = {"variant": str, "hyperparameters": dict, "r": int, "fingerprint": str, "core": dict, "factors": dict}
    if not _has(held, {"knob": str, "dtype": str, "device": str, "sites": dict}):
        return False
    beside = held.get("beside", {})
    if not isinstance(beside, dict) or not all(isinstance(value, str) for value in beside.values()):
        return False
    if not all(_has(entry, kinds) for entry in held["sites"].values()) or held["dtype"] not in DTYPES:
        return False
    try:
        torch.device(held["device"])
    except RuntimeError:
        return False
    tensors = [tensor for entry in held["sites"].values() for part in PARTS for tensor in entry[part].values()]
    shaped = all(_has(tensor, {"names": list, "shape": list, "dtype": str}) for tensor in tensors)
    return shaped and all(isinstance(name, str) for tensor in tensors for name in tensor["names"])


def _has(value: object, kinds: Mapping[str, type]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def _tensor_entry(tensor: TensorSignature, names: list[str]) -> JsonObject:
    entry: JsonObject = {"names": names, "shape": list(tensor.shape), "dtype": tensor.dtype}
    return entry if tensor.fingerprint is None else {**entry, "fingerprint": tensor.fingerprint}


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    """Where the numbers of a tensor are."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()
