"""Safetensors files, read and written one tensor at a time.

The format: eight bytes with the length of the header, little-endian; the header, JSON that gives each tensor's dtype,
shape and place; the data. Tensors are read with plain reads and not from a mapping of the file, whose pages would count
as memory of the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from surgery.errors import ExportError
from surgery.support.untrusted_files import parse_json, require_regular

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 2**22
MOST = 2**48  # of a size: an empty tensor may state any


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its dtype by safetensors' name, its shape, and its place among the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class SafetensorsFile:
    """The header of a file, or of one that is to be written."""

    path: Path
    header: bytes
    entries: Mapping[str, Entry]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return 8 + len(self.header) + max((entry.stop for entry in self.entries.values()), default=0)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ExportError: its dtype is not one of a weight.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ExportError(f"tensor {name!r} of {str(self.path)!r} has dtype {entry.dtype}, expected {_known()}")
        data = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(8 + len(self.header) + entry.start)
            view, done = memoryview(data.numpy().data), 0
            while done < len(view):
                n = file.readinto(view[done:])
                if not n:
                    raise ExportError(f"{str(self.path)!r} ends within tensor {name!r}")
                done += n
        return data.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def write(self, file: BinaryIO, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place in the file."""
        entry = self.entries[name]
        assert (DTYPES[entry.dtype], entry.shape) == (tensor.dtype, tuple(tensor.shape)), name
        file.seek(8 + len(self.header) + entry.start)
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def begin(self, path: Path, base: SafetensorsFile, copies: Mapping[str, str]) -> None:
        """Make the file in its full size, with some tensors copied from another; ``copies`` gives their names there."""
        with open(path, "wb") as file, open(base.path, "rb") as source:
            file.write(len(self.header).to_bytes(8, "little") + self.header)
            file.truncate(self.size)
            for name, original in copies.items():
                there, here = base.entries[original], self.entries[name]
                source.seek(8 + len(base.header) + there.start)
                file.seek(8 + len(self.header) + here.start)
                left = there.stop - there.start
                while left:
                    data = source.read(min(CHUNK, left))
                    if not data:
                        raise ExportError(f"{str(base.path)!r} ends within tensor {original!r}")
                    file.write(data)
                    left -= len(data)
            sync(file)

    def extended(self, extra: Mapping[str, Entry]) -> SafetensorsFile:
        """The same file with more tensors behind the present ones; the places in ``extra`` are not regarded."""
        if not extra:
            return self
        header: dict[str, object] = json.loads(self.header)
        entries, end = dict(self.entries), self.size - 8 - len(self.header)
        for name, entry in extra.items():
            entries[name] = Entry(entry.dtype, entry.shape, end, end + entry.stop - entry.start)
            end = entries[name].stop
            offsets = [entries[name].start, end]
            header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        return SafetensorsFile(self.path, text + b" " * (-len(text) % 8), entries)


def read_header(path: Path) -> SafetensorsFile:
    """Read and check the header of a file.

    Raises:
        ExportError: it is not a valid safetensors file, or cannot be read.
    """
    try:
        require_regular(path)
        with safe_open(path, framework="pt"):  # checks that the places fit the file and each other
            pass
        with open(path, "rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        content = parse_json(header)
        if any(size > MOST for entry in content.values() for size in entry.get("shape", ())):
            raise ValueError("a tensor has a size that no tensor can have")
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"cannot read {str(path)!r}: {error}") from error
    entries = {
        name: Entry(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        for name, entry in content.items()
        if name != "__metadata__"
    }
    return SafetensorsFile(path, header, entries)


def sync(file: BinaryIO) -> None:
    """Have what was written on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _known() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
