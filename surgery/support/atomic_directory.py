"""Folders whose content is put there whole or not at all, by one writer at a time, and tidied of what a kill left.

An adapter that is replaced goes through states of which each is the old adapter or the new one. ``d`` is the digest of
the tensors that the configuration names; who reads takes whichever of the two files has it
(``surgery.storage.tensor_file``)::

    adapter_model.safetensors    .adapter_model.<d>.safetensors    adapter_config.json    is
    old                          -                                 old                    the old adapter
    old                          old                               old                    the old adapter
    new                          old                               old                    the old adapter
    new                          old                               new                    the new adapter
    new                          -                                 new                    the new adapter
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.support.untrusted_files import open_regular, read_json

try:
    import fcntl
except ImportError:  # not a POSIX system: no locks, and what a kill left cannot be told from what is being written
    fcntl = None  # type: ignore[assignment]

HEX = "[0-9a-f]"


def write_directory(path: Path, files: dict[str, bytes]) -> None:
    """Write an adapter into a directory, whole or not at all; a new directory appears with all of it.

    Writers into one directory wait for each other. What killed ones left is removed.

    Args:
        files: the tensors, and the configuration, which has their digest.

    Raises:
        OSError: nothing is changed.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a file")
    with parents_of(path):
        if path.is_dir() or not _create(path, files):
            _replace(path, files)


def _create(path: Path, files: dict[str, bytes]) -> bool:
    """Make a new directory; False if another process did so first."""
    with aside(path.parent, path.name) as staging:
        for name, data in files.items():
            _write(staging / name, data)
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


def _replace(path: Path, files: dict[str, bytes]) -> None:
    """Replace the adapter in a directory; the configuration's replacement is what counts."""
    name, config_name = files
    tensors, config = path / name, path / config_name
    with locked(path) as held, _folder_in(path, path.name, tidy=held) as staging:
        for file, data in files.items():
            _write(staging / file, data)
        old = kept = None
        had_config, had_tensors = config.exists(), tensors.exists()
        try:
            if had_config:
                old = _link(config, staging / "old")
            if had_tensors:
                kept = path / kept_name(name, _digest_in(config) or _digest_of(tensors))
                if not os.path.lexists(kept):  # left by a kill, it may be the only one
                    os.replace(_link(tensors, staging / "kept"), kept)
            os.replace(staging / name, tensors)
            os.replace(staging / config_name, config)
            sync_folder(path)
        except BaseException:  # back in reverse order: the old configuration counts while the kept tensors are there
            if old is not None and os.path.lexists(old):  # of a link, the copy aside leads nowhere
                os.replace(old, config)
            elif not had_config:
                config.unlink(missing_ok=True)
            if kept is not None and os.path.lexists(kept):
                os.replace(kept, tensors)
                kept.unlink(missing_ok=True)  # of two links to one file, a rename keeps both
            elif not had_tensors:
                tensors.unlink(missing_ok=True)
            raise
        try:
            _drop_kept(path, name)
        except BaseException:  # an interrupt: it is done all the same
            _drop_kept(path, name)
            raise


def kept_name(name: str, digest: str) -> str:
    """What a tensor file is called while another takes its place."""
    return f".{Path(name).stem}.{digest[:16]}{Path(name).suffix}"


def _drop_kept(folder: Path, name: str) -> None:
    pattern = rf"\.{re.escape(Path(name).stem)}\.{HEX}{{16}}{re.escape(Path(name).suffix)}"
    with contextlib.suppress(OSError):  # what stays here is not read, and the next writer removes it
        for left in folder.iterdir():
            if re.fullmatch(pattern, left.name):
                left.unlink(missing_ok=True)


def _digest_in(config: Path) -> str | None:
    """The digest of the tensors that a configuration belongs to, if it is one."""
    try:
        found: Any = read_json(config)["tensors_sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) and re.fullmatch(f"{HEX}{{64}}", found) else None


def _digest_of(file: Path) -> str:
    with open_regular(file) as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link(file: Path, name: Path) -> Path:
    """Give a file a second name; where there are no links, a copy."""
    try:
        os.link(file, name)
    except OSError:
        _write(name, file.read_bytes())
        shutil.copymode(file, name)
    return name


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk, where folders can be synchronised at all."""
    if fcntl is None:
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
    """Hold a folder, which keeps out all others who lock it; gives whether it is held: not every file system can.

    Raises:
        BlockingIOError: another holds it, and ``wait`` is false.
    """
    while fcntl is not None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            held = _lock(descriptor, wait=wait)
            try:
                if os.path.samestat(os.fstat(descriptor), os.stat(folder)):  # it may be another folder by now
                    yield held
                    return
            finally:
                if held:  # also for processes that were forked meanwhile, and have the descriptor too
                    with contextlib.suppress(OSError):  # closing it does as well
                        fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)
    yield False


def _lock(descriptor: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextlib.contextmanager
def aside(place: Path, name: str) -> Iterator[Path]:
    """A new folder to prepare something in, which is gone at the end unless it was renamed; so are those that a kill
    left beside it."""
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


def is_left_over(found: str, name: str) -> bool:
    """Whether a folder may be one that a killed writer of ``name`` left."""
    return re.fullmatch(rf"\.{re.escape(name)}\.{HEX}{{16}}\.tmp", found) is not None
