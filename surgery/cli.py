"""The console command ``surgery``. Packages above add their commands through the entry points "surgery.commands"."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points, version

import typer
from rich.console import Console

from passes.errors import SurgeryError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="S-space model surgery for PyTorch.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("sspace-surgery"))
        raise typer.Exit


@app.callback()
def _root(
    show: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """S-space model surgery: adapters in the singular basis of a model's own weights."""


@app.command()
def variants() -> None:
    """List the variants of the adapter, each with its equation."""
    from surgery.variants import REGISTRY

    for name, cls in sorted(REGISTRY.items()):
        lines = (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()
        equation = next((line.strip() for line in lines if line.strip().startswith("delta(h)")), "")
        typer.echo(f"{name:20}{lines[0]}\n{'':20}{equation}")


def main() -> None:
    """Run the command line; an expected error is one line on the standard error stream and exit status 1."""
    for point in sorted(entry_points(group="surgery.commands"), key=lambda p: p.name):
        app.command(name=point.name)(point.load())
    try:
        app()
    except SurgeryError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False)
        sys.exit(1)
