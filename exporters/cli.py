"""Commands of the exporters: ``surgery export``, ``surgery merge``. Formats and their options are found, not listed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from exporters import export, formats, merge_checkpoint
from exporters.shared.exporter import load_exporter, parsed_options
from exporters.shared.options import flags
from exporters.shared.publish import target_of
from passes.errors import InputError
from surgery.storage.hub import check_adapter

if TYPE_CHECKING:
    import transformers


def options() -> dict[str, tuple[type, str]]:
    """All options of all formats that a command line can give: type, and what it is for by format."""
    found: dict[str, tuple[type, str]] = {}
    for format in formats():
        for flag in flags(load_exporter(format).Options):
            line = f"{format}: {flag.help}"
            kind, before = found.get(flag.name, (flag.kind, ""))
            found[flag.name] = (kind, f"{before} {line}".lstrip())
    return found


def export_model(
    model: str = typer.Argument(help="A folder or a hub id, loaded with the class that its configuration names."),
    out: Path = typer.Argument(help="A file, or a new or empty folder."),
    format: str = typer.Option(..., help=f"One of {', '.join(formats())}."),
    adapter: Path | None = typer.Option(None, help="A folder that save_adapter wrote; the plain model by default."),
    coeff: float = typer.Option(1.0, help="The coefficient to steer the adapter with."),
    **given: Any,
) -> None:
    """Export a model, with an adapter or without, and compare the result with PyTorch."""
    from surgery import load_adapter, set_coeff

    chosen = {name: value for name, value in given.items() if value is not None}
    exporter, _ = parsed_options(format, chosen)  # what is wrong is refused before a model is loaded
    target_of(out, exporter.DEFAULT_NAME)
    if adapter is not None:
        check_adapter(adapter)
        if not math.isfinite(coeff):
            raise InputError(f"--coeff must be a finite number, found {coeff}")
    loaded = _load(model)
    if adapter is not None:
        set_coeff(load_adapter(loaded, adapter), coeff)
    report = export(loaded, format, out, **chosen)
    typer.echo(f"wrote {report.path} ({len(report.files)} files); largest deviation {report.max_error:.2g}")


def _with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for each option of a format, in place of its ``**given``."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, (kind, about) in options().items():
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=typer.Option(None, help=about), annotation=kind | None
            )
        )
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


export_command = _with_flags(export_model)


def merge_command(
    base_dir: Path = typer.Argument(help="A checkpoint folder with safetensors."),
    adapter_dir: Path = typer.Argument(help="A folder that save_adapter wrote."),
    out_dir: Path = typer.Argument(help="A new or empty folder."),
    coeff: float = typer.Option(1.0, help="The coefficient to merge at."),
    untie: bool = typer.Option(False, "--untie", help="Give tied weights tensors of their own."),
    progress: bool | None = typer.Option(None, help="Show a progress bar; by default on a terminal."),
) -> None:
    """Merge an adapter into a checkpoint tensor by tensor, without loading the model; a killed run can be resumed."""
    report = merge_checkpoint(base_dir, adapter_dir, out_dir, coeff=coeff, untie=untie, progress=progress)
    sites, files = report.details["sites"], len(report.details["rewritten"])
    typer.echo(f"wrote {report.path}: {sites} sites in {files} files; largest deviation {report.max_error:.2g}")


def _load(source: str) -> transformers.PreTrainedModel:
    """Load a model from a folder or the hub, with the class that its configuration names."""
    import transformers

    from passes.ir.forward_context import quiet
    from surgery.support.hf_config import first_line, hub_config, model_class

    cls = model_class(hub_config(source), transformers.AutoModel)
    try:
        with quiet("transformers", "huggingface_hub"):
            return cls.from_pretrained(source, use_safetensors=True, trust_remote_code=False).eval()
    except Exception as error:  # damaged weights fail in many ways
        raise InputError(f"cannot load a model from {source!r}: {first_line(error)}") from error
