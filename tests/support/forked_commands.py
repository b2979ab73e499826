"""Commands of Python as forks of this process, which has imported everything: real processes that start at once."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


class ForkedCommand:
    """A fork that does what ``python -m module ...`` or ``python -c code ...`` does; as a ``subprocess.Popen``."""

    def __init__(self, command: list[str], *, stderr: Any = None, cwd: Path | None = None, **_: Any) -> None:
        assert command[0] == sys.executable
        self.log = tempfile.TemporaryFile("w+") if stderr is None else stderr  # noqa: SIM115 - read after the end
        read, write = os.pipe()
        self.pid, self.args, self.returncode = os.fork(), command, 0
        if self.pid == 0:
            os.close(read)
            _become(command[1:], write, self.log.fileno(), cwd)
        os.close(write)
        self.stdout = os.fdopen(read)

    def kill(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """Wait for its end; gives what it wrote and was not read yet."""
        with self:
            out = self.stdout.read()
        self.log.seek(0)
        return out, self.log.read()

    def __enter__(self) -> ForkedCommand:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def run_forked(command: list[str], cwd: Path | None = None, **_: Any) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` with what it captures as text."""
    process = ForkedCommand(command, cwd=cwd)
    told = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, *told)


def _become(arguments: list[str], out: int, err: int, cwd: Path | None) -> None:
    """Run the command in place of everything else; never returns."""
    status = 1
    os.dup2(out, 1)
    os.dup2(err, 2)
    with os.fdopen(1, "w", closefd=False) as stdout, os.fdopen(2, "w", closefd=False) as stderr:
        sys.stdout, sys.stderr = stdout, stderr
        try:
            os.chdir(cwd or ".")
            flag, what, *sys.argv[1:] = arguments
            if flag == "-m":
                runpy.run_module(what, run_name="__main__", alter_sys=False)
            else:
                exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else end.code is not None
        except BaseException:
            traceback.print_exc()
        finally:
            stdout.flush()
            stderr.flush()
            os._exit(status)
