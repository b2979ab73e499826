"""The command line application, as its entry point makes it."""

from __future__ import annotations

import tomllib
from importlib import import_module
from pathlib import Path

import typer

POINTS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]


def application() -> typer.Typer:
    app = typer.Typer()
    for name, target in POINTS["surgery.commands"].items():
        module, _, function = target.partition(":")
        app.command(name=name)(getattr(import_module(module), function))
    return app
