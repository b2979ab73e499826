"""The pages and examples: their code runs, and gives what they show; links lead somewhere, tables are recorded runs."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import runpy
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.variants import REGISTRY

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LINKED = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "bench/README.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHOWN = re.compile(r"#\s*→\s*(.+)$")


def blocks(page: Path) -> Iterator[tuple[str, str, int]]:
    """Language, text and first line of each fenced block."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        yield match.group(1), match.group(2), text.count("\n", 0, match.start()) + 2


def run(source: str, namespace: dict[str, Any], where: str) -> None:
    """Execute a block; an expression whose line ends with ``# → value`` has to give that value."""
    lines = source.splitlines()
    for statement in ast.parse(source).body:
        shown = SHOWN.search(lines[(statement.end_lineno or 1) - 1])
        if isinstance(statement, ast.Expr) and shown:
            value = eval(compile(ast.Expression(statement.value), where, "eval", dont_inherit=True), namespace)  # noqa: S307
            assert repr(value) == shown.group(1), f"{where}: {ast.unparse(statement)}"
        else:
            assert not shown, f"{where}: what is shown is no value of an expression: {ast.unparse(statement)}"
            exec(compile(ast.Module([statement], []), where, "exec", dont_inherit=True), namespace)


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory for a page, whose random numbers and registered variants are its own."""
    monkeypatch.chdir(tmp_path)
    registered = dict(REGISTRY)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    REGISTRY.clear()
    REGISTRY.update(registered)


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.usefixtures("in_a_folder")
def test_the_code_of_a_page_gives_what_it_shows(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    namespace = vars(module)
    output = io.StringIO()
    for language, text, line in blocks(page):
        where = f"docs/{page.name}:{line}"
        if language == "python":
            with contextlib.redirect_stdout(output):
                run(text, namespace, where)
        elif language == "text":
            printed = [row.rstrip() for row in output.getvalue().strip().splitlines()]
            assert printed == [row.rstrip() for row in text.strip().splitlines()], where
            output = io.StringIO()
    assert output.getvalue() == "", f"docs/{page.name} prints what it does not show"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
@pytest.mark.usefixtures("in_a_folder")
def test_an_example_prints_what_its_docstring_shows(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = textwrap.dedent((ast.get_docstring(ast.parse(example.read_text())) or "").partition("::\n\n")[2])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip() == shown.strip() != ""


def test_every_example_is_linked_from_a_page() -> None:
    assert EXAMPLES
    text = "".join(page.read_text() for page in PAGES)
    assert all(f"(../examples/{example.name})" in text for example in EXAMPLES)


def test_blocks_are_python_output_or_commands() -> None:
    for page in LINKED:
        assert {language for language, _, _ in blocks(page)} <= {"python", "text", "sh"}, page.name


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text()))
    for link in links:
        assert not link.startswith("/"), link
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_linked_from_the_first() -> None:
    text = (ROOT / "README.md").read_text()
    assert PAGES
    assert all(f"(docs/{page.name})" in text for page in PAGES)


TABLES = [
    (page, *found) for page in LINKED for found in re.findall(r"<!-- ([\w-]+) table: (\S+) -->", page.read_text())
]


def test_the_pages_show_what_is_promised() -> None:
    shown = {name for page, name, _ in TABLES if page.parent == ROOT / "docs"}
    assert {"demo", "targets", "cost", "quality"} <= shown


@pytest.mark.parametrize(("page", "name", "file"), TABLES, ids=lambda value: getattr(value, "stem", value))
def test_tables_are_recorded_runs(page: Path, name: str, file: str) -> None:
    """That they are what the data says is checked by ``python -m bench report --check``."""
    table = re.search(rf"<!-- {name} table: {re.escape(file)} -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL)
    assert table is not None
    assert (ROOT / file).read_text().strip() == table.group(1).strip() != ""
    if name == "demo":
        data = json.loads((ROOT / "bench/results/demo.json").read_text())
        assert all(passed is not False for _, _, passed in data["rows"])
        assert all(f"| {what} | {value} |" in table.group(1) for what, value, _ in data["rows"])


def test_the_first_pages_figures_are_those_of_the_runs_that_it_names() -> None:
    rows = re.findall(
        r"^\| (.+) \| (.+) \| \[\w+\]\((\S+)\), (\w+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 4
    for what, measured, file, commit in rows:
        data = (ROOT / file).read_text()
        table = (ROOT / file).with_suffix(".md").read_text()
        assert f'"commit": "{commit}"' in data, what
        figures = re.findall(r"\d[\d,.]*(?:e-\d+)?%?", measured)
        for figure in (figure.rstrip(".,") for figure in figures):
            assert figure in table, f"{what}: {figure}"
