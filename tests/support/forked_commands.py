"""Commands of Python as forks of this process, which has imported everything: real processes that start at once."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from typing import Any


class ForkedCommand:
    """A fork that does what ``python -m module ...`` or ``python -c code ...`` does; as a ``subprocess.Popen``."""

    def __init__(self, command: list[str], *, stderr: Any, **_: Any) -> None:
        assert command[0] == sys.executable
        read, write = os.pipe()
        self.pid, self.args, self.returncode = os.fork(), command, 0
        if self.pid == 0:
            os.close(read)
            _become(command[1:], write, stderr.fileno())
        os.close(write)
        self.stdout = os.fdopen(read)

    def kill(self) -> None:
        """End it."""
        os.kill(self.pid, 9)

    def __enter__(self) -> ForkedCommand:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def run_forked(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` with what it captures as text."""
    with tempfile.TemporaryFile("w+") as log:
        with ForkedCommand(command, stderr=log) as process:
            out = process.stdout.read()
        log.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, out, log.read())


def _become(arguments: list[str], out: int, err: int) -> None:
    """Run the command in place of everything else; never returns."""
    status = 1
    os.dup2(out, 1)
    os.dup2(err, 2)
    with os.fdopen(1, "w", closefd=False) as stdout, os.fdopen(2, "w", closefd=False) as stderr:
        sys.stdout, sys.stderr = stdout, stderr
        try:
            flag, what, *sys.argv[1:] = arguments
            if flag == "-m":
                runpy.run_module(what, run_name="__main__", alter_sys=False)
            else:
                exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            stdout.flush()
            stderr.flush()
            os._exit(status)
