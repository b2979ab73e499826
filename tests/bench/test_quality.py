"""The quality comparison: what is compared, how a rate is chosen, that runs resume, that the report is the data's."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.__main__ import main
from bench.quality import figure as quality_figure
from bench.quality import report as quality_report
from bench.quality import run as quality
from bench.quality import step_time as quality_steps
from bench.quality.methods import BASE, FULL, GRID, Method, build, methods, rate, trains, untrainable
from bench.quality.training import QualitySettings, Task, schedule
from passes.errors import InputError
from surgery import AntiPaSTO, sites
from surgery.variants import REGISTRY, Variant
from tests.support.tolerance import assert_close

RESULTS = Path(__file__).parents[2] / "bench" / "results"
COMPARED = ["antipasto", "LoRA, r = 8", "full fine-tuning"]
TINY = QualitySettings(r=16, steps=2, batch=2, length=16, seeds=2, base_steps=2, calibration=1, evaluated=256)
MEASURED = ("setup_seconds", "command", "commit", "workers")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small comparison that has been run to its end."""
    out = tmp_path_factory.mktemp("quality")
    sizes = [(f"--{name.replace('_', '-')}", str(value)) for name, value in dataclasses.asdict(TINY).items()]
    places = ["--out", str(out), "--cache", str(cache), "--workers", "1"]
    assert main(["quality", *places, *itertools.chain(*sizes), "--methods", ";".join(COMPARED)]) == 0
    return out


def compared() -> list[Method]:
    return [method for method in methods(TINY.r) if method.name in COMPARED]


