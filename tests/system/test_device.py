"""The tests of ``tests/device``, in a process of their own: their device is one of the whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.parametrize("which", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_on_a_stand_in_for_an_accelerator(which: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "DEVICE"))}
    command = [sys.executable, "-m", "pytest", "tests/device", "-m", which, "-p", "no:cacheprovider"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert " skipped" not in found.stdout
