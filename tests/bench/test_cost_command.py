"""The command `surgery cost`: files that agree, runs that are taken up again, options and devices that are wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from bench.common.figures import plt
from bench.cost import run as cost
from bench.cost.figure import cost_figure
from bench.cost.rows import SAME, SavedRows
from bench.cost.table import markdown, record, size, speed
from bench.cost.worker import BASE, FULL, CostSettings
from surgery import InputError, VariantError
from tests.support.cost_runs import HERE, measured, run
from tests.support.forked_commands import ForkedCommand, run_forked


@pytest.mark.long
def test_the_command_the_files_and_taking_up_again(tmp_path: Path) -> None:
    """The second run measures only what the first did not."""
    out = tmp_path / "out"
    options = [f"{HERE}:residual", "--r", 4, "--repeats", 2, "--device", "cpu", "--out", out]
    text = run(*options, "--variants", "antipasto")
    assert "Residual, 1,072 parameters, float32" in text
    assert "antipasto" in text
    data = json.loads((out / "cost.json").read_text())
    assert [row["variant"] for row in data["rows"]] == [BASE, FULL, "antipasto"]
    assert all(data[name] for name in ("command", "commit", "versions", "hardware", "threads"))
    assert [row.get("error") for row in data["rows"]] == [None] * 3
    assert data["records"] == [record(row) for row in data["rows"]]
    with (out / "cost.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert lines == [{k: "" if v is None else str(v) for k, v in found.items()} for found in data["records"]]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in (out / "cost.md").read_text().splitlines()
             if line.startswith("| ")]  # fmt: skip
    for table, first in ((speed, 0), (size, 4)):
        shown = [list(table(found).values()) for found in data["records"]]
        assert cells[first] == [name.strip() for name in table(data["records"][0])]
        assert cells[first + 1 : first + 4] == [[cell.strip() for cell in line] for line in shown]
    assert (out / "cost.png").read_bytes().startswith(b"\x89PNG")
    # so small a model needs next to nothing: what is imported or set up once must not count
    assert all(row["peak_bytes"][kind] < 8e6 for row in data["rows"] for kind in ("forward", "step"))

    kept = (out / "cost.jsonl").read_text()
    assert [json.loads(line) for line in kept.splitlines()] == data["rows"]
    base, full, variant = data["rows"]
    others = [  # each would be taken, or lost, where one thing is not compared
        {**base, "model": {**base["model"], "device": "cuda (another card)"}},
        {**base, "settings": {**base["settings"], "r": 8}},
        {**base, "hardware": "another processor"},
        {**variant, "variant": "lora_xs"},
        {"note": "of no run"},
    ]
    old = {**base, "commit": "another"}  # measured again
    before = [json.dumps(row) for row in (full, *others, old, variant)]
    (out / "cost.jsonl").write_text("\n".join([*before, '{"variant": "cut o']))
    run(*options, "--variants", "antipasto", "--resume")
    again = json.loads((out / "cost.json").read_text())["rows"]
    assert again[1:] == [full, variant]
    assert again[0]["variant"] == BASE
    assert again[0]["milliseconds"] != base["milliseconds"]
    now = [json.loads(line) for line in (out / "cost.jsonl").read_text().splitlines()]
    assert now == [full, *others, variant, again[0]]


def test_rows_are_kept_only_for_the_same_settings_code_and_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, source = CostSettings("model"), dict.fromkeys(SAME, "this")
    path = tmp_path / "cost.jsonl"
    row = {"variant": BASE, "settings": vars(settings), **source, "model": {"device": "cuda (one card)"}}
    path.write_text(json.dumps(row) + "\n")
    rows = SavedRows(path, keep=True)
    assert rows.finished(settings, source) == [row]
    assert rows.finished(CostSettings("model", r=8), source) == []
    assert rows.finished(settings, {**source, "commit": "another"}) == []
    asked: list[str] = []
    for name, expected in {"cuda (one card)": {BASE: row}, "cuda (another card)": {}}.items():
        monkeypatch.setattr(cost, "_device_here", lambda device, name=name: asked.append(device) or name)
        assert cost._known([row], "auto") == expected
    assert asked == ["auto"] * 2
    assert cost._known([], "auto") == {}
    assert asked == ["auto"] * 2
    path.write_text(json.dumps({**row, "error": "failed"}) + "\n")
    assert SavedRows(path, keep=True).finished(settings, source) == []
    assert path.read_text()
    assert SavedRows(path).lines == []
    assert path.read_text() == ""


def test_a_row_replaces_those_of_its_variant_settings_and_device(tmp_path: Path) -> None:
    common = {"settings": {"r": 4}, "hardware": "this"}
    one, other = ({"variant": BASE, **common, "model": {"device": name}} for name in ("one card", "another card"))
    lost = {"variant": BASE, **common, "error": "start: killed"}
    rows = SavedRows(tmp_path / "cost.jsonl")
    for row in (one, other, lost, {**lost, "variant": FULL}):
        rows.put(row)
    rows.put({**lost, "error": "start: killed again"})  # which device it would have been is not known
    assert [json.loads(line).get("error") for line in rows.lines] == [
        None,
        None,
        "start: killed",
        "start: killed again",
    ]
    rows.put({**one, "commit": "newer"})
    assert [json.loads(line) for line in rows.lines] == [other, {**lost, "variant": FULL}, {**one, "commit": "newer"}]
    assert rows.path.read_text().splitlines() == rows.lines


@pytest.fixture(params=["forked", pytest.param("new", marks=pytest.mark.bench)])
def processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of the report as it starts them, which import everything again, or as forks of this one."""
    if request.param == "forked":
        monkeypatch.setattr(cost.subprocess, "Popen", ForkedCommand)
        monkeypatch.setattr(cost.subprocess, "run", run_forked)