def small_base() -> nn.Module:
    config = Qwen3Config(
        vocab_size=256, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


def row_of(method: Method, seed: int, value: float | None, validation: float | None, held_out: float | None) -> Any:
    """A recorded run with given losses."""
    row = {**dataclasses.asdict(method), "seed": seed, "rate": value, "trainable": 7, "initial_difference": 0.0}
    row |= {"validation_loss": validation, "held_out_loss": held_out, "hardware": "x", "threads": 1}
    return row | {"initial_loss": 2.0, "settings": dataclasses.asdict(TINY), "workers": 1}


def rows_of(method: Method, by_rate: Callable[[float], float | None]) -> dict[Task, Any]:
    """A sweep over every half decade that could be asked for, with losses that are a function of its number."""
    numbers = range(GRID[method.family][0] - 4, GRID[method.family][-1] + 5)
    rows = [row_of(method, 0, rate(n), by_rate(n), -n) for n in numbers]
    return {quality.task_of(row): row for row in rows}


def test_every_variant_that_trains_is_compared_without_a_list() -> None:
    names = {method.kind for method in methods(8) if method.family == "surgery"}
    assert names | set(untrainable()) == set(REGISTRY)
    assert untrainable() == ["sspace", "sspace_scale"]
    assert len({method.name for method in methods(64)}) == len(methods(64)) == len(names) + 2 * 3 + 1

    @dataclasses.dataclass(frozen=True)
    class Another(AntiPaSTO):
        name: ClassVar[str] = "another"

    try:
        assert "another" in [method.name for method in methods(8)]
    finally:
        del REGISTRY["another"]


@pytest.mark.parametrize("method", methods(16), ids=lambda method: method.name)
def test_a_method_starts_as_the_base_and_trains_what_it_should(method: Method) -> None:
    base, tokens = small_base(), torch.randint(0, 256, (2, 12))
    frozen = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = build(method, base, 0, [torch.randint(0, 256, (4, 32))])
    with torch.no_grad():
        found, expected = model(input_ids=tokens).logits, base.requires_grad_(False)(input_ids=tokens).logits
    if method.family != "surgery":
        assert_close(found, expected)
    else:
        assert torch.equal(found, expected) == REGISTRY[method.kind]().identity_at_init
        assert set(sites(model)) == {name for name, m in base.named_modules() if _is_target(name, m)}
        assert {site.factors.rank for site in sites(model).values()} == {16}
    if method.family == "peft":
        adapted = {name for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
        assert adapted == {name for name, m in base.named_modules() if _is_target(name, m)}
        layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
        assert layer.scaling == {"default": 1.0}
        assert layer.lora_A["default"].out_features == method.rank
    assert all(torch.equal(p, frozen[name]) for name, p in base.named_parameters())  # the base is copied
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in base.parameters()) if method is FULL else count > 0


def _is_target(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


def test_the_rate_is_chosen_by_the_validation_part() -> None:
    method = methods(16)[0]
    middle = GRID[method.family][2]
    rows = rows_of(method, lambda n: abs(n - middle))  # the held-out loss falls all the way up
    assert quality.chosen(method, rows) == (rate(middle), False)
    assert quality.grid(method, rows) == list(GRID[method.family])


def test_a_best_rate_at_the_edge_extends_the_grid_once() -> None:
    method = FULL
    low, *_, high = GRID[method.family]
    rows = rows_of(method, lambda n: abs(n - (low - 1)))
    assert quality.grid(method, rows) == [low - 2, low - 1, *GRID[method.family]]
    assert quality.chosen(method, rows) == (rate(low - 1), False)
    rows = rows_of(method, lambda n: -n)
    assert quality.grid(method, rows) == [*GRID[method.family], high + 1, high + 2]
    assert quality.chosen(method, rows) == (rate(high + 2), True)
    del rows[Task(method, 0, rate(high + 2))]
    assert quality.chosen(method, rows) is None  # the extension is not finished


def test_a_run_that_diverged_is_never_chosen_and_is_reported() -> None:
    method = FULL
    middle = GRID[method.family][1]
    rows = rows_of(method, lambda n: None if n > middle else -n)
    assert quality.chosen(method, rows) == (rate(middle), False)
    recorded = [row_of(BASE, 0, None, 2.0, 2.0), *rows.values(), row_of(method, 1, rate(middle), None, None)]
    text = quality_report.quality_markdown(quality.summary(recorded), TINY, recorded, None)
    assert f"| {method.name} | 7 | {rate(middle):g} | diverged |" in text
    assert f"Not below the base with every seed: {method.name}." in text


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    found = [schedule(step, 40) for step in range(40)]
    assert found[0] == pytest.approx(0.25, rel=0.01)
    assert max(found) == found[3]
    assert found[3:] == sorted(found[3:], reverse=True)
    assert 0 < found[-1] < 0.01


def stable(path: Path) -> list[dict[str, Any]]:
    """The recorded runs without what is a matter of time and place."""
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in quality.read(path)]


@pytest.mark.bench
def test_every_run_is_recorded_with_where_it_comes_from(finished: Path) -> None:
    rows = quality.read(finished / "quality.jsonl")
    for row in rows:
        for entry in ("command", "commit", "versions", "hardware", "threads", "settings", "workers"):
            assert row[entry]
        assert row["versions"]["peft"]
    assert len({quality.task_of(row) for row in rows}) == len(rows)
    found = {row["name"]: row for row in quality.summary(rows)}
    assert set(found) == {"base", *COMPARED}
    assert all(len(found[name]["runs"]) == TINY.seeds for name in COMPARED)
    assert found["antipasto"]["runs"][0]["initial_difference"] == 0
    losses = [run["held_out_loss"] for row in found.values() for run in row["runs"]]
    assert len(set(losses)) == len(losses)  # seeds and methods are all different runs


@pytest.mark.bench
def test_a_run_that_was_broken_off_is_taken_up_again(finished: Path, cache: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "quality.jsonl", (finished / "quality.jsonl").read_text()
    path.write_text(whole)
    quality.complete(TINY, compared(), path, cache=cache)
    assert path.read_text() == whole  # nothing was left to do
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:-3]) + lines[-3][:100])
    quality.complete(TINY, compared(), path, cache=cache)
    assert path.read_text().startswith("".join(lines[:-3]))
    assert stable(path) == stable(finished / "quality.jsonl")


@pytest.mark.bench
def test_steps_are_timed_in_turn_and_once(finished: Path, cache: Path) -> None:
    path = finished / "quality_steps.json"
    data = json.loads(path.read_text())
    assert set(data["milliseconds"]) == set(COMPARED)
    assert all(0 < ms["q1"] <= ms["median"] <= ms["q3"] for ms in data["milliseconds"].values())
    assert {"command", "commit", "versions", "hardware", "threads"} <= set(data)
    ms = data["milliseconds"]["antipasto"]
    assert f"| {ms['median']:.0f} ({ms['q1']:.0f} to {ms['q3']:.0f}) |" in (finished / "quality.md").read_text()
    before = path.read_bytes()
    quality_steps.complete(TINY, quality.summary(quality.read(finished / "quality.jsonl")), path, cache)
    assert path.read_bytes() == before


