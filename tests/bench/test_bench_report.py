"""Tables, figures and comparisons of the speed matrix, from made-up data; and the committed pages against theirs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from bench.__main__ import main
from bench.common.results_store import read
from bench.pages import report
from bench.speed import report as speed_report
from bench.speed.compare import compare, told
from passes.errors import InputError

ROOT = Path(__file__).parents[2]
SAME = {"config": "tiny", "layers": 2, "dtype": "float32", "r": 16, "tokens": 64, "device": "a processor", "threads": 2}


def spread(middle: float, width: float = 0.02) -> dict[str, float]:
    return {"q1": middle * (1 - width), "median": middle, "q3": middle * (1 + width), "n": 15}


def row(contender: str, ms: float, shape: str = "prefill", **changed: Any) -> dict[str, Any]:
    cell = {"runtime": "eager", "contender": contender, "shape": shape, "seed": 0, "repeats": 15, "status": "ok"}
    measured = {
        "milliseconds": spread(ms),
        "base_milliseconds": spread(10),
        "ratio": spread(ms / 10),
        "minimum_ms": 8.0,
    }
    return {**SAME, **cell, **measured, "ceilings": {"flops_per_second": 1e11, "bytes_per_second": 2e10}, **changed}


WRONG = {"status": "wrong", "errors": {"output": 1.0}}
ROWS = [
    row("LoRA", 12.5), row("base", 10.0), row("base", 20.0, "training"), row("LoRA", 31.0, "training"),
    row("base", 9.0, runtime="compile"), row("residual hooks compiled after the base", 0, runtime="compile", **WRONG),
]  # fmt: skip


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in found))
    return path


def test_tables_show_ratio_milliseconds_and_limit() -> None:
    text = speed_report.markdown(ROWS)
    assert "100 GFLOP/s" in text
    assert "20.0 GB/s" in text
    lines = text.splitlines()
    assert lines.index("| eager | prefill, 64 tokens | training step, 64 tokens |") < lines.index(
        "| compile | prefill, 64 tokens |"
    )
    assert "| LoRA | 1.25 (1.23 to 1.27); 12.5 of ~8 ms | 3.10 (3.04 to 3.16); 31 of ~8 ms |" in lines
    assert "| residual hooks compiled after the base | wrong: error 1 of the effect |" in lines
    assert lines.index(next(line for line in lines if line.startswith("| base"))) < lines.index(
        next(line for line in lines if line.startswith("| LoRA"))
    )
    assert len(speed_report.groups([*ROWS, row("base", 1.0, device="another")])) == 2


@pytest.mark.parametrize("how", [{"seed": 1}, {"repeats": 9}])
def test_rows_of_another_seed_or_number_of_pairs_have_tables_of_their_own(how: dict[str, int]) -> None:
    text = speed_report.markdown([row("LoRA", 12.5), row("LoRA", 17.5, **how)])
    assert "12.5 of ~8 ms" in text
    assert "17.5 of ~8 ms" in text
    headings = [line for line in text.splitlines() if line.startswith("**")]
    assert len(set(headings)) == 2


def test_another_backend_is_named() -> None:
    text = speed_report.markdown([row("LoRA", 12.5, runtime="compile", backend="eager")])
    assert "| compile with eager | prefill" in text
    assert "| compile | prefill" in speed_report.markdown([row("LoRA", 1.0, runtime="compile", backend="inductor")])


def test_the_least_time_is_by_the_best_rate_that_was_measured_or_reached() -> None:
    work = {"flops": 8e8, "bytes": 1e6, "ceilings": {"flops_per_second": 5e10, "bytes_per_second": 2e10}}
    slow, fast = row("LoRA", 12.0, **work), row("merged", 8.0, **work)  # 8e8 FLOPs in 8 ms: 1e11 in a second
    rows = {one["contender"]: one for _, found in speed_report.groups([slow, fast]) for one in found}
    assert rows["LoRA"]["minimum_ms"] == pytest.approx(8.0)
    assert rows["merged"]["minimum_ms"] == pytest.approx(8.0)
    assert (
        "Ceilings: 100 GFLOP/s, the best of products by themselves and of all cells; 20.0 GB/s"
        in speed_report.markdown([slow, fast])
    )
    assert slow["ceilings"]["flops_per_second"] == 5e10  # what was measured stays what it is


def test_the_figure_is_an_image(tmp_path: Path) -> None:
    speed_report.figure(ROWS, tmp_path / "speed.png")
    pixels = image.imread(tmp_path / "speed.png")
    assert min(pixels.shape[:2]) > 100
    assert pixels[..., :3].std() > 0.01  # something is drawn


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in report.PAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "bench" / "results", tmp_path / "bench" / "results")
    return tmp_path


def test_the_committed_tables_are_in_step_with_the_data() -> None:
    assert report.check(ROOT) == []


def test_report_writes_what_a_check_then_accepts(project: Path, capsys: Any) -> None:
    write(project / "bench/results/speed.jsonl", ROWS)
    assert main(["report", "--root", str(project), "--check"]) == 1
    assert "bench/results/speed.md" in capsys.readouterr().err
    assert main(["report", "--root", str(project)]) == 0
    assert main(["report", "--root", str(project), "--check"]) == 0
    assert "12.5 of ~8 ms" in (project / "bench/README.md").read_text()
    assert image.imread(project / "bench/results/speed.png").ndim == 3


def test_a_report_outside_the_project_says_so(tmp_path: Path, capsys: Any) -> None:
    for more in ([], ["--check"]):
        assert main(["report", "--root", str(tmp_path), *more]) == 2
        assert "not the project's root" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("page", report.PAGES)
def test_a_changed_number_on_a_page_is_noticed(page: str, project: Path) -> None:
    assert report.check(project) == []
    text = (project / page).read_text()
    tables = list(report.MARKED.finditer(text))
    shown = [(table, re.search(r"\d", table.group(3))) for table in tables]
    assert sum(digit is not None for _, digit in shown) >= 3
    for table, digit in shown:
        if digit is None:
            continue  # nothing is recorded
        at = table.start(3) + digit.start()
        (project / page).write_text(text[:at] + str(int(text[at]) ^ 1) + text[at + 1 :])
        assert report.check(project) == [page]


def test_changed_data_is_noticed(project: Path) -> None:
    path = project / "bench/results/lowerings.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    kept[0]["milliseconds"]["merged"] = [[3.0, 1.0]] * 5
    write(path, kept)
    assert "bench/results/lowerings.md" in report.check(project)


def test_a_slower_cell_is_flagged_and_noise_is_not(tmp_path: Path, capsys: Any) -> None:
    before = write(
        tmp_path / "a.jsonl", [row("base", 10.0), row("LoRA", 12.0), row("merged", 10.0), row("PiSSA", 10.0)]
    )
    # 20% slower; 8% slower with ranges that overlap; 3% slower without an overlap; gone
    changed = [row("base", 12.0), row("LoRA", 13.0, milliseconds=spread(13.0, 0.1)), row("folded", 1.0)]
    changed.append(row("merged", 10.3, milliseconds=spread(10.3, 0.001)))
    after = write(tmp_path / "b.jsonl", changed)
    found = compare(before, after)
    assert {change.cell[6]: change.verdict for change in found.changes} == {
        "base": "slower", "LoRA": "same", "merged": "same"
    }  # fmt: skip
    assert (found.only_before, found.only_after) == (1, 1)
    assert found.changes[0].ratio == pytest.approx(1.2)
    assert found.changes[0].low < 1.2 < found.changes[0].high
    assert main(["compare", str(before), str(after)]) == 0
    assert "SLOWER" in capsys.readouterr().out
    assert main(["compare", str(before), str(after), "--fail"]) == 1


def test_the_other_way_round_it_is_faster(tmp_path: Path) -> None:
    slow, fast = (write(tmp_path / f"{ms}.jsonl", [row("base", ms)]) for ms in (12.0, 10.0))
    assert compare(slow, fast).changes[0].verdict == "faster"
    assert compare(fast, fast).changes[0].verdict == "same"
    assert main(["compare", str(slow), str(fast), "--fail"]) == 0
    assert main(["compare", str(fast), str(slow), "--fail"]) == 1


def test_ratios_to_the_base_leave_the_machine_out(tmp_path: Path) -> None:
    here = write(tmp_path / "a.jsonl", [row("LoRA", 12.0)])
    there = write(tmp_path / "b.jsonl", [row("LoRA", 24.0, ratio=spread(1.2), device="a slow processor")])
    assert compare(here, there).regressed
    assert not compare(here, there, "ratio").regressed
    assert "not measured in one place" in told(compare(here, there))


def test_rows_of_several_places_are_compared_within_each(tmp_path: Path) -> None:
    here, there = row("LoRA", 12.0), row("LoRA", 24.0, device="a slow processor")
    before = write(tmp_path / "a.jsonl", [here, there])
    after = write(tmp_path / "b.jsonl", [row("LoRA", 18.0), there, row("LoRA", 9.0, threads=1)])
    found = compare(before, after)
    assert {change.cell[-2:]: change.verdict for change in found.changes} == {
        ("a processor", 2): "slower", ("a slow processor", 2): "same"
    }  # fmt: skip
    assert (found.only_before, found.only_after) == (0, 1)
    assert "not measured in one place" not in told(found)
    alone = write(tmp_path / "c.jsonl", [row("LoRA", 12.0)])
    assert [change.verdict for change in compare(alone, after).changes] == ["slower"]
    with pytest.raises(InputError, match="device, threads"):
        compare(write(tmp_path / "d.jsonl", [row("LoRA", 12.0, device="a third")]), after)


def test_rows_of_several_seeds_are_compared_with_those_of_the_same(tmp_path: Path) -> None:
    before = write(tmp_path / "a.jsonl", [row("LoRA", 12.0), row("LoRA", 24.0, seed=1)])
    after = write(tmp_path / "b.jsonl", [row("LoRA", 24.0, seed=1), row("LoRA", 18.0)])
    assert {change.cell[8]: change.verdict for change in compare(before, after).changes} == {0: "slower", 1: "same"}


def test_a_cell_that_became_wrong_is_broken(tmp_path: Path) -> None:
    before = write(tmp_path / "a.jsonl", [row("LoRA", 12.0)])
    after = write(tmp_path / "b.jsonl", [{**row("LoRA", 12.0), **WRONG}])
    assert "BROKEN" in told(compare(before, after))
    assert main(["compare", str(before), str(after), "--fail"]) == 1


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "no file"),
        ('{"config": "tiny"}\n', "lacks layers"),
        ("[1, 2]\n", "lacks config"),
        ('{"config": ', "cut short"),
        (
            json.dumps({k: v for k, v in row("base", 1.0).items() if k != "ratio"}) + "\n",
            "without milliseconds and ratio",
        ),
        (json.dumps(row("base", 1.0, r=999)) + "\n", "no measured cell in common"),
    ],
)
def test_a_file_that_does_not_fit_is_named(content: str | None, word: str, tmp_path: Path, capsys: Any) -> None:
    good, bad = write(tmp_path / "a.jsonl", [row("base", 1.0)]), tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_text(content)
    with pytest.raises(InputError, match=word):
        compare(good, bad)
    assert main(["compare", str(good), str(bad), "--fail"]) == 2
    assert "bad.jsonl" in capsys.readouterr().err


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", ROWS)) == ROWS
    assert read(tmp_path / "none.jsonl") == []
