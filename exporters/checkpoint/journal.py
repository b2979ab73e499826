"""A long run that writes a folder and can be killed: what is finished is kept beside the target, and used again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from exporters.checkpoint.tensor_io import sync
from exporters.shared.publish import is_movable
from surgery.errors import ExportError
from surgery.support.atomic_directory import locked, parents_of
from surgery.support.untrusted_files import naming, parse_json, read_limited

JOURNAL = "journal"


class Journal:
    """The finished steps of a run, with what each measured: a line each, which is on disk before it counts."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        self.done: dict[str, float] = {}
        if run_digest(path) != digest:
            self._append({"run": digest})
        for line in _lines(path)[1:]:
            try:
                found = parse_json(line)
            except ValueError:  # a line cut short is of a step that does not count
                break
            if not isinstance(found, dict) or not all(type(n) is float and n >= 0 for n in found.values()):
                break
            self.done |= found

    def finish(self, step: str, measured: float = 0.0) -> None:
        """Note that a step is done."""
        self._append({step: measured})
        self.done[step] = measured

    def _append(self, line: dict[str, object]) -> None:
        with open(self.path, "ab") as file:
            file.write(b"\n" * bool(file.tell()) + json.dumps(line).encode())
            sync(file)


def run_digest(path: Path) -> str | None:
    """The digest of the run that a journal is of, or None."""
    try:
        return str(parse_json(_lines(path)[0])["run"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _lines(path: Path) -> list[bytes]:
    return read_limited(path).splitlines()


def _ours(staging: Path) -> bool:
    """Whether a folder is as a run leaves it: files and folders, and no link that leads elsewhere."""
    return not any(path.is_symlink() for path in (staging, *staging.rglob("*")))


@contextlib.contextmanager
def resumable(target: Path, digest: str) -> Iterator[tuple[Path, Journal]]:
    """Give a folder to fill, which becomes the target, and the journal of the run.

    An error leaves nothing behind. A kill or an interrupt leaves the finished steps, for the next run with the same
    digest; a run with another digest starts afresh.

    Raises:
        ExportError: the target is not a new or empty directory, another process is about to fill it, or it cannot be
            written.
    """
    target = target.resolve()  # a link to a folder cannot be replaced by a folder, what it leads to can
    _check_free(target)
    if not is_movable(target):
        raise ExportError(
            f"{str(target)!r} is the working directory, a file system of its own, or in a folder that cannot be "
            "written: no finished folder can take its place; name a new one in it"
        )
    staging = target.parent / f".{target.name}.merging"
    if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
        raise ExportError(f"{str(staging)!r}, where the run would keep its steps, is no directory: remove it")
    files = staging / "files"
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(parents_of(target))
            with locked(target.parent):  # between making it and holding it
                staging.mkdir(exist_ok=True)
                stack.enter_context(locked(staging, wait=False))
            try:
                _check_free(target)  # another process may just have finished
                if not (files.is_dir() and _ours(staging) and run_digest(staging / JOURNAL) == digest):
                    _clear(staging)
                files.mkdir(exist_ok=True)
                journal = Journal(staging / JOURNAL, digest)
                with naming(files, target):
                    yield files, journal
                os.rename(files, target)
                shutil.rmtree(staging)
            except Exception:
                shutil.rmtree(staging, ignore_errors=True)
                raise
    except BlockingIOError as error:
        raise ExportError(f"another process is merging into {str(target)!r}; wait for it, or choose another") from error
    except OSError as error:
        raise ExportError(f"cannot write {str(target)!r}: {error}; nothing was left behind") from error


def _check_free(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{str(target)!r} must be a new or empty directory")


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
