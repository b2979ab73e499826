"""The commands of ``python -m bench``, and that the pages and scripts name no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app

ROOT = Path(__file__).parents[2]
COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
PAGES = [
    str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.*"))
]
NAMED = re.compile(r'python"? -m bench(?P<module>\.\w+)?(?: (?P<command>\w+))?')


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_tells_what_it_does(command):
    found = CliRunner().invoke(app, [command, "--help"])
    assert found.exit_code == 0
    assert "--" in found.output


@pytest.mark.parametrize("page", PAGES)
def test_pages_and_scripts_name_commands_that_exist(page):
    text = "".join(
        part
        for part in re.split(r"(<!-- [\w-]+ table: .*?<!-- end -->)", (ROOT / page).read_text(), flags=re.DOTALL)[::2]
    )
    found = list(NAMED.finditer(text))
    assert found or not page.startswith("bench/") or page.endswith(".py")
    assert {match["command"] for match in found} <= COMMANDS | {None}
    assert not any(match["module"] for match in found)


def test_the_sources_name_commands_that_exist():
    for path in (ROOT / "bench").rglob("*.py"):
        for match in NAMED.finditer(path.read_text()):
            assert match["module"] is None, (path, match.group())
            assert match["command"] in COMMANDS | {None}, (path, match.group())
