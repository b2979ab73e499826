"""Progress bars on the standard error stream, for work that takes a while."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from passes.errors import InputError

T = TypeVar("T")


def wanted_on(progress: bool | None) -> bool:
    """Whether to show progress bars: as asked for, and where nothing is asked, on a terminal alone.

    Raises:
        InputError: it is neither a flag nor None.
    """
    if progress is not None and not isinstance(progress, bool):
        raise InputError(f"progress must be True, False or None (bars on a terminal), found {progress!r:.80}")
    return sys.stderr is not None and sys.stderr.isatty() if progress is None else progress


def track(items: Iterable[T], description: str, *, enabled: bool, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar; silent if disabled, and nothing is left on the screen afterwards.

    Args:
        total: number of items, where they have no length.
    """
    if not enabled:
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(items, description=description, total=total)