@pytest.mark.usefixtures("processes")
def test_a_device_that_is_gone_is_told_when_a_run_is_taken_up_again() -> None:
    with pytest.raises(InputError, match=r"^there is no device 'nowhere' here: Expected one of"):
        cost._device_here("nowhere")
    assert cost._device_here("cpu").startswith("cpu (")


@pytest.mark.usefixtures("processes")
def test_a_killed_process_is_a_row() -> None:
    stages: list[str] = []
    row = cost.measured(CostSettings(f"{HERE}:deadly", r=4, repeats=1, device="cpu"), "antipasto", stages.append)
    assert row["error"] == "forward: the process was ended by SIGKILL, most likely out of memory"
    assert stages == ["loading", "initialisation", "adapter file", "forward"]
    assert row["file_bytes"] > 0
    assert record(row)["initialisation_ms"] > 0


def test_wrong_options_are_told_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(VariantError, match="did you mean 'antipasto'"):
        run("model", "--variants", "antipast")
    with pytest.raises(InputError, match="--resume needs --out"):
        run("model", "--resume")
    with pytest.raises(InputError, match="at least 1"):
        run("model", "--repeats", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the directory"):
        run("model", "--out", tmp_path / "file")


def test_a_model_or_a_device_that_is_not_there_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"cannot call {HERE}:nothing: AttributeError"):
        run(f"{HERE}:nothing", "--out", tmp_path)
    with pytest.raises(InputError, match=r"^there is no device 'meta' here: "):
        run(f"{HERE}:residual", "--device", "meta")


def test_spaces_around_names_of_variants_are_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(cost, "run", lambda settings, names, out, *, resume: asked.append(names))
    run("model", "--variants", "antipasto, lora_xs ")
    run("model")
    assert asked == [["antipasto", "lora_xs"], None]


def test_the_ratio_of_flops_is_called_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [measured(BASE), measured("lora_xs", lowering="lowrank")]
    assert speed(record(rows[1]))["FLOPs"] == f"{1 + rows[1]['macs'] / rows[1]['base_macs']:.2f}"
    shown = [markdown(rows)]
    monkeypatch.setattr(plt, "close", lambda figure: shown.extend(t.get_text() for t in figure.findobj(Text)))
    cost_figure([record(row) for row in rows], "title", tmp_path / "cost.png")
    assert shown[0].count("FLOPs") == 3  # a column for each of the two times, and a note
    assert "FLOPs over the base's, counted" in shown
    assert not [text for text in shown if "limit" in text]


def test_a_figure_of_rows_that_lack_something(tmp_path: Path) -> None:
    rows = [measured(BASE, "tests.support.zoo:mlp"), measured("sspace", "tests.support.zoo:mlp")]
    cost_figure([record(row) for row in rows], "title", tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 1000
