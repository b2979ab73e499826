"""Text that every machine with Python already has, as bytes and as windows of byte tensors."""

import math
import os
import sysconfig
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

SOURCE_LIMIT = 4_700_000
BLOCK = 4096
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}


def python_source() -> bytes:
    """Return the standard library's own Python source, at most about 4.7 MB.

    Top-level modules come first and packages fill what is left, each in sorted order: sorting by path alone
    would spend a large part of the limit on the character tables of ``encodings``. Tests and files generated
    when Python was built are left out, so that the text depends on the Python version and little else.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, subfolders, names in os.walk(root):
        # Pruned here rather than filtered later: site-packages can hold a hundred times the files of the library.
        subfolders[:] = [name for name in subfolders if not name.startswith("config-") and name not in _SKIPPED_FOLDERS]
        modules = [name for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")]
        paths += [(Path(folder) / name).relative_to(root) for name in modules]
    source = bytearray()
    for path in sorted(paths, key=lambda path: (len(path.parts) > 1, path.as_posix())):
        source += (root / path).read_bytes()
        if len(source) >= SOURCE_LIMIT:
            break
    if not source:
        raise ValueError(f"found no Python source under {root}; need the standard library as *.py files")
    return bytes(source[:SOURCE_LIMIT])


def english() -> bytes:
    """Return the prose of Python's language reference, about 0.5 MB.

    It is the text behind ``help("topics")``, joined in sorted order of the topics.
    """
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def from_file(path: str | Path) -> bytes:
    """Return the bytes of a file, for text of one's own."""
    return Path(path).read_bytes()


def split(data: bytes, held_out: float = 0.1) -> tuple[Tensor, Tensor]:
    """Split text into a training part and a held-out part, both uint8 tensors.

    Whole blocks of 4 KB are held out at regular intervals (every 10th for 0.1), so that the held-out text is
    unseen and yet of the same mixture. The last, shorter block belongs to whichever part its turn falls to.

    Raises:
        ValueError: if ``held_out`` is not between 0 and 1, or the text has too few blocks to fill both parts.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, got {held_out}")
    # The small term keeps 10 * 0.1 from rounding to just below 1.
    turns = [int(index * held_out + 1e-9) for index in range(-(-len(data) // BLOCK) + 1)]
    is_held_out = [after > before for before, after in pairwise(turns)]
    if all(is_held_out) or not any(is_held_out):
        raise ValueError(
            f"text too short to split: found {len(data)} bytes, or {len(is_held_out)} blocks of {BLOCK}; "
            f"holding out {held_out} needs at least {math.ceil(1 / held_out)} blocks"
        )
    blocks = torch.frombuffer(bytearray(data), dtype=torch.uint8).split(BLOCK)
    train = torch.cat([block for block, held in zip(blocks, is_held_out, strict=True) if not held])
    return train, torch.cat([block for block, held in zip(blocks, is_held_out, strict=True) if held])


def batches(data: Tensor, *, batch: int, length: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield ``steps`` LongTensors (batch, length) of windows at random places, the same for the same seed.

    Raises:
        ValueError: if the text is shorter than one window.
    """
    _require(data, length, f"one window of {length} bytes")
    return _random_batches(data, batch, length, steps, seed)


def windows(data: Tensor, *, batch: int, length: int, count: int) -> Iterator[Tensor]:
    """Yield ``count`` evenly spaced windows that do not overlap, as LongTensors of up to ``batch`` rows.

    Raises:
        ValueError: if no windows are asked for, or the text is too short for that many.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    _require(data, count * length, f"{count} windows of {length} bytes")
    starts = torch.arange(count) * (len(data) // count)
    return (_gather(data, part, length) for part in starts.split(batch))


def _require(data: Tensor, needed: int, what: str) -> None:
    if len(data) < needed:
        raise ValueError(f"text too short: found {len(data)} bytes, need at least {needed} for {what}")


def _random_batches(data: Tensor, batch: int, length: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield _gather(data, torch.randint(len(data) - length + 1, (batch,), generator=generator), length)


def _gather(data: Tensor, starts: Tensor, length: int) -> Tensor:
    return data[starts[:, None] + torch.arange(length)].long()
