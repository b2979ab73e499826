"""An AOTInductor package: the exported program compiled to machine code, which needs torch alone to run, and no Python.

``merged``  the dense model at the present coeff.
``live``    ``coeff`` and each site's core are constants that can be replaced in the loaded package without a rebuild.

    program = torch._inductor.aoti_load_package("model.pt2")
    logits = program(input_ids=ids)["logits"]
    exporters.swap(program, "another_adapter", coeff=0.5)  # or with torch alone, see exporters/program/swap.py

It is compiled for the device that the model is on, and for this machine's processor. In a live package every tensor
stays a constant by name, while inductor would write a number, as ``coeff`` is, and up to 8 entries into the code. What
is compiled is made in a temporary folder; torch's own cache keeps precompiled headers. A package does not check the
sizes of its inputs: ``sizes`` in the report says which are free.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from exporters.program.live_program import NOISY, Mode, foreign_operations, program_of, subject_of
from exporters.program.metadata import FORMAT, CallablePackage, replaceable_names
from exporters.program.swap import swap
from exporters.shared.agreement import compare_program, differ, refuse_wrong, sizes
from exporters.shared.archive import archive
from exporters.shared.export_report import Exported
from exporters.shared.failures import type_and_message
from exporters.shared.options import option
from exporters.shared.subject import Subject
from passes.ir.forward_context import quiet
from passes.ir.torch_internals import (
    compile_ahead_of_time,
    has_line_tables,
    load_package,
    missing_cpp_compiler,
    write_package,
)
from surgery.errors import ExportError
from surgery.verbs.steer import sites

DEFAULT_NAME = "model.pt2"
SLOW = True  # a compilation takes half a minute


@dataclass(frozen=True)
class Options:
    """Options of the format "aoti"."""

    mode: Mode = option("merged", "merge the adapter, or keep it in the program")
    inductor_configs: Mapping[str, object] | None = option(None, "further settings of inductor (max_autotune, ...)")


def write(model: nn.Module, path: Path, example_inputs: object, options: Options) -> Exported:
    """Compile to a package, load it again, and compare it with PyTorch.

    Raises:
        ExportError: there is no C++ compiler, the model cannot be compiled, or the results differ from PyTorch's.
    """
    _need_compiler()
    subject = subject_of(model, example_inputs, options.mode)
    program = program_of(subject)
    free = refuse_wrong(sizes(subject, program.module()), "the exported program")
    _compile(program, path, {**(options.inductor_configs or {}), **_configs(program)}, type(subject.reference).__name__)
    loaded = load_package(path)
    if gone := replaceable_names(program.graph_module.meta) - set(loaded.get_constant_fqns()):
        raise ExportError(f"inductor made {min(gone)!r} part of the code, so it could not be replaced")
    error = compare_program(subject, loaded, lambda coeff: swap(loaded, coeff=coeff), "the compiled package")
    # a package does not check its inputs: only what the program leaves free is safe to try
    tried = sizes(subject, loaded, [name for name, size in free.items() if size == "free"])
    free |= refuse_wrong(tried, "the compiled package")
    if subject.live:
        _check_replaceable(subject, loaded)
    details = {
        "mode": options.mode,
        "device": _device(program),
        "sizes": free,
        "comparisons": len(subject.coeffs) + len(tried),
    }
    return Exported(error, details | {"foreign_operations": foreign_operations(program)})


def _need_compiler() -> None:
    if lacking := missing_cpp_compiler():
        raise ExportError(
            f"AOTInductor needs a C++ compiler, and there is none: install g++ or clang, or set CXX ({lacking})"
        ) from lacking


def _configs(program: ExportedProgram) -> dict[str, object]:
    """Settings that keep what is live replaceable, and the sources' paths out of the machine code."""
    held = program.graph_module.meta.get("custom", {}).get(FORMAT)
    settings: dict[str, object] = {
        "freezing": False,
        "aot_inductor.use_runtime_constant_folding": False,
        "aot_inductor.metadata": {FORMAT: json.dumps(held)} if held else {},
    }
    if held:  # a core at identity is all zeros, and coeff is a number: inductor would take both for constants
        settings |= {"always_keep_tensor_constants": True, "joint_graph_constant_folding": False}
    if has_line_tables():
        settings["aot_inductor.enable_line_tables"] = False
    return settings


def _compile(program: ExportedProgram, path: Path, settings: dict[str, object], name: str) -> None:
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    with tempfile.TemporaryDirectory() as folder, quiet(*NOISY):
        places = {"aot_inductor.package": True, "aot_inductor.output_path": folder}
        try:
            files = compile_ahead_of_time(program.module(), args, kwargs, settings | places)
        except Exception as error:  # inductor may fail in any way; the cause is chained
            raise ExportError(f"{name} cannot be compiled: {type_and_message(error)}") from error
        # the sources are not needed to run, and name this machine's folders;
        # torch 2.11 needs the name of one to find the metadata
        kept = [file for file in files if not str(file).endswith(".h")]
        for file in kept:
            if isinstance(file, str) and file.endswith(".cpp"):
                Path(file).write_bytes(b"")
            elif isinstance(file, str) and file:
                _forget_paths(Path(file), [folder, str(Path(torch.__file__).parent.parent)])
        with archive(path) as written:
            write_package(written, kept)


def _check_replaceable(subject: Subject, loaded: CallablePackage) -> None:
    """Put noise into the cores of the reference and of the loaded package, and compare.

    Raises:
        ExportError: they differ, so that inductor made some of a core part of the code.
    """
    generator = torch.Generator().manual_seed(0)
    for site in sites(subject.reference).values():
        for name, p in list(site.core._parameters.items()):
            assert p is not None
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) / 10
            site.core._parameters[name] = nn.Parameter(p.detach() + noise)  # the model's own is not written
    swap(loaded, subject.reference)
    _, problem = differ(subject, loaded, subject.call)
    if problem is not None:
        raise ExportError(f"the compiled package does not follow another core: {problem}")


def _forget_paths(file: Path, folders: list[str]) -> None:
    """Overwrite folders of this machine, in the texts of errors, by relative ones of the same length.

    A compiler flag would not do: ``-ffile-prefix-map`` has no setting of inductor's, makes it compile its headers again
    (94 s more for a first export), for every temporary folder if that is mapped too, and leaves that folder in the
    file if it is not.
    """
    with open(file, "r+b") as opened:
        if not file.stat().st_size:
            return
        with mmap.mmap(opened.fileno(), 0) as data:
            for folder in map(os.fsencode, folders):
                at = data.find(folder)
                while at >= 0:
                    data[at : at + len(folder)] = (b"./" * len(folder))[: len(folder)]
                    at = data.find(folder, at + len(folder))


def _device(program: ExportedProgram) -> str:
    tensors = [*program.state_dict.values(), *program.constants.values()]
    return next((str(tensor.device) for tensor in tensors if isinstance(tensor, torch.Tensor)), "cpu")
