"""Write the files of a directory whole or not at all, one writer at a time; what killed writers left is removed.

Files are prepared in a staging folder and moved into place by ``os.replace``. The first file of a directory is the one
that counts: a reader of that file alone sees the old one or the new one. The others follow it.

Files get the mode 0666 and folders 0777, less the umask, as ``open`` and ``mkdir`` make them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from filelock import lock_descriptor, unlock_descriptor

HEX = "[0-9a-f]"
POLL = 0.01  # seconds between attempts to lock a folder that another process holds
FOLDERS_OPEN = hasattr(os, "O_DIRECTORY")  # Windows opens none, so that they can be neither locked nor synchronised
Content = Sequence[bytes | memoryview]


def write_directory(path: Path, files: Mapping[str, Content]) -> None:
    """Write files into a directory, all or none; a new directory appears with all of them.

    Writers into one directory wait for each other. Other files there are kept.

    Args:
        files: the content of each file, in parts; the first file is the one that counts.

    Raises:
        OSError: nothing is changed.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a file")
    with parents_of(path):
        if path.is_dir() or not _create(path, files):
            _replace(path, files)


def _create(path: Path, files: Mapping[str, Content]) -> bool:
    """Make a new directory; False if another process did so first."""
    with aside(path.parent, path.name) as staging:
        for name, content in files.items():
            _write(staging / name, content)
        sync_folder(staging)
        try:
            os.rename(staging, path)
        except OSError:
            if path.is_dir():
                return False
            raise
        try:
            sync_folder(path.parent)
        except BaseException:
            os.rename(path, staging)
            raise
    return True


def _replace(path: Path, files: Mapping[str, Content]) -> None:
    """Replace files in a directory in the given order; an error puts back the old ones."""
    with locked(path) as held, _folder_in(path, path.name, tidy=held) as staging:
        for name, content in files.items():
            _write(staging / name, content)
        old = {name: _link(path / name, staging / f"{name}.old") for name in files if os.path.lexists(path / name)}
        try:
            for name in files:
                os.replace(staging / name, path / name)
            sync_folder(path)
        except BaseException:
            for name in reversed(list(files)):
                if name in old:
                    os.replace(old[name], path / name)
                elif not os.path.lexists(staging / name):  # it was moved
                    (path / name).unlink()
            raise


def _write(path: Path, content: Content) -> None:
    with open(path, "wb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())


def _link(file: Path, name: Path) -> Path:
    """Give a file a second name; where there are no links, a copy."""
    try:
        os.link(file, name, follow_symlinks=False)
    except OSError:
        shutil.copy(file, name, follow_symlinks=False)
        if not name.is_symlink():
            with open(name, "rb") as copy:
                os.fsync(copy.fileno())
    return name


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk, where folders can be synchronised at all."""
    if not FOLDERS_OPEN:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the parents of a path; an error takes away those that were made."""
    made = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):  # someone else has put something there
                parent.rmdir()
        raise


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a folder against all others that lock it; gives whether it is held: not every file system can.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is false.
    """
    while FOLDERS_OPEN:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            held = _lock(descriptor, folder, wait=wait)
            try:
                if os.path.samestat(os.fstat(descriptor), os.stat(folder)):  # it may be another folder by now
                    yield held
                    return
            finally:
                if held:  # also for processes that were forked meanwhile, and have the descriptor too
                    with contextlib.suppress(OSError):  # closing it unlocks as well
                        unlock_descriptor(descriptor)
        finally:
            os.close(descriptor)
    yield False


def _lock(descriptor: int, folder: Path, *, wait: bool) -> bool:
    try:
        held = lock_descriptor(descriptor, blocking=wait, poll_interval=POLL)
    except OSError:  # the file system has no locks
        return False
    if not held:
        raise BlockingIOError(f"{str(folder)!r} is held by another process")
    return True


@contextlib.contextmanager
def aside(place: Path, name: str) -> Iterator[Path]:
    """A new folder to prepare something in. It is gone at the end unless it was renamed, and so are those that killed
    writers left beside it."""
    with contextlib.ExitStack() as stack:
        with locked(place) as held:  # a folder that has no holder is one that a kill left
            staging = stack.enter_context(_folder_in(place, name, tidy=held))
        yield staging


@contextlib.contextmanager
def _folder_in(place: Path, name: str, *, tidy: bool) -> Iterator[Path]:
    if tidy:
        for left in place.iterdir():
            if is_left_over(left.name, name):
                with contextlib.suppress(OSError), locked(left, wait=False) as dead:
                    if dead:
                        shutil.rmtree(left)
    staging = place / f".{name}.{secrets.token_hex(8)}.tmp"
    try:
        staging.mkdir()
        with locked(staging):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def is_left_over(folder: str, name: str) -> bool:
    """Whether a folder may be one that a killed writer of ``name`` left."""
    return re.fullmatch(rf"\.{re.escape(name)}\.{HEX}{{16}}\.tmp", folder) is not None
