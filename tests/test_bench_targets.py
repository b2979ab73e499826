"""The table of targets: verdicts from figures, and that every figure is taken from the recorded run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import targets
from bench.targets import Measured, Target

RESULTS = Path(__file__).parent.parent / "bench" / "results"


@pytest.mark.parametrize(
    ("most", "figures", "verdict"),
    [
        (True, [(1.0, 0.9, 1.1), (1.02, 1.0, 1.1)], "reached"),
        (True, [(1.0, 0.9, 1.1), (1.03, 1.01, 1.1)], "within the quartiles (1 of 2)"),
        (True, [(1.03, 1.01, 1.1), (1.05, 1.04, 1.06)], "missed (2 of 2)"),
        (False, [(1.02, 0.9, 1.1)], "reached"),
        (False, [(1.01, 1.0, 1.03)], "within the quartiles (1 of 1)"),
        (False, [(1.01, 1.0, 1.015), (2.0, 2.0, 2.0)], "missed (1 of 2)"),
    ],
)
def test_verdicts(most: bool, figures: list[tuple[float, float, float]], verdict: str) -> None:
    assert Target("", 1.02, most, [Measured("", *figure) for figure in figures]).verdict() == verdict


def verdicts(folder: Path) -> list[str]:
    return [target.verdict() for target in targets.targets(folder)]


def test_all_targets_have_figures_in_the_recorded_runs() -> None:
    assert len(targets.targets(RESULTS)) == 15
    assert len(targets.markdown(RESULTS).splitlines()) == 2 + 15


def test_without_runs_there_are_none(tmp_path: Path) -> None:
    assert targets.targets(tmp_path) == []


def changed(folder: Path, file: str, change: Any) -> list[str]:
    """Verdicts after all contenders named by a change became slower by ten times."""
    text = (RESULTS / file).read_text()
    if file.endswith("l"):
        rows = [json.loads(line) for line in text.splitlines()]
        change(rows)
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        data = json.loads(text)
        change(data)
        (folder / file).write_text(json.dumps(data))
    return verdicts(folder)


@pytest.mark.parametrize(
    ("name", "missed"),
    [("dense", 1), ("dense, coeff changed", 1), ("low-rank", 1), ("lowrank, coeff by row", 1), ("auto", 3)],
)
def test_a_slower_lowering_misses_its_targets(name: str, missed: int, tmp_path: Path) -> None:
    def slower(rows: list[Any]) -> None:
        for row in rows:
            if name in row["milliseconds"]:
                row["milliseconds"][name] = [[10 * a, b] for a, b in row["milliseconds"][name]]

    (tmp_path / "before").mkdir()
    before = changed(tmp_path / "before", "lowerings.jsonl", lambda rows: None)
    after = changed(tmp_path, "lowerings.jsonl", slower)
    assert sum("missed" in verdict for verdict in after) - sum("missed" in verdict for verdict in before) == missed


@pytest.mark.parametrize("name", ["exact", "randomised"])
def test_slower_factors_miss_their_target(name: str, tmp_path: Path) -> None:
    def slower(data: Any) -> None:
        for row in data["factorisation"]:
            row["milliseconds"][name] = [20 * ms for ms in row["milliseconds"][name]]
            row[name]["excess_residual"] = 1.0

    found = changed(tmp_path, "factors.json", slower)
    assert found.count("missed (12 of 12)") == 2
