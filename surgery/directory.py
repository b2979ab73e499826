"""Files that are put into a folder whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path


def write_directory(path: Path, files: dict[str, bytes]) -> None:
    """Write files into a directory, whole or not at all, the last one last; a new directory appears with all of them.

    Raises:
        OSError: nothing is changed. Should the process be killed between the two renames over an existing adapter, the
            new tensors stand beside the old configuration, whose digest then does not fit, and a reader refuses.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path if path.is_dir() else path.parent  # on the same file system as the result
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{path.name}.") as temporary:
        staging = Path(temporary) / "files"
        staging.mkdir()
        for name, data in files.items():
            with open(staging / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if path.exists():
            move_files(staging, path, list(files))
        else:
            os.rename(staging, path)


def move_files(staging: Path, folder: Path, names: Sequence[str]) -> None:
    """Move files into a folder of the same file system in the given order, all or none; those there are replaced.

    Raises:
        OSError: the folder holds what it held.
    """
    with tempfile.TemporaryDirectory(dir=staging.parent) as temporary:
        old = Path(temporary)
        for name in names:
            if (folder / name).exists():
                os.link(folder / name, old / name)
        try:
            for name in names:
                os.replace(staging / name, folder / name)
        except BaseException:
            for name in names:
                (folder / name).unlink(missing_ok=True)
                if (old / name).exists():
                    os.rename(old / name, folder / name)
            raise
