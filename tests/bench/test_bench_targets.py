"""The table of targets: verdicts from figures, and that every figure is taken from the recorded run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.common import runs
from bench.micro import lowerings
from bench.models import decoder_layer as contenders
from bench.pages import targets
from bench.pages.targets import Measured, Target

RESULTS = Path(__file__).parents[2] / "bench" / "results"


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


ALL = (
    "dense",
    "dense, coeff changed",
    "low-rank",
    "lowrank",
    "lowrank, coeff by row",
    "auto",
    "LoRA",
    "naive residual",
)


def forward(slower: str = "") -> dict[str, Any]:
    """Inference in which the base takes 10 ms and everything is at 1.01 of it, but one contender at 2.5."""
    milliseconds = {name: [[25.0 if name == slower else 10.1, 10.0]] * 5 for name in ALL}
    return {"kind": "inference", "mode": "eager", "r": 64, "tokens": 512, "milliseconds": milliseconds}


def training(tokens: int, slower: str = "") -> dict[str, Any]:
    """Steps in which peers add twice the base's time and ours a tenth, but one contender two and a half times."""
    milliseconds = {name: [[35.0 if name == slower else 11.0, 10.0]] * 5 for name in ALL}
    milliseconds |= {name: [[30.0, 10.0]] * 5 for name in ("LoRA", "naive residual")}
    return {"kind": "training", "mode": "eager", "r": 256, "tokens": tokens, "milliseconds": milliseconds}


@pytest.mark.parametrize(
    ("slower", "missed"),
    [
        ("", []), ("dense", [0]), ("dense, coeff changed", [1]), ("low-rank", [2]), ("lowrank, coeff by row", [3]),
        ("auto", [4, 5, 6]),
    ],
)  # fmt: skip
def test_a_slower_lowering_misses_its_targets(slower: str, missed: list[int]) -> None:
    rows = [forward(slower), training(512, slower), training(4096, slower)]
    found = [target.verdict() for target in targets.of_lowerings(rows)]
    assert [i for i, verdict in enumerate(found) if verdict != "reached"] == missed


def factors(**changed: Any) -> dict[str, Any]:
    """A run of the factorisations that reaches every target, with changed entries."""
    times = {"svd": [100.0] * 3, "exact": [50.0] * 3, "randomised": [10.0] * 3}
    residual = {"excess_residual": 1e-6}
    row = {"shape": [8, 8], "r": 4, "decay": 0.5, "milliseconds": times, "exact": residual, "randomised": residual}
    corda = {"original, from C": [80.0] * 3, "ours, from the moment": [10.0] * 3}
    cores = [{"variant": name, "forward_backward": [10.0] * 3} for name in ("antipasto_rot", "antipasto")]
    return {
        "factorisation": [row],
        "corda": [{"shape": [1024, 3072], "milliseconds": corda, "error": {"ours": 1e-7}}],
        "memory": [{"peak_bytes": 100}, {"peak_bytes": 105}],
        "cores": cores,
    } | changed


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"memory": [{"peak_bytes": 100}, {"peak_bytes": 111}]}, [6]),
        ({"cores": [{"variant": "antipasto_rot", "forward_backward": [12.0] * 3},
                    {"variant": "antipasto", "forward_backward": [10.0] * 3}]}, [7]),
    ],
)  # fmt: skip
def test_a_worse_initialisation_misses_its_targets(change: dict[str, Any], missed: list[int]) -> None:
    found = [target.verdict() for target in targets.of_factors(factors(**change))]
    assert [i for i, verdict in enumerate(found) if verdict != "reached"] == missed


@pytest.mark.parametrize(("name", "numbers"), [("exact", [0, 1]), ("randomised", [2, 3])])
def test_slower_and_looser_factors_miss_their_targets(name: str, numbers: list[int]) -> None:
    data = factors()
    data["factorisation"][0]["milliseconds"][name] = [90.0] * 3
    data["factorisation"][0][name] = {"excess_residual": 0.1}
    found = [target.verdict() for target in targets.of_factors(data)]
    assert [i for i, verdict in enumerate(found) if verdict != "reached"] == numbers


def test_the_bound_is_the_layers_flops_as_counted() -> None:
    base = contenders.Layer().eval()
    model, x = contenders.operated(base, 64, "lowrank"), torch.randn(2, 64, contenders.HIDDEN)
    mine, plain = (runs.products(runs.forward(m, ((x,), {})), x.device) for m in (model, base))
    assert lowerings.bound(64, 128) == pytest.approx(mine / plain, rel=1e-3)
