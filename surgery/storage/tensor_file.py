"""The tensor file of an adapter, also while another process replaces the adapter: the one its configuration names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from surgery.errors import AdapterError
from surgery.support.atomic_directory import kept_name
from surgery.support.untrusted_files import open_regular

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Config = dict[str, Any]
RETRIES = 3


class TensorFile:
    """A tensor file that was checked, and is held, so that no other one can be read in its place."""

    def __init__(self, folder: Path, digest: str, held: BinaryIO) -> None:
        self.folder, self.digest, self._held = folder, digest, held

    def close(self) -> None:
        """Let go of it."""
        self._held.close()

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        """Open it by safetensors, by its descriptor where that has a name, or under a name that it has now.

        Raises:
            AdapterError: it cannot be read, or was replaced where a descriptor has no name.
        """
        names = _names(self.folder, self.digest)
        try:
            with contextlib.ExitStack() as stack:
                yield self._open(stack, [Path(f"/dev/fd/{self._held.fileno()}"), *names])
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"cannot read {str(names[0])!r}: {type(error).__name__}: {error}") from error

    def _open(self, stack: contextlib.ExitStack, names: list[Path]) -> Any:
        for file in names:
            with contextlib.suppress(FileNotFoundError):
                if self._is_at(file):
                    try:
                        tensors = stack.enter_context(safe_open(file, framework="pt"))
                    except RuntimeError:  # what torch says of a file that is gone
                        if self._is_at(file):
                            raise
                    if self._is_at(file):  # still: what was opened is what was checked
                        return tensors
        raise AdapterError(f"the adapter in {str(self.folder)!r} was replaced while it was read; begin again")

    def _is_at(self, file: Path) -> bool:
        return os.path.samestat(os.fstat(self._held.fileno()), os.stat(file))


@contextlib.contextmanager
def settled(path: Path, read_config: Callable[[Path], Config]) -> Iterator[tuple[Config, TensorFile]]:
    """The configuration of an adapter and its tensors, of one adapter also where a writer comes between.

    Args:
        read_config: reads and checks the configuration.

    Raises:
        AdapterError: the directory is missing or damaged.
    """
    config, left = read_config(path), RETRIES
    while (file := _find(path, config["tensors_sha256"], last=not left)) is None:
        before, config = config, read_config(path)
        left = RETRIES if config != before else left - 1
    with contextlib.closing(file):
        yield config, file


def _names(folder: Path, digest: str) -> list[Path]:
    final = folder / TENSORS
    if not re.fullmatch("[0-9a-f]{64}", digest):
        return [final]
    return [final, folder / kept_name(TENSORS, digest), final]  # a writer that gives up renames the second to the first


def _find(folder: Path, digest: str, *, last: bool) -> TensorFile | None:
    """The file with the digest; where there is none, the reason is raised in the last attempt."""
    final = folder / TENSORS
    for file in _names(folder, digest):
        try:
            held = open_regular(file)
        except OSError as error:
            if last and file == final:
                raise AdapterError(f"cannot read {str(file)!r}: {type(error).__name__}: {error}") from error
            continue
        try:
            if hashlib.file_digest(held, "sha256").hexdigest() == digest:
                return TensorFile(folder, digest, held)
        except BaseException:
            held.close()
            raise
        held.close()
    if last:
        raise AdapterError(f"{str(final)!r} is damaged or not the one that {CONFIG} was written with")
    return None
