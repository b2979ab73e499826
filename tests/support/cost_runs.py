"""A recorded run of the cost benchmark."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from bench.cost.worker import CostSettings, Measurement
from tests.support.command_line import application

HERE = "tests.support.cost_models"


def measured(name: str, source: str = f"{HERE}:residual", **options: Any) -> dict[str, Any]:
    return Measurement(CostSettings(source, **{"r": 4, "repeats": 2, "device": "cpu", **options}), name).run()


def run(*arguments: object) -> str:
    result = CliRunner().invoke(application(), ["cost", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output
