"""Hardened parsing of untrusted input: paths, regular files, and strict, bounded JSON.

Opening a FIFO would wait for ever, and a device has no end. A key that stands twice means one thing to one reader and
another to the next; NaN and infinity are no JSON; deep nesting breaks whatever walks it later.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from passes.errors import SurgeryError

LIMIT = 64 * 2**20
VALUES, DEPTH = 2**22, 64

JsonObject = dict[str, Any]
"""A JSON object; what its keys hold is checked where they are read."""


def path_of(path: str | os.PathLike[str], error: type[SurgeryError]) -> Path:
    """A path that was given as an argument.

    Raises:
        SurgeryError: of the given kind: it is no path, or no file can have that name.
    """
    try:
        given = Path(path)
        if path == "":
            raise ValueError("it is empty")
        os.lstat(given)
    except (TypeError, ValueError) as problem:  # no text; a NUL or a surrogate
        raise error(f"{path!r:.200} is no path: {problem}") from problem
    except OSError as problem:
        if problem.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise error(f"{path!r:.200} is no path: {problem.strerror}") from problem
    return given


@contextlib.contextmanager
def naming(written: Path, target: Path) -> Iterator[None]:
    """Let errors name the target, where they would name the temporary folder that stands in for it."""
    try:
        yield
    except SurgeryError as error:
        error.args = tuple(a.replace(str(written), str(target)) if isinstance(a, str) else a for a in error.args)
        raise


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file, or a link to one, to read; the caller closes it.

    Raises:
        OSError: it cannot be opened, or is a directory, a FIFO, a socket or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is no regular file")
    return open(descriptor, "rb")


def require_regular(path: Path) -> None:
    """Check that a path is a regular file, before it is given to what would open anything.

    Raises:
        OSError: it is not, or cannot be opened.
        ValueError: no file can have such a name.
    """
    open_regular(path).close()


def read_limited(path: Path, limit: int = LIMIT) -> bytes:
    """Read a small regular file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than the limit.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit >> 20} MiB")
    return data


def read_json(path: Path, limit: int = LIMIT, *, finite: bool = True) -> Any:
    """Read a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or :func:`parse_json` refuses it.
    """
    return parse_json(read_limited(path, limit), finite=finite)


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Read JSON strictly: UTF-8, no key twice, finite numbers, at most ``VALUES`` values in at most ``DEPTH`` levels.

    Raises:
        ValueError: says what is wrong.
    """
    text = text.decode() if isinstance(text, bytes) else text
    if sum(map(text.count, ",[{")) > VALUES:
        raise ValueError(f"it has more than {VALUES:,} values")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_once,
            parse_constant=_no_number if finite else None,
            parse_float=_finite if finite else None,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [value]
    for _ in range(DEPTH):
        level = [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]
    if level:
        raise ValueError(f"it is nested more than {DEPTH} deep")
    return value


def _once(pairs: list[tuple[str, object]]) -> JsonObject:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return table


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value
