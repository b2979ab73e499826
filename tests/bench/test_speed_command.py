"""The speed matrix's command, the machine's ceilings, and the script for a GPU."""

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
from torch.utils._python_dispatch import TorchDispatchMode

from bench.__main__ import main
from bench.common.paired_timing import repeated
from bench.models.decoder import CONFIGS
from bench.speed import matrix as speed
from bench.speed.matrix import SpeedSettings
from bench.speed.roofline import LARGE, ceilings, minimum_ms, work

ROOT = Path(__file__).parents[2]


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


def test_a_slow_launch_hardly_lowers_the_ceilings(monkeypatch: Any) -> None:
    """A device that does 1e12 FLOPs and moves 1e12 bytes a second, and takes 1 ms to begin and end with each sample."""
    monkeypatch.setitem(LARGE, "cpu", 2**20)
    clock = [0.0]

    def multiply(a: torch.Tensor, b: torch.Tensor) -> None:
        clock[0] += 2 * a.shape[0] * a.shape[1] * b.shape[1] / 1e12

    def fake(run: Any, device: torch.device) -> float:
        clock[0] = 0.0
        before, copies = clock[0], Counting()
        with copies:
            run()
        return 1 + 1000 * (clock[0] - before + copies.bytes / 1e12)

    class Counting(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.bytes += sum(t.nbytes for t in args if isinstance(t, torch.Tensor))
            return args[0]  # nothing is done

    found = ceilings(CONFIGS["tiny"], 64, torch.device("cpu"), torch.float32, 2, multiply=multiply, time=fake)
    assert 0.94e12 < found["flops_per_second"] < 1e12
    assert 0.94e12 < found["bytes_per_second"] < 1e12


def test_the_ceilings_are_the_best_of_what_was_tried() -> None:
    """A head is multiplied faster than the MLP, as far as memory allows, and reading is faster than copying."""
    widths = set()

    def multiply(a: torch.Tensor, b: torch.Tensor) -> float:
        widths.add(b.shape[1])
        return 2.0 * a.shape[0] * a.shape[1] * b.shape[1] / (1e9 if b.shape[1] > 96 else 1e8)

    def fake(run: Any, device: torch.device) -> float:
        what = run.__closure__[1].cell_contents  # the one run of those repeated
        assert repeated(what, 1).__code__ is run.__code__
        result = what()
        seconds = result if isinstance(result, float) else 2.0 if result.dim() else 0.5
        return 1000.0 * seconds * run.__closure__[0].cell_contents

    sizes = dataclasses.replace(CONFIGS["tiny"], vocabulary=10**9)
    found = ceilings(sizes, 64, torch.device("cpu"), torch.float32, 1, multiply=multiply, time=fake)
    assert widths == {96, LARGE["cpu"] // (4 * (64 + 64))}
    assert found["flops_per_second"] == pytest.approx(1e9)
    assert found["bytes_per_second"] == pytest.approx(LARGE["cpu"] / 0.5)


def test_wrong_options_are_named(tmp_path: Path, capsys: Any) -> None:
    for option, value, word in (("--runtimes", "eager,tpu", "tpu"), ("--config", "gpt-9", "gpt-9"),
                                ("--contenders", "LoRAX", "LoRAX"), ("--repeats", "2", "repeats"),
                                ("--config", "tiny,qwen3-4b", "tiny,qwen3-4b"), ("--device", "foo", "foo"),
                                ("--device", "cuda:99", "cuda:99"), ("--minutes", "0", "minutes"),
                                ("--minutes", "nan", "minutes"), ("--cell-seconds", "-1", "cell-seconds")):  # fmt: skip
        assert main(["speed", "--out", str(tmp_path / "a"), option, value]) == 2
        said = capsys.readouterr().err
        assert said.startswith("InputError")
        assert word in said
    assert main(["speed", "--config", "gpt-9", "--config", "tiny"]) == 2  # also where another takes its place
    assert not (tmp_path / "a").exists()
    assert set(CONFIGS) >= {"tiny", "qwen3-0.6b-layer", "qwen3-0.6b", "qwen3-4b"}


@pytest.mark.full
def test_the_gpu_script_runs_its_stages_and_is_taken_up_again(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    script = ["bash", str(ROOT / "bench" / "gpu.sh"), "--dry-run"]
    for todo in ("4 cells to measure, 0 there already", "0 cells to measure, 4 there already"):
        done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert todo in done.stdout
        assert done.stdout.count("cells to measure") == 5
    found = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert {row["status"] for row in found} == {"ok"}
    assert {row["runtime"] for row in found} == {"eager", "compile", "max-autotune"}
    assert len(found) == 12


@pytest.mark.full
def test_the_gpu_script_ends_in_time_whatever_its_stages_do(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ntrap '' INT\nwhile :; do sleep 1; done\n")
    python.chmod(0o755)
    script = ["bash", str(ROOT / "bench" / "gpu.sh")]
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": str(python), "SECONDS_IN_ALL": "21"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=21 + 30 + 20, check=False)
    assert done.returncode == 1
    assert done.stdout.count("no time is left") == 4
    assert int(done.stdout.split("done at ")[1].split()[0]) <= 21 + 30  # so that 490 end within 540


def stages(folder: Path, *arguments: str, status: int = 0) -> list[list[str]]:
    """What the GPU script asks of Python, stage by stage, where all end with a status; the script ends with it too."""
    (folder / "asked").write_text("")
    python = folder / "python"
    python.write_text(f"#!/bin/sh\nshift 2\nprintf '%s\\n' \"$@\" '' >> '{folder}/asked'\nexit {status}\n")
    python.chmod(0o755)
    environment = {**os.environ, "OUT": str(folder), "PYTHON": str(python)}
    script = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    assert subprocess.run(script, env=environment, capture_output=True, timeout=3600, check=False).returncode == status
    return [stage.splitlines() for stage in (folder / "asked").read_text().rstrip("\n").split("\n\n")]


def test_the_dry_run_of_the_gpu_script_reads_every_argument_of_every_stage(tmp_path: Path, monkeypatch: Any) -> None:
    given: list[SpeedSettings] = []
    monkeypatch.setattr(speed, "run", lambda settings: not given.append(settings))  # type: ignore[func-returns-value]
    real, dry = stages(tmp_path), stages(tmp_path, "--dry-run")
    stages(tmp_path, "--dry-run", status=1)
    assert len(real) == len(dry) == 5
    for of_gpu, of_cpu in zip(real, dry, strict=True):
        same = [i for i, value in enumerate(of_gpu) if of_gpu[i - 1] != "--minutes"]  # which the clock decides
        assert [of_cpu[i] for i in same] == [of_gpu[i] for i in same]
        assert main(of_cpu) == 0
        for i in same[1:]:
            if of_gpu[i - 1] != "--out":
                try:
                    broken = main([*of_cpu[:i], f"{of_cpu[i]}x", *of_cpu[i + 1 :]])
                except SystemExit as stop:  # of argparse
                    broken = int(stop.code or 0)
                assert broken == 2 or of_gpu[i - 1] == "--device", of_cpu[i]
    assert {(s.device, s.config, s.layers) for s in given} == {("cpu", "tiny", 1)}
    assert [s.runtimes for s in given if s.runtimes == ("aoti",)]
