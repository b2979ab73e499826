"""The accelerator of these tests: ``DEVICE=cuda`` takes a real one, by default a stand-in is compiled.

The stand-in, ``accelerator.cpp``, computes on the CPU, and refuses what mixes its tensors with those of the CPU. It is
a device of the whole process, so that these tests run in one of their own: ``tests/system/test_device.py``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.device_models import NAME


def _stand_in(name: str) -> None:
    """Compile the stand-in, and make it known to torch."""
    torch_in = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "accelerator.so"
        headers = [f"-I{torch_in / 'include'}", f"-I{torch_in / 'include/torch/csrc/api/include'}"]
        source = Path(__file__).with_name("accelerator.cpp")
        linked = [f"-L{torch_in / 'lib'}", "-ltorch_cpu", "-lc10"]
        command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-std=c++20", "-w", "-o", library, source]
        subprocess.run([*command, *headers, *linked], check=True)
        torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(name)
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "_is_in_bad_fork": lambda: False, "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=0: torch.empty(0, dtype=torch.uint8),
        "set_rng_state": lambda state, device=0: None, "synchronize": lambda device=None: None,
        "device": lambda device: contextlib.nullcontext(),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    }  # fmt: skip
    torch._register_device_module(name, types.SimpleNamespace(**answers))
    torch.utils.generate_methods_for_privateuse1_backend()


if NAME == "standin":
    _stand_in(NAME)
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # they are compared as float32


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the models are."""
    return torch.device(NAME, 0)
