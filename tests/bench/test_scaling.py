"""How costs grow: the fit, that points are measured once, and the report of made-up points."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image

from bench.common.timing import power
from bench.models.decoder import CONFIGS, Sizes
from bench.scaling import report as scaling_report
from bench.scaling import run as scaling
from passes.errors import InputError

WHERE = {"device": "a processor", "threads": 2, "seed": 0, "repeats": 15}


@given(st.floats(-3, 3), st.floats(1e-3, 1e3), st.lists(st.integers(1, 10**6), min_size=2, max_size=9, unique=True))
def test_the_fit_finds_the_exponent(exponent: float, factor: float, x: list[int]) -> None:
    slope, error = power(x, [factor * a**exponent for a in x])
    assert slope == pytest.approx(exponent, abs=1e-6)
    assert (error is None) == (len(x) == 2)
    assert error is None or error < 1e-6


def test_the_fits_error_is_that_of_least_squares() -> None:
    x, y = [1.0, 2.0, 4.0, 8.0], [1.0, 2.2, 3.9, 8.1]
    (slope, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert power(x, y) == pytest.approx((slope, covariance[0, 0] ** 0.5))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models in the place of all."""
    tiny = Sizes(128, 96, 2, 1, 64, 1)
    monkeypatch.setitem(CONFIGS, "qwen3-0.6b-layer", tiny)
    monkeypatch.setattr(scaling, "layers_of", lambda hidden, layers=1: Sizes(128, 96, 2, 1, 64, min(2, layers)))
    monkeypatch.setattr(scaling, "TOKENS", 32)
    monkeypatch.setattr(scaling, "RANK", 8)
    monkeypatch.setattr(scaling, "SECONDS", 0.01)
    for axis, size in {"factorisation": 48, "calibration, tokens": 512, "calibration, width": 64}.items():
        monkeypatch.setitem(scaling.CURVES, axis, replace(scaling.CURVES[axis], sizes=(size,)))


@pytest.mark.parametrize("axis", scaling.CURVES)
def test_every_line_of_a_curve_is_measured_once(
    axis: str, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve, path = scaling.CURVES[axis], tmp_path / "scaling.jsonl"
    scaling.run(path, [axis], repeats=3, most=curve.sizes[0])
    found = scaling.read(path)
    assert {row["line"] for row in found} == set(curve.expected)
    assert {row["x"] for row in found} == {curve.sizes[0]}
    assert all(row["milliseconds"]["median"] > 0 for row in found)
    assert {"command", "commit", "versions", "hardware", "seed"} <= set(found[0])
    before = path.read_bytes()
    again = scaling.Curve(curve.label, curve.expected, curve.sizes, lambda *_: pytest.fail("it is measured again"))
    monkeypatch.setitem(scaling.CURVES, axis, again)
    scaling.run(path, [axis], repeats=3, most=curve.sizes[0])
    assert path.read_bytes() == before


def spread(ms: float) -> dict[str, float]:
    return {"q1": 0.99 * ms, "median": ms, "q3": 1.01 * ms, "n": 15}


def made_up() -> list[dict[str, Any]]:
    rows = []
    for x in (8, 16, 32, 64, 128):
        row = {"axis": "rank", "line": "forward, low-rank", "x": x, **WHERE, "flops": [10 + x**0.9, 10]}
        ratio = {"q1": 1 + 0.009 * x, "median": 1 + 0.01 * x, "q3": 1 + 0.011 * x, "n": 16}
        if x in (8, 128):
            ratio["q3"] = ratio["q1"] + 0.01 * x * 1.349 * 1.7  # two standard errors are 1.07 of what is added
        rows.append({**row, "milliseconds": spread(0.1 * x), "base_milliseconds": spread(100), "ratio": ratio})
    for d in (256, 512):
        rows.append({"axis": "factorisation", "line": "exact", "x": d, **WHERE, "milliseconds": spread(d**3 / 1e6)})
    return rows


def test_the_table_has_exponents_of_what_is_told_from_the_base() -> None:
    text = scaling_report.markdown(made_up())
    first, second = text.splitlines()[4:]
    assert text.startswith("a processor; 2 threads")
    assert (
        first == "| rank | forward, low-rank | 16 to 64 (3 points) | 16.0 to 64.0 | 1.64× | 1.00 ± 0.00 | 1.00 | 0.90 |"
    )
    assert (
        second == "| width of a square weight | exact | 256 to 512 (2 points) | 16.8 to 134 |  | 3.00 | 3.00 | 3.00 |"
    )
    assert scaling_report.markdown([]) == scaling_report.NOTHING


def test_runs_with_other_settings_are_kept_apart() -> None:
    slow = [{**row, "repeats": 3} for row in made_up()]
    text = scaling_report.markdown([*made_up(), *slow])
    assert text.count("| width of a square weight | exact | 256 to 512 (2 points) |") == 2
    passes = {"hardware": "another", "nodes": {}, "milliseconds": {}}
    assert scaling_report.markdown([*made_up(), *slow], passes) == text  # not timed on this machine


def test_the_figure_is_an_image(tmp_path: Path) -> None:
    scaling_report.figure(made_up(), tmp_path / "scaling.png")
    pixels = image.imread(tmp_path / "scaling.png")
    assert min(pixels.shape[:2]) > 100
    assert pixels[..., :3].std() > 0.01


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scaling.jsonl").write_text('{"axis": "rank"}\n')
    with pytest.raises(InputError, match=r"no row of `python -m bench scaling`, it lacks line, x"):
        scaling_report.write(tmp_path)