@pytest.mark.bench
def test_runs_of_another_python_are_not_mixed(finished: Path, cache: Path, tmp_path: Path) -> None:
    rows = [{**row, "python": "3.9.0"} for row in quality.read(finished / "quality.jsonl")]
    (tmp_path / "quality.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"runs of Python 3\.9\.0"):
        quality.complete(TINY, compared(), tmp_path / "quality.jsonl", cache=cache)


@pytest.mark.bench
def test_runs_with_other_settings_are_not_mixed(finished: Path, cache: Path) -> None:
    before = (finished / "quality.jsonl").read_text()
    with pytest.raises(InputError, match="other settings"):
        quality.complete(dataclasses.replace(TINY, steps=3), compared(), finished / "quality.jsonl", cache=cache)
    assert (finished / "quality.jsonl").read_text() == before


@pytest.mark.full
def test_results_do_not_depend_on_the_number_of_processes(finished: Path, cache: Path, tmp_path: Path) -> None:
    quality.complete(TINY, compared(), tmp_path / "quality.jsonl", cache=cache, workers=2)
    assert stable(tmp_path / "quality.jsonl") == stable(finished / "quality.jsonl")


@pytest.mark.bench
def test_the_table_and_the_figure_come_from_the_data(finished: Path, tmp_path: Path) -> None:
    table, figure = (finished / "quality.md").read_text(), (finished / "quality.png").read_bytes()
    assert quality.report(finished) == table
    rows = quality.read(finished / "quality.jsonl")
    used = next(row for row in quality.summary(rows) if row["name"] == "antipasto")
    for row in rows:
        if row in used["runs"]:
            row["held_out_loss"] = 1.25 if row["seed"] else 1.75
    (tmp_path / "quality.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["quality", "--report", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "quality.md").read_text()
    assert "1.5000 (1.2500 to 1.7500)" in text
    assert "The lowest mean is that of antipasto" in text
    assert "1.5000" not in table
    assert "Not run, or not completely: antipasto_ablate" in text
    assert "Left out, having nothing to train: sspace." in text
    assert (tmp_path / "quality.png").read_bytes() != figure
    assert figure.startswith(b"\x89PNG")
    with pytest.raises(InputError, match="no runs"):
        quality.report(tmp_path / "nowhere")


@pytest.fixture
def axes() -> Iterator[tuple[Any, Any]]:
    figure, found = plt.subplots(figsize=(9, 5.6))
    yield figure, found
    plt.close(figure)


@pytest.mark.bench
def test_labels_never_overlap(axes: tuple[Any, Any]) -> None:
    figure, on = axes
    heights = [1.5 + 0.002 * (i % 4) for i in range(12)]
    points = [quality_figure.Point(f"method {i}", 1800.0 + i, y, y, y, "k") for i, y in enumerate(heights)]
    on.set(xscale="log", xlim=(1e3, 1e6), ylim=(1.4, 1.7))
    boxes = quality_figure.label_points(figure, on, points)
    assert len(boxes) == len(points)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for point in points:
        assert not any(box.contains(*on.transData.transform((point.x, point.y))) for box in boxes)


def test_what_trains_is_found_from_the_core() -> None:
    assert trains(AntiPaSTO)
    assert not trains(REGISTRY["sspace"])
    assert issubclass(REGISTRY["sspace"], Variant)
    assert rate(-4) == 0.01
    assert rate(-5) == pytest.approx(math.sqrt(1e-5), rel=0.02)


def test_the_committed_table_is_that_of_the_recorded_runs() -> None:
    rows = quality.read(RESULTS / "quality.jsonl")
    settings = quality.settings_of(rows)
    assert (RESULTS / "quality.md").read_text() == quality.markdown(RESULTS)
    assert {row["name"] for row in quality.summary(rows)} == {"base", *(method.name for method in methods(settings.r))}
    for row in rows:
        for entry in ("command", "commit", "versions", "hardware", "threads"):
            assert row[entry]
