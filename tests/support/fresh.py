"""Run code in a fresh process that has torch and safetensors, and neither this library nor transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"surgery", "passes", "exporters", "bench", "tests", "transformers"}:
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Block())
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
torch.set_grad_enabled(False)
"""


def run_fresh(code: str, folder: Path) -> None:
    """Run code in ``folder``, which holds what it reads and gets what it writes."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCK + code], cwd=folder, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
