"""Where torch's archives are written to: its own writer ends the process if a full disk or an interrupt stops it. So
errors of the disk are told when it is done, and interrupts wait for it."""

from __future__ import annotations

import contextlib
import io
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


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

    def write(self, data: ReadableBuffer) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


@contextlib.contextmanager
def archive(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for torch's archive writer.

    Raises:
        OSError: the disk does not take it.
    """
    with open(path, "wb") as file, _interrupts_wait():
        sink = _Sink(file)
        yield sink  # type: ignore[misc]
        if sink.error is not None:
            raise sink.error


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Handle an interrupt after the block; they only come to the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if seen and callable(before):
        before(*seen[0])
