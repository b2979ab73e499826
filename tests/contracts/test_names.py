"""One name, one meaning: of files, and of the classes and public functions that they define."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ("passes", "surgery", "exporters")
# The same thing by design, once a file that is found without a list.
INTERFACES = {
    "Options": "exporters/formats/",  # of an export format
    "write": "exporters/formats/",  # of an export format
}
# The same meaning for two kinds of things.
SAME = {"digest"}  # what tells from others: of factors (surgery.storage), of a program's sites (exporters.shared)
# Functions of bench are not compared: its rooms are programs of their own, each with its run, report and markdown.


def definitions(source: str, *, functions: bool) -> set[str]:
    """Names of classes, and of public functions, at the top of a file."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef) if functions else (ast.ClassDef,)
    found = {node.name for node in ast.parse(source).body if isinstance(node, kinds)}
    return {name for name in found if not name.startswith("_") and name != "main"}


def homonyms(sources: dict[str, str]) -> dict[str, list[str]]:
    """The files that define each name that several define."""
    places = defaultdict(list)
    for path, source in sorted(sources.items()):
        for name in definitions(source, functions=path.startswith(LIBRARY)):
            if name not in SAME and not path.startswith(INTERFACES.get(name, "nowhere")):
                places[name].append(path)
    return {name: paths for name, paths in places.items() if len(paths) > 1}


# Files of one name and one meaning, and those that stand for a name that users say: a format, a lowering.
ROOMS = {"__init__.py", "__main__.py", "errors.py", "cli.py"}
SAID = {"dense.py"}  # a lowering and an export format


def test_one_file_name_has_one_meaning():
    places = defaultdict(list)
    for name in LIBRARY:
        for path in (ROOT / name).rglob("*.py"):
            if path.name not in ROOMS | SAID:
                places[path.name].append(path.relative_to(ROOT).as_posix())
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_one_name_has_one_meaning():
    paths = [path for name in (*LIBRARY, "bench") for path in (ROOT / name).rglob("*.py")]
    assert paths
    assert homonyms({path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}) == {}


@pytest.mark.parametrize("source", ["class Site: ...", "def site(): ...", "async def site(): ..."])
def test_a_homonym_is_seen(source):
    found = homonyms({"passes/a.py": source, "surgery/b.py": source})
    assert list(found.values()) == [["passes/a.py", "surgery/b.py"]]


@pytest.mark.parametrize(
    ("one", "other", "source"),
    [
        ("passes/a.py", "surgery/b.py", "def _private(): ..."),
        ("passes/a.py", "surgery/b.py", "def main(): ..."),
        ("bench/a.py", "bench/b.py", "def run(): ..."),
        ("exporters/formats/a.py", "exporters/formats/b.py", "class Options: ..."),
    ],
)
def test_what_is_no_homonym_is_let_pass(one, other, source):
    assert homonyms({one: source, other: source}) == {}


def test_methods_may_share_a_name():
    assert (
        homonyms({"passes/a.py": "class A:\n    def f(self): ...", "surgery/b.py": "class B:\n    def f(self): ..."})
        == {}
    )
