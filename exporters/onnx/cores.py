"""Trained cores as files of their own: many ``.onnx_adapter`` over one graph that ``mode="swappable"`` has made.

A core tensor is named ``<site>.core.<tensor>@<digest>``, in the graph and in the file, by :func:`core_slots` alone. The
digest stands for everything that gives a core its meaning: which sites there are, their base weights, their factors,
their variant. ONNX Runtime refuses names that a graph does not have, and so it refuses the core of another base, of
other sites, factors or settings by itself, in any of its languages; :func:`check_core` says what is wrong.

``coeff`` is not in the file, since an adapter would win over a coeff that is fed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from exporters.shared.export_report import Exported, ExportReport, need
from exporters.shared.publish import publish, staged
from exporters.shared.site_signature import SiteSignature, beside_fingerprints, digest
from surgery.errors import ExportError
from surgery.hosting.state import unwrap
from surgery.modules.core import Core
from surgery.support.untrusted_files import path_of, require_regular
from surgery.verbs.steer import sites

DEFAULT_NAME = "core.onnx_adapter"
NAME = re.compile(r"(?P<tensor>.+\.core\.[^.@]+)@(?P<digest>[0-9a-f]{12})")
FORMAT_VERSION = 1


class Slot(NamedTuple):
    """Where a core tensor is kept."""

    core: Core
    local: str

    def value(self) -> torch.Tensor:
        """Its value as graphs and files hold it: ONNX Runtime's adapters take no number, but a vector of one."""
        tensor = self.core.tensors()[self.local].detach()
        return tensor.reshape(1) if tensor.dim() == 0 else tensor


def core_slots(model: nn.Module) -> dict[str, Slot]:
    """All core tensors of a model under the names that they have in a graph and in a file, in the order of names."""
    found = sites(model)
    if not found:
        return {}
    same = digest({key: SiteSignature.of(site) for key, site in found.items()}, beside_fingerprints(model))
    slots = {
        f"{key}.core.{local}@{same}": Slot(site.core, local)
        for key, site in found.items()
        for local in site.core.tensors()
    }
    return dict(sorted(slots.items()))


def export_core(
    model: nn.Module, path: str | os.PathLike[str], *, onnx_path: str | os.PathLike[str] | None = None
) -> ExportReport:
    """Write the trained core of an operated model as a file that ONNX Runtime activates for a run.

    Args:
        path: a file ``*.onnx_adapter``, or a directory that is new or empty.
        onnx_path: a graph that was exported with ``mode="swappable"``, to check that the core fits it.

    Returns:
        Where it is, how many tensors and bytes it has, and how far what was read back is from the model (0.0).

    Raises:
        ExportError: the model carries no surgery, a tensor is not finite, or the core does not fit the graph.
    """
    need("onnxruntime", "onnx")
    model = unwrap(model)
    slots = core_slots(model)
    if not slots:
        raise ExportError(f"a core is exported of an operated model, and {type(model).__name__} carries no adapter")
    tensors = {name: slot.value().cpu() for name, slot in slots.items()}
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ExportError(f"core tensor {bad[0]!r} is not finite; nothing was written")
    with staged(path, DEFAULT_NAME) as (written, target):
        write_core(tensors, written)
        if onnx_path is not None:
            check_core(onnx_path, written)
        found = read_core(written)
        error = max(float((torch.from_numpy(found[n]) - tensor).abs().max()) for n, tensor in tensors.items())
        same = next(iter(tensors)).rpartition("@")[2]
        details = {"tensors": len(tensors), "bytes": written.stat().st_size, "digest": same}
        return publish(written, target, "onnx_adapter", Exported(error, details))


def write_core(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write core tensors in the order of their names, so that equal cores give equal bytes."""
    import onnxruntime

    values = {name: tensors[name].numpy() for name in sorted(tensors)}
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(FORMAT_VERSION)
    adapter.set_model_version(model_version(next(iter(values))))
    adapter.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(value) for n, value in values.items()})
    try:
        adapter.export_adapter(str(path))
    except RuntimeError as error:  # what ONNX Runtime says of a full disk
        raise OSError(str(error)) from error


def model_version(name: str) -> int:
    """The version that a graph and the files of its cores state: the digest's first digits, as a number."""
    return int(name.rpartition("@")[2][:7], 16)


def read_core(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[np.generic]]:
    """The tensors of an ``.onnx_adapter`` file.

    Raises:
        ExportError: the file is missing or damaged.
    """
    runtime = need("onnxruntime", "onnx")
    try:
        require_regular(Path(path))
        adapter = runtime.AdapterFormat.read_adapter(str(path))
        return {name: np.array(value.numpy()) for name, value in adapter.get_parameters().items()}
    except Exception as error:  # ONNX Runtime raises types of its own
        raise ExportError(f"{str(path)!r} is no .onnx_adapter: {str(error).strip()[:200]}") from error


def check_core(onnx_path: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Check that the core in an ``.onnx_adapter`` file belongs to a graph; ONNX Runtime is not needed to run it.

    Raises:
        ExportError: it does not: it was trained on another base, on other sites, factors or settings, or the file is
            damaged or incomplete.
    """
    expected = _declared(path_of(onnx_path, ExportError))
    found = read_core(path_of(path, ExportError))
    where = f"{str(path)!r} does not fit {str(onnx_path)!r}"
    if not expected:
        raise ExportError(f"{str(onnx_path)!r} takes no core: export it with mode='swappable'")
    tensors = [{name.rpartition("@")[0] for name in names} for names in (expected, found)]
    if not all(NAME.fullmatch(name) for name in found):
        raise ExportError(f"{where}: it holds {min(found)!r}, which export_core has not written")
    if odd := sorted(tensors[0] ^ tensors[1]):
        kind = "lacks" if odd[0] in tensors[0] else "has"
        raise ExportError(f"{where}: it {kind} {odd[0]!r} ({len(odd)} such); it is of other sites or another variant")
    if missing := sorted(set(expected) - set(found)):
        raise ExportError(
            f"{where}: it was trained on another base, other factors or other settings "
            f"({min(found).rpartition('@')[2]}, the graph has {missing[0].rpartition('@')[2]})"
        )
    for name, (shape, dtype) in expected.items():
        value = found[name]
        if value.shape != shape or value.dtype != dtype:
            raise ExportError(
                f"{where}: {name!r} is {value.dtype} {list(value.shape)}, the graph has {dtype} {list(shape)}"
            )
        if not np.isfinite(value).all():
            raise ExportError(f"{where}: {name!r} is not finite")


def _declared(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]:
    """Shapes and dtypes of the core tensors that a graph takes; no external data is read.

    Raises:
        ExportError: the file is no ONNX model, or points outside of its folder.
    """
    onnx = need("onnx", "onnx")
    try:
        require_regular(path)
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf raises types of its own
        raise ExportError(f"{str(path)!r} is no ONNX model: {str(error).strip()[:200]}") from error
    for tensor in graph.initializer:
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        parts = PurePosixPath(location.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in location:
            raise ExportError(f"{str(path)!r}: tensor {tensor.name!r} points outside of the folder, to {location!r}")
    given = {tensor.name for tensor in graph.initializer}
    declared = {}
    for value in graph.input:
        if value.name in given and NAME.fullmatch(value.name):
            kind = value.type.tensor_type
            shape = tuple(size.dim_value for size in kind.shape.dim)
            try:
                declared[value.name] = (shape, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))
            except (KeyError, TypeError) as error:
                raise ExportError(f"{str(path)!r}: {value.name!r} has no known type ({kind.elem_type})") from error
    return declared
