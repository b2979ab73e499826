"""Where torch's archives are written to, so that a full disk is an error: its own writer would end the process."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


class _Sink(io.RawIOBase):
    """Takes everything, and remembers the first failure for after the writer is done."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0  # asked for when all is written, and nothing is read here

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


@contextlib.contextmanager
def archive(path: Path) -> Iterator[Any]:
    """Open a file for torch's archive writer.

    Raises:
        OSError: the disk does not take it.
    """
    with open(path, "wb") as file:
        sink = _Sink(file)
        yield sink
        if sink.error is not None:
            raise sink.error
