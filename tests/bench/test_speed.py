"""The speed matrix: what is timed is right, what is wrong is not timed, and runs are taken up again."""

from __future__ import annotations

import dataclasses
import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache

from bench.common import results_store as rows
from bench.common.timing import settled
from bench.speed import contenders as speed_contenders
from bench.speed import matrix as speed
from bench.speed.check import Answer, errors
from bench.speed.contenders import BASE, BESIDE, CONTENDERS, HOOKS, PEERS
from bench.speed.matrix import SpeedSettings, cells, run

QUICK = {"config": "tiny", "layers": 1, "r": 8, "tokens": 6, "repeats": 3, "cell_seconds": 0.0}


@pytest.fixture(autouse=True)
def _machine(monkeypatch: Any) -> None:
    """Ceilings are measured in a test of their own."""
    monkeypatch.setattr(speed, "ceilings", lambda *args: {"flops_per_second": 1e11, "bytes_per_second": 1e10})


def settings(out: Path, **changed: Any) -> SpeedSettings:
    return SpeedSettings(out=out, **{**QUICK, **changed})


def measured(given: SpeedSettings, right: bool = True) -> dict[tuple[str, str, str], dict[str, Any]]:
    assert run(given, say=lambda text: None) is right
    return {(row["runtime"], row["shape"], row["contender"]): row for row in rows.read(given.out)}


@pytest.mark.bench
def test_every_contender_agrees_with_its_reference_and_is_timed(tmp_path: Path) -> None:
    found = measured(settings(tmp_path / "speed.jsonl", runtimes=("eager",), shapes=("prefill", "training")))
    assert {name for _, shape, name in found if shape == "prefill"} == set(CONTENDERS) - {BESIDE}
    assert {name for _, shape, name in found if shape == "training"} == set(CONTENDERS) - {BESIDE, "merged"}
    for (_, shape, name), row in found.items():
        assert row["status"] == "ok", (shape, name, row)
        assert max(row["errors"].values()) < 1e-4
        assert ("gradient of the adapter" in row["errors"]) == (shape == "training" and name != BASE)
        for entry in ("milliseconds", "base_milliseconds", "ratio"):
            assert 0 < row[entry]["q1"] <= row[entry]["median"] <= row[entry]["q3"]
        assert row["minimum_ms"] > 0
        assert row["first_seconds"] >= 0
        assert row["commit"]
        assert row["versions"]["peft"]
    of = {name: row for (_, shape, name), row in found.items() if shape == "prefill"}
    assert of["merged"]["flops"] == of[BASE]["flops"] < of["live lowrank"]["flops"]
    assert of["merged"]["bytes"] == of[BASE]["bytes"] < of["live output"]["bytes"] < of["live lowrank"]["bytes"]


