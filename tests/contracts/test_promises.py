"""Every promise names tests, and these exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "promises.md"


def names_in(file: str) -> set[str]:
    (path,) = TESTS.rglob(file)
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_promise_is_held_by_a_test_that_exists():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "held by" not in line]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            assert name in names_in(file), f"{file}::{name}"


def test_the_page_of_security_links_to_it():
    assert "(docs/promises.md)" in (TESTS.parent / "SECURITY.md").read_text()
