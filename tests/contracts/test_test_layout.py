"""How the tests are laid out: helpers live in ``tests/support``, and no test module needs another one."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.lanes import left_to_the_full_lane

TESTS = Path(__file__).parents[1]
FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py"))
MODULE = re.compile(r"\btests(\.\w+)*\.(test_\w+|conftest)\b")  # also in code for another process, kept as text


def needed(source: str) -> set[str]:
    """The test modules that a source imports, or names in a string."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or 'tests.x'}.{alias.name}" for alias in node.names]
            names = [name if not node.level else f"tests.{name}" for name in names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        else:
            continue
        found |= {match.group() for name in names for match in MODULE.finditer(name)}
    return found


@pytest.mark.parametrize("file", FILES)
def test_no_module_needs_a_test_module(file):
    assert needed((TESTS / file).read_text()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "from tests.surgery." + "test_a import b",
        "from tests.surgery import " + "test_a",
        "import tests." + "test_a as b",
        "from tests." + "conftest import b",
        "from . import " + "test_a",
        "from .test_a import b",
        "CHILD = 'from tests.surgery." + "test_a import b'",
        "MODEL = 'tests." + "test_a:model'",
    ],
)
def test_every_way_to_need_one_is_found(source):
    assert needed(source)


def test_support_holds_no_tests():
    for path in (TESTS / "support").glob("*.py"):
        functions = [n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
        assert not [name for name in functions if name.startswith("test_")], path


class Case:
    """What a lane sees of a test."""

    def __init__(self, nodeid: str, marks: dict[str, pytest.Mark], **params: object) -> None:
        self.nodeid, self.marks, self.callspec = nodeid, marks, SimpleNamespace(params=params)

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marks.get(name)


@pytest.mark.parametrize(("n", "least", "most"), [(1, 4, 4), (2, 12, 16), (3, 24, 24)])
def test_the_gate_takes_as_many_cases_of_a_matrix_as_hold_every_tuple(n: int, least: int, most: int) -> None:
    marks = {"matrix": pytest.mark.matrix(n).mark}
    table = list(itertools.product("abcd", (1, 2, 3), ([], [0])))  # lists have no hash
    lists = [[], [0]]
    cases = [Case(f"t[{i}]", marks, x=x, y=y, z=lists[len(z)]) for i, (x, y, z) in enumerate(table)]
    cases += [Case("t[x]", {**marks, "full": pytest.mark.full.mark}, x="e", y=1, z=lists[0])]
    cases += [Case(f"u[{x}]", {}, x=x) for x in "abc"]
    left = left_to_the_full_lane(cases)
    taken = [case for case in cases[:24] if case not in left]
    assert set(left) <= set(cases[:24])
    assert least <= len(taken) <= most

    def tuples(cases: list[Case]) -> set[object]:
        values = [[(k, str(v)) for k, v in case.callspec.params.items()] for case in cases]
        return {one for given in values for one in itertools.combinations(given, n)}

    assert tuples(taken) == tuples(cases[:24])
