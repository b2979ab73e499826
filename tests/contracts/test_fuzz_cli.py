"""The command line with junk: exit status 1 or 2, a few lines on the standard error stream, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery import save_adapter
from surgery.cli.main import main
from tests.support.fuzz import ESCAPE, SOME, bounded
from tests.support.operated_models import operated

MODULE = """
import sys
from torch import nn
def raises(): raise RuntimeError("first line\\nsecond \\x1b[31m line")
def leaves(): sys.exit(0)
def number(): return 5
def three(): return nn.Linear(2, 2), 1, 2
def markup(): return nn.Sequential(nn.Linear(2, 2)), "[/bold] [red]"
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A folder of things that are no models, which is the current one."""
    path, before = tmp_path_factory.mktemp("cli"), Path.cwd()
    (path / "evil_models.py").write_text(MODULE)
    (path / "evil_import.py").write_text("raise ValueError('at import')")
    (path / "evil_syntax.py").write_text("def (")
    (path / "file").write_text("x")
    (path / "empty").mkdir()
    save_adapter(operated("mlp").model, path / "adapter")
    for name, text in {"list": "[]", "damaged": "{", "deep": "[" * 10**5, "evil": '{"model_type": "[/red]"}'}.items():
        (path / name).mkdir()
        (path / name / "config.json").write_text(text)
    os.mkfifo(path / "fifo")
    os.chdir(path)
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))
    os.chdir(before)


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error stream of the console command, in this process."""
    argv, out, err = sys.argv, sys.stdout, sys.stderr
    with open("out", "w+", errors="backslashreplace") as first, open("err", "w+", errors="backslashreplace") as second:
        sys.argv, sys.stdout, sys.stderr = ["surgery", *arguments], first, second
        try:
            with bounded(60):
                main()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        finally:
            sys.argv, sys.stdout, sys.stderr = argv, out, err
        texts = [file.seek(0) or file.read() for file in (first, second)]
    return status, texts[0], texts[1]


def refused(*arguments: str) -> str:
    status, _, err = run(*arguments)
    assert status in (1, 2), (arguments, err)
    assert "Traceback" not in err
    assert err.strip()
    assert all(c.isprintable() or c == "\n" for c in err), repr(err)
    if status == 1:  # one of ours
        assert err.count("\n") == 1
    return err


SOURCES = [
    "nothing", "file", "empty", "list", "damaged", "deep", "evil", "fifo", "/dev/zero", "/dev/null", "", ".", "..", "/",
    "a/b/c", "../../x", "x" * 5000, ESCAPE.replace("\0", ""), "[/red]", "nothing:here", "evil_models:nothing",
    "evil_models:raises", "evil_models:leaves", "evil_models:number", "evil_models:three", "evil_models:markup.x",
    "evil_import:x", "evil_syntax:x", "sys:exit", "os:getcwd", "os.path:", ":", "..:..", "a b:c", "torch.nn:Linear",
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_inspect_of_what_is_no_model(source):
    refused("inspect", source)


@pytest.mark.parametrize("source", ["nothing", "file", "damaged", "list", "evil", "fifo", "empty", "[/red]"])
def test_export_of_what_is_no_model(source):
    refused("export", source, "out_folder", "--format", "dense")
    assert not Path("out_folder").exists()


@pytest.mark.parametrize("arguments", [
    (), ("nothing",), ("merge",), ("merge", "empty", "empty", "o"), ("merge", "file", "file", "file"),
    ("merge", "empty", "adapter", "o"), ("merge", "empty", "adapter", "adapter"), ("merge", "a", "b", "c", "d"),
    ("merge", "empty", "adapter", "o", "--coeff", "x"), ("merge", "empty", "adapter", "o", "--coeff", "nan"),
    ("merge", "empty", "adapter", "o", "--coeff", "1e999"), ("merge", "fifo", "fifo", "fifo"),
    ("export", "empty", "o"), ("export", "empty", "o", "--format", "x"), ("export", "empty", "o", "--nothing", "x"),
    ("inspect",), ("inspect", "empty", "--r", "x"), ("inspect", "torch.nn:Identity", "--variant", "x"),
    ("inspect", "torch.nn:Identity", "--r", "0"), ("inspect", "torch.nn:Identity", "--r", "9" * 500),
    ("inspect", "torch.nn:Identity", "--target-modules", "("), ("--nothing",), ("variants", "x"),
])  # fmt: skip
def test_junk(arguments):
    status, out, err = run(*arguments)
    assert status in (1, 2)
    assert "Traceback" not in err + out
    assert (err + out).strip()
    assert not Path("o").exists()


KNOWN = [
    "inspect", "merge", "export", "variants", "--r", "--coeff", "-1", "nan", "empty", "file", "--format", "dense",
    "--json", "/", "--", "-", "--no-progress",
]  # fmt: skip
ODD = st.characters(exclude_characters="\0", codec="utf-8")


@SOME
@given(st.lists(st.sampled_from(KNOWN) | st.text(ODD, max_size=6), max_size=6))
def test_words_at_random(words):
    status, out, err = run(*words)
    assert status in (0, 1, 2)
    assert "Traceback" not in err + out


APART = [("inspect", "evil_models:raises"), ("merge", "empty", "adapter", "o")]


@pytest.mark.parametrize("arguments", APART)
def test_a_process_of_its_own(arguments, folder):
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "surgery", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=3600,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{folder}"},
        cwd=folder,
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Error: " in done.stderr
    assert "\x1b" not in done.stderr
