"""The threads in which nodes of autograd are recorded, each with sequence numbers of its own."""

from __future__ import annotations

import threading


class Thread:
    """A thread in which something was recorded; it ends with it.

    Attributes:
        recorded: the number of a node that was recorded outside of any backward, or less.
    """

    def __init__(self) -> None:
        self.recorded = 0


_LOCAL = threading.local()


def this_thread() -> Thread:
    """The thread that runs."""
    thread: Thread | None = vars(_LOCAL).get("thread")
    if thread is None:
        thread = _LOCAL.thread = Thread()
    return thread
