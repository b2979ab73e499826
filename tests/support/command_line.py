"""The command line application, as its entry point makes it."""

from __future__ import annotations

import tomllib
from importlib import import_module
from pathlib import Path

import typer
from typer.testing import CliRunner

POINTS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]


def application() -> typer.Typer:
    app = typer.Typer()
    for name, target in POINTS["surgery.commands"].items():
        module, _, function = target.partition(":")
        app.command(name=name)(getattr(import_module(module), function))
    return app


def run(*arguments: object) -> str:
    """What a command prints; what it raises is raised."""
    result = CliRunner().invoke(application(), [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output
