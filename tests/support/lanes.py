"""The lanes of the tests, and what one process of a parallel run should take together.

``fast`` (``make check``) is found, not written: every test of passes, surgery and the contracts that names no model of
transformers, no exporter and no process, and captures no graph itself. A run of the lane fails if it imports
transformers or ONNX all the same.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.zoo import HUB

ROOT = Path(__file__).parents[2]
ROOMS = ("tests/passes/", "tests/surgery/", "tests/contracts/")
HEAVY = ("transformers", "onnx", "onnxruntime")
SLOW = re.compile(
    r"(import|from) (transformers|onnx|exporters|subprocess|tests\.support\.(expert_models|processes|fuzz))\b"
    r"|torch\.compile\(|in_child|run_fresh|\.spawn\(|operated_graphs"
)
LARGE = re.compile("|".join(rf'"{name}"' for name in HUB) + "|HUB|ALL_NAMES")
SHARED = re.compile(r'^@pytest\.fixture\(scope="module"\)\ndef (\w+)', re.MULTILINE)
CAPTURES = re.compile(r"\b(to_graph|pipeline)\(")


@functools.cache
def _source(thing: Any) -> str:
    return inspect.getsource(thing)


def models_of(item: pytest.Item) -> set[str]:
    """The models of transformers that a test is given."""
    given = getattr(item, "callspec", None)
    return {value for value in given.params.values() if isinstance(value, str) and value in HUB} if given else set()


@functools.cache
def may_be_fast(path: Path) -> bool:
    """Whether a file of tests can have any of the fast lane."""
    place = path.relative_to(ROOT).as_posix()
    return place.startswith(ROOMS) and not SLOW.search(path.read_text())


def is_fast(item: pytest.Item) -> bool:
    """Whether a test belongs to the lane that is run on every save."""
    if not may_be_fast(item.path) or item.get_closest_marker("full") or models_of(item):
        return False
    given = "callspec" in vars(item)
    large = LARGE.search(_source(item.function)) and not (given and "name" in item.callspec.params)
    return not (large or CAPTURES.search(_source(item.function)))


@functools.cache
def _shared_by_a_module(path: Path) -> frozenset[str]:
    """The fixtures of a file that its tests share."""
    return frozenset(SHARED.findall(path.read_text()))


def group_of(item: pytest.Item) -> str:
    """What should run in one process: tests of a model share captures and exports, those of a file its fixtures; the
    rest goes by function."""
    models = "-".join(sorted(models_of(item)))
    shared = sorted(_shared_by_a_module(item.path).intersection(getattr(item, "fixturenames", ())))
    return models or (f"{item.path.stem} {shared[0]}" if shared else item.nodeid.partition("[")[0])


def begun_first(groups: Mapping[pytest.Item, str]) -> Callable[[pytest.Item], tuple[int, int]]:
    """An order for several processes: what is long, then the models, the largest group first, then file by file."""
    sizes = Counter(groups.values())
    long = {group for item, group in groups.items() if item.get_closest_marker("long")}
    models = {group for item, group in groups.items() if models_of(item)}

    def place(item: pytest.Item) -> tuple[int, int]:
        group = groups[item]
        return (0, 0) if group in long else (1, -sizes[group]) if group in models else (2, 0)

    return place


def left_to_the_full_lane(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Of each test marked ``matrix(n)``, all but as many as hold every value, pair, .. n-tuple of its parameters.

    Greedy: the next is the first of those with the most that none before it had, which runs along the diagonal.
    """
    matrices: dict[str, dict[pytest.Item, set[tuple[object, ...]]]] = {}
    for item in items:
        marker = item.get_closest_marker("matrix")
        if marker and not item.get_closest_marker("full"):
            given = vars(item)["callspec"].params.items()
            values = [(name, value if value.__hash__ else id(value)) for name, value in given]
            found = set(itertools.combinations(values, *(marker.args or (1,))))
            matrices.setdefault(item.nodeid.partition("[")[0], {})[item] = found
    left: list[pytest.Item] = []
    for cases in matrices.values():
        missing = set[tuple[object, ...]]().union(*cases.values())
        rest = dict(cases)
        while missing:
            best = max(rest, key=lambda item: len(rest[item] & missing))
            missing -= rest.pop(best)
        left += rest
    return left


def imported() -> list[str]:
    """What the fast lane must not import, and has."""
    return [name for name in HEAVY if name in sys.modules]
