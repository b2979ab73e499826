"""Faults at system calls that change files, in this process or as a kill of a forked one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EVENTS = {"open", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}
EVENTS |= {"os.chmod", "os.truncate", "os.utime", "fcntl.flock"}

_watcher: Callable[[], None] | None = None


def _hook(event: str, _: tuple[Any, ...]) -> None:
    if _watcher is not None and event in EVENTS:
        _watcher()


sys.addaudithook(_hook)


@contextmanager
def at_call(number: int, action: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Do something before the n-th system call on files, counted from 0; gives how many there were."""
    global _watcher
    count = [0]

    def watch() -> None:
        count[0] += 1
        if count[0] == number + 1:
            action()

    _watcher = watch
    try:
        yield count
    finally:
        _watcher = None


def calls_of(work: Callable[[], Any]) -> int:
    """How many system calls on files some work makes."""
    with at_call(-1) as count:
        work()
    return count[0]


def in_child(work: Callable[[], Any]) -> int:
    """Do some work in a forked process; gives its exit status, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(work: Callable[[], Any]) -> Iterator[int]:
    """Do some work in processes of which each is killed before another of its system calls; the caller makes the same
    beginning for each, and looks at what is left."""
    number = 0
    while True:

        def killed(number: int = number) -> None:
            with at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                work()

        status = in_child(killed)
        assert status in (0, -signal.SIGKILL), status
        yield number
        if status == 0:
            return
        number += 1