@pytest.mark.parametrize("name", [HOOKS, "live lowrank", "PiSSA"])
def test_a_dropped_adapter_is_reported_and_not_timed(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    original = speed_contenders.Makers.make

    def dropped(self: Any, name: str, x: Any, *, training: bool) -> Any:
        made = original(self, name, x, training=training)
        if name == BASE:
            return made
        base = original(self, BASE, x, training=training).model
        return dataclasses.replace(made, model=base, trained={})

    monkeypatch.setattr(speed_contenders.Makers, "make", dropped)
    chosen = {"runtimes": ("eager",), "shapes": ("prefill",), "contenders": (BASE, name)}
    found = measured(settings(tmp_path / "speed.jsonl", **chosen), right=False)
    row = found["eager", "prefill", name]
    assert row["status"] == "wrong"
    assert measured(settings(tmp_path / "speed.jsonl", **chosen), right=False) == found  # it still is, unmeasured
    assert row["errors"]["output"] == pytest.approx(1, abs=1e-3)
    assert "milliseconds" not in row
    assert found["eager", "prefill", BASE]["status"] == "ok"


@pytest.mark.bench
@pytest.mark.parametrize("shape", ["prefill", "training"])
def test_hooks_dropped_by_the_compiler_are_caught_and_ones_own_code_keeps_them(shape: str, tmp_path: Path) -> None:
    """Dynamo's own trap, so that its cheapest backend shows it."""
    contenders = (BASE, "live lowrank", HOOKS, BESIDE)
    given = settings(tmp_path / "a", runtimes=("compile",), shapes=(shape,), contenders=contenders, backend="aot_eager")
    found = measured(given)
    assert found["compile", shape, BESIDE]["status"] == "wrong"
    assert found["compile", shape, BESIDE]["errors"]["output"] > 0.5
    assert "milliseconds" not in found["compile", shape, BESIDE]
    for name in (BASE, "live lowrank", HOOKS):
        assert found["compile", shape, name]["status"] == "ok", found["compile", shape, name]


@pytest.mark.bench
def test_what_is_made_again_for_another_runtime_is_the_same(tmp_path: Path) -> None:
    """One reference of a family serves all runtimes, so that an adapter must not start from other random numbers."""
    chosen = {"runtimes": ("eager", "compile"), "shapes": ("decode 1",), "contenders": PEERS, "backend": "eager"}
    found = {row["status"] for row in measured(settings(tmp_path / "a", **chosen)).values()}
    assert found - {"absent"} == {"ok"}  # older releases of PEFT have no PSOFT


def test_errors_are_over_the_adapters_effect() -> None:
    base, effect = torch.ones(8, dtype=torch.float64), 1e-3 * torch.ones(8, dtype=torch.float64)
    reference, plain = Answer(base + effect), Answer(base)
    assert errors(plain, reference, plain) == {"output": pytest.approx(1)}
    assert errors(reference, reference, plain) == {"output": 0}
    assert errors(plain, reference, plain, effective=False)["output"] == pytest.approx(1e-3, rel=1e-2)
    assert errors(Answer(base[:4]), reference, plain)["output"] == float("inf")
    with_gradient = Answer(base, base, {"g": base})
    assert errors(with_gradient, Answer(base, base, {"h": base}), plain, False)["gradient of the adapter"] == float(
        "inf"
    )


@pytest.mark.bench
def test_inductors_code_is_checked_and_timed(tmp_path: Path) -> None:
    chosen = {"runtimes": ("compile",), "shapes": ("prefill",), "contenders": ("live lowrank",)}
    with fresh_cache():  # what an earlier run has compiled would be loaded
        row = measured(settings(tmp_path / "a", **chosen))["compile", "prefill", "live lowrank"]
    assert row["status"] == "ok"
    assert row["first_seconds"] > 0.5  # the compilation is apart from what is timed
    assert row["milliseconds"]["median"] < 500


@pytest.mark.full
@pytest.mark.parametrize("runtime", ["compile", "aoti", "onnx"])
def test_every_runtime_is_right(runtime: str, tmp_path: Path) -> None:
    shapes = ("prefill", "training") if runtime == "compile" else ("prefill", "decode 1")
    found = measured(settings(tmp_path / "a", runtimes=(runtime,), shapes=shapes))
    wrong = {cell[2] for cell, row in found.items() if row["status"] == "wrong"}
    assert wrong == ({BESIDE} if runtime == "compile" else set())
    assert all(row["status"] == "ok" for cell, row in found.items() if cell[2] != BESIDE)


@pytest.mark.bench
def test_a_run_is_taken_up_again(tmp_path: Path) -> None:
    out = tmp_path / "speed.jsonl"
    chosen = {"runtimes": ("eager",), "shapes": ("decode 1",), "contenders": (BASE, "LoRA")}
    said: list[str] = []
    assert run(settings(out, **chosen, minutes=1e-9), said.append)
    assert rows.read(out) == []
    assert "the time is up: 2 cells are left" in said[-1]
    first = measured(settings(out, **chosen))
    assert len(first) == 2
    assert measured(settings(out, **chosen)) == first
    more = measured(settings(out, **chosen | {"contenders": (BASE, "LoRA", "merged")}))
    assert {cell: row for cell, row in more.items() if cell in first} == first
    other = settings(out, **{**chosen, "r": 4})
    run(other, said.append)
    assert len(rows.read(out)) == 5
    store = rows.Store(out, rows.read(out))
    row = {**next(iter(store.rows.values())), "status": "failed", "reason": "killed"}
    store.put(row)
    assert not rows.Store(out, rows.read(out)).finished(row)
    measured(settings(out, **chosen))
    assert all(row["status"] == "ok" for row in rows.read(out))


def test_nothing_is_built_where_nothing_is_left_or_the_time_is_up(tmp_path: Path, monkeypatch: Any) -> None:
    chosen = {"runtimes": ("eager",), "shapes": ("decode 1",), "contenders": (BASE,)}
    said: list[str] = []
    measured(settings(tmp_path / "a", **chosen))
    built, clock = [], [0.0]
    monkeypatch.setattr(speed.time, "monotonic", lambda: clock[0])

    class Slow(speed.Matrix):
        def __init__(self, *args: Any) -> None:
            built.append(self)
            clock[0] += 90

        def measure(self, *cell: str) -> dict[str, Any]:
            raise AssertionError("after the deadline")

    monkeypatch.setattr(speed, "Matrix", Slow)
    assert run(settings(tmp_path / "a", **chosen), said.append)
    assert said == [f"0 cells to measure, 1 there already: {tmp_path / 'a'}"]
    assert run(settings(tmp_path / "b", **chosen, minutes=0.0), said.append)
    assert not built
    assert run(settings(tmp_path / "b", **chosen, minutes=1.0), said.append)
    assert len(built) == 1
    assert "the time is up: 1 cells are left" in said[-1]


@pytest.mark.bench
def test_what_was_measured_otherwise_is_measured_anew(tmp_path: Path, monkeypatch: Any) -> None:
    chosen = {"runtimes": ("compile",), "shapes": ("decode 1",), "contenders": (BASE,), "backend": "eager"}
    monkeypatch.setattr(speed, "timed", lambda *args: {"milliseconds": spread(1.0), "ratio": spread(1.0)})
    said: list[str] = []

    def counted(**changed: Any) -> str:
        assert run(settings(tmp_path / "a", **chosen | changed), said.append)
        return next(text for text in reversed(said) if "to measure" in text).partition(":")[0]

    new, old = "1 cells to measure, 0 there already", "0 cells to measure, 1 there already"
    assert counted() == new
    (row,) = rows.read(tmp_path / "a")
    assert (row["cell_seconds"], row["backend"]) == (0.0, "eager")
    assert counted() == old
    assert counted(cell_seconds=0.1) == counted() == counted(backend="aot_eager") == counted() == new
    assert counted(again=True) == new
    original = speed.environment
    monkeypatch.setattr(speed, "environment", lambda: original() | {"commit": "another"})
    assert counted() == old
    monkeypatch.setattr(speed, "environment", lambda: original() | {"versions": {"torch": "9"}})
    assert counted() == new
    assert len(rows.read(tmp_path / "a")) == 1


def spread(middle: float) -> dict[str, float]:
    return {"q1": middle, "median": middle, "q3": middle, "n": 3}


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_runtime_that_is_not_installed_is_absent(package: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    chosen = {"runtimes": ("onnx",), "shapes": ("decode 1",), "contenders": (BASE,)}
    row = measured(settings(tmp_path / "a", **chosen))["onnx", "decode 1", BASE]
    assert (row["status"], row["reason"]) == ("absent", f"not installed: {package}")


def test_there_are_no_cells_of_onnx_in_bfloat16(tmp_path: Path) -> None:
    for dtype, some in (("bfloat16", False), ("float16", True), ("float32", True)):
        assert bool(list(cells(settings(tmp_path / "a", runtimes=("onnx",), dtype=dtype)))) is some


@pytest.mark.bench
def test_a_cell_that_fails_says_why_and_the_others_go_on(tmp_path: Path, monkeypatch: Any) -> None:
    original = speed.prepare

    def broken(runtime: str, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if hasattr(model, "peft_config") or any("lora" in name for name, _ in model.named_parameters()):
            raise RuntimeError("no such kernel")
        return original(runtime, model, *args, **kwargs)

    monkeypatch.setattr(speed, "prepare", broken)
    chosen = {"runtimes": ("eager",), "shapes": ("decode 1",), "contenders": (BASE, "LoRA", "merged")}
    assert not run(settings(tmp_path / "a", **chosen), lambda text: None)
    found = {row["contender"]: row for row in rows.read(tmp_path / "a")}
    assert found["LoRA"]["reason"] == "RuntimeError: no such kernel"
    assert {found[name]["status"] for name in (BASE, "merged")} == {"ok"}


def test_what_peft_lacks_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    import peft

    monkeypatch.delattr(peft, "PsoftConfig")
    chosen = {"runtimes": ("eager",), "shapes": ("decode 1",), "contenders": ("PSOFT",)}
    row = measured(settings(tmp_path / "a", **chosen))["eager", "decode 1", "PSOFT"]
    assert row["status"] == "absent"
    assert "has no PSOFT" in row["reason"]


def test_the_most_important_cells_come_first(tmp_path: Path) -> None:
    order = list(cells(settings(tmp_path / "a", runtimes=("eager", "compile", "aoti", "onnx"))))
    assert order[:2] == [("eager", "prefill", BASE), ("eager", "prefill", "live auto")]
    assert order.index(("compile", "prefill", "LoRA")) < order.index(("eager", "prefill", "PSOFT"))
    assert not any(shape == "training" for runtime, shape, _ in order if runtime in ("aoti", "onnx"))
    assert not any(name in PEERS for runtime, _, name in order if runtime in ("aoti", "onnx"))


def test_what_another_has_frozen_stays_frozen() -> None:
    gc.freeze()
    with settled():
        made: list[Any] = [[]]
    assert gc.get_freeze_count()
    gc.unfreeze()
    with settled():
        assert gc.get_freeze_count()
        assert not any(each is made for each in gc.get_objects())
    assert not gc.get_freeze_count()
    gc.freeze()
