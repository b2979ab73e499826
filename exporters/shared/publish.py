"""Exports are written aside and moved into place, whole or not at all, also where the process is killed.

A new folder, and one that is empty, is renamed into place; so is a file. Where a format has files beside the main one,
as an ONNX graph with its tensors, these have names made from their content, so that none is overwritten: they come
first, then the main file, which is what counts, and then those of the main file that was there before are removed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from exporters.shared.export_report import Exported, ExportReport
from surgery.errors import ExportError
from surgery.support.atomic_directory import aside, is_left_over, locked, parents_of, sync_folder
from surgery.support.untrusted_files import naming, path_of


def target_of(path: str | os.PathLike[str], default_name: str | None) -> tuple[Path, Path, Path]:
    """What a format would write for a path, without writing.

    Returns:
        The path itself, the target (a file, or a directory), and where a folder beside it can be.

    Raises:
        ExportError: the directory is not empty.
    """
    path = path_of(path, ExportError)
    if default_name is not None and path.suffix == Path(default_name).suffix and not path.is_dir():
        return path, path, path.parent
    if path.is_file() or (path.is_dir() and any(not is_left_over(f.name, path.name) for f in path.iterdir())):
        name = "" if default_name is None else f", or a file name with {default_name!r}'s suffix"
        raise ExportError(f"{str(path)!r} must be a new or empty directory{name}")
    return path, path if default_name is None else path / default_name, path.parent if is_movable(path) else path


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], default_name: str | None) -> Iterator[tuple[Path, Path]]:
    """Give what to write, in a temporary folder, and the target: a file, or a directory.

    A path with the suffix of the default name is a file; any other is a directory, which must be new or empty. Without
    a default name the format is a directory.

    Raises:
        ExportError: the directory is not empty, or cannot be written.
    """
    path, target, place = target_of(path, default_name)
    staging, named = place, target if default_name is None else target.parent
    try:
        with parents_of(path), aside(place, path.name) as staging, naming(staging, named):
            yield (staging if default_name is None else staging / target.name), target
    except OSError as error:
        text = str(error).replace(str(staging), str(place))
        raise ExportError(f"cannot write {str(target)!r}: {text}; nothing was left behind") from error


def is_movable(folder: Path) -> bool:
    """Whether another folder can take the place of one: not of where a process or a file system is."""
    if not folder.is_dir():
        return True
    parent = folder.absolute().parent
    fixed = folder.is_symlink() or os.path.ismount(folder) or os.path.samefile(folder, ".")
    return not fixed and os.access(parent, os.W_OK | os.X_OK)


def publish(written: Path, target: Path, format: str, exported: Exported) -> ExportReport:
    """Move what was written into place, all or nothing, the main file last."""
    is_folder = written.is_dir()
    staging, folder = (written, target) if is_folder else (written.parent, target.parent)
    names = sorted((file.name for file in staging.iterdir()), key=lambda name: (name == target.name, name))
    for name in names:
        _sync(staging / name)
    if staging.parent == folder or (folder.is_dir() and any(folder.iterdir())):
        with locked(folder):
            _move_files(staging, folder, names)
            if not is_folder:
                _drop_parts(target, names)
    else:
        sync_folder(staging)
        if folder.is_dir():
            staging.chmod(folder.stat().st_mode)
        os.rename(staging, folder)
    files = tuple(folder / name for name in reversed(names))
    return ExportReport(format, target, files, exported.max_error, exported.details)


def part_name(name: str, digest: str) -> str:
    """What a file beside a main one is called, by the digest of its content."""
    return f"{name}.{digest[:16]}.data"


def _drop_parts(target: Path, names: list[str]) -> None:
    """Remove what belonged to the main file that was there before."""
    with contextlib.suppress(OSError):  # they are read by nothing any more
        for file in target.parent.iterdir():
            if re.fullmatch(rf"{re.escape(target.name)}\.[0-9a-f]{{16}}\.data", file.name) and file.name not in names:
                file.unlink()


def _move_files(staging: Path, folder: Path, names: list[str]) -> None:
    """Move files into a folder of the same file system in the given order, all or none; the last one may be replaced,
    and any other that is there has the same content."""
    moved = []
    try:
        for name in names:
            new = not (folder / name).exists()
            os.replace(staging / name, folder / name)
            moved += [name] * new
    except BaseException:
        if (staging / names[-1]).exists():
            for name in moved:
                (folder / name).unlink()
        raise


def _sync(file: Path) -> None:
    if file.is_file():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
