"""The speed matrix: what is timed is right, what is wrong is not timed, and runs are taken up again."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import rows, speed, speed_contenders
from bench.__main__ import main
from bench.speed import Settings, cells, run
from bench.speed_check import Answer, errors
from bench.speed_contenders import BASE, BESIDE, CONTENDERS, HOOKS, PEERS
from bench.speed_limits import ceilings, minimum_ms, work
from bench.speed_model import CONFIGS

ROOT = Path(__file__).parent.parent
QUICK = {"config": "tiny", "layers": 1, "r": 8, "tokens": 6, "repeats": 3, "cell_seconds": 0.0}


@pytest.fixture(autouse=True)
def _machine(monkeypatch: Any) -> None:
    """Ceilings are measured in a test of their own."""
    monkeypatch.setattr(speed, "ceilings", lambda *args: {"flops_per_second": 1e11, "bytes_per_second": 1e10})


def settings(out: Path, **changed: Any) -> Settings:
    return Settings(out=out, **{**QUICK, **changed})


def measured(given: Settings) -> dict[tuple[str, str, str], dict[str, Any]]:
    assert run(given, say=lambda text: None)
    return {(row["runtime"], row["shape"], row["contender"]): row for row in rows.read(given.out)}


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
    found = measured(settings(tmp_path / "speed.jsonl", **chosen))
    row = found["eager", "prefill", name]
    assert row["status"] == "wrong"
    assert row["errors"]["output"] == pytest.approx(1, abs=1e-3)
    assert "milliseconds" not in row
    assert found["eager", "prefill", BASE]["status"] == "ok"


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


def test_inductors_code_is_checked_and_timed(tmp_path: Path) -> None:
    chosen = {"runtimes": ("compile",), "shapes": ("prefill",), "contenders": ("live lowrank",)}
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


def test_the_limit_counts_products_and_every_tensor_once() -> None:
    linear, x = nn.Linear(32, 48, bias=False), torch.randn(8, 32)

    def forward() -> None:
        with torch.no_grad():
            linear(linear(x)[:, :32])  # the weight is read twice, and counts once

    found = work(forward, torch.empty(8, 48), torch.device("cpu"))
    assert found == {"flops": 2 * 2 * 8 * 32 * 48, "bytes": 4 * (32 * 48 + 8 * 32 + 8 * 48)}
    machine = {"flops_per_second": 1e9, "bytes_per_second": 1e9}
    assert minimum_ms({"flops": 10**6, "bytes": 10**3}, machine) == pytest.approx(1)
    assert minimum_ms({"flops": 10**3, "bytes": 10**7}, machine) == pytest.approx(10)


def test_ceilings_are_those_of_a_machine() -> None:
    found = ceilings(CONFIGS["tiny"], 64, torch.device("cpu"), torch.float32, repeats=1)
    assert 1e7 < found["flops_per_second"] < 1e15
    assert 1e7 < found["bytes_per_second"] < 1e14


def test_wrong_options_are_named(tmp_path: Path, capsys: Any) -> None:
    for option, value, word in (("--runtimes", "eager,tpu", "tpu"), ("--config", "gpt-9", "gpt-9"),
                                ("--contenders", "LoRAX", "LoRAX"), ("--repeats", "2", "repeats")):  # fmt: skip
        assert main(["speed", "--out", str(tmp_path / "a"), option, value]) == 2
        said = capsys.readouterr().err
        assert said.startswith("InputError")
        assert word in said
    assert not (tmp_path / "a").exists()
    assert set(CONFIGS) >= {"tiny", "qwen3-0.6b-layer", "qwen3-0.6b", "qwen3-4b"}


@pytest.mark.full
def test_the_gpu_script_runs_its_stages_and_is_taken_up_again(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    script = ["bash", str(ROOT / "bench" / "gpu.sh"), "--dry-run"]
    for todo in ("20 cells to measure, 0 there already", "0 cells to measure, 20 there already"):
        done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert todo in done.stdout
    found = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert {row["status"] for row in found} == {"ok"}
    assert len(found) == 26
