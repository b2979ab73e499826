"""The names of ``import surgery``: complete, typed, not shadowed; and the types of what its verbs take and give."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

import passes.errors
import surgery
from passes.errors import SurgeryError
from surgery import AntiPaSTO, apply_surgery
from surgery.lowerings import REGISTRY as LOWERINGS
from surgery.variants import REGISTRY, Variant
from surgery.verbs import argument_types

ROOT = Path(__file__).parents[2]
BUILT_IN = {name: cls for name, cls in REGISTRY.items() if cls.__module__.startswith("surgery.")}

PROGRAM = """
import torch
from torch import fx, nn
from torch.export import ExportedProgram

import surgery
from surgery import (
    {names},
)


def steer_in_place(model: nn.Linear, program: ExportedProgram, script: torch.jit.ScriptModule) -> None:
    same: nn.Linear = surgery.apply_surgery(model, AntiPaSTO(r=4), form="residual", lowering="auto")
    graph: fx.GraphModule = surgery.apply_surgery(program, "antipasto", r=4, progress=None)
    other: fx.GraphModule = surgery.apply_surgery(script, "antipasto", example_inputs=(torch.ones(1),))
    again: nn.Linear = surgery.set_coeff(same, 0.5)
    captured: fx.GraphModule = surgery.to_graph(again, torch.ones(1, 4), form="delta", verify=True)
    surgery.merge(surgery.fold(captured, verify=torch.ones(1, 4)), verify=True)
    surgery.pipeline(graph, {{"x": torch.ones(1)}}, stop_after="fold")
    surgery.apply_surgery(other, "a variant of one's own", lowering="a lowering of one's own")


def caught() -> type[SurgeryError]:
    return max((InputError, RankError), key=lambda error: error.__name__)
"""
WRONG = {
    'surgery.apply_surgery(model, "antipasto", form="other")': "arg-type",
    'surgery.apply_surgery(model, "antipasto", rank=3)': "call-arg",
    'surgery.to_graph(model, torch.ones(1), form="other")': "arg-type",
    'surgery.pipeline(model, torch.ones(1), stop_after="inserted")': "arg-type",
    "surgery.to_graph(model, 3)": "arg-type",
    "surgery.apply_surgry(model)": "attr-defined",
    "surgery.AntiPaSTO(rank=3)": "call-arg",
}


WRONG_PROGRAM = ["import torch", "from torch import nn", "import surgery", "model: nn.Linear = nn.Linear(1, 1)", *WRONG]


@pytest.mark.long
def test_a_strict_program_sees_every_name_and_its_type_and_is_told_of_wrong_ones(tmp_path: Path) -> None:
    """What a user sees who has this library installed: no configuration of ours, no errors inside of packages.

    Both programs in one run: without the cache of an earlier one, mypy reads all of torch.
    """
    (tmp_path / "right.py").write_text(PROGRAM.format(names=",\n    ".join(surgery.__all__)))
    (tmp_path / "wrong.py").write_text("\n".join(WRONG_PROGRAM) + "\n")
    cache = ROOT / ".mypy_cache" / "of_a_user"
    options = ["--strict", "--follow-imports=silent", "--config-file=", "--cache-dir", str(cache)]
    command = [sys.executable, "-m", "mypy", *options, "right.py", "wrong.py"]
    environment = {"MYPYPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    told = done.stdout.splitlines()
    assert done.returncode == 1, done.stdout + done.stderr
    assert not [line for line in told[:-1] if not line.startswith("wrong.py:")], done.stdout
    for number, (line, code) in enumerate(WRONG.items(), start=5):
        found = [error for error in told if error.startswith(f"wrong.py:{number}: error")]
        assert any(code in error or "call-overload" in error for error in found), (line, done.stdout)


def test_every_configuration_and_error_is_exported() -> None:
    """A variant of this package belongs into ``surgery/__init__.py``, for editors and type checkers to see."""
    missing = {cls.__name__ for cls in BUILT_IN.values()} - set(surgery.__all__)
    assert not missing, f"import these in surgery/__init__.py and name them in __all__: {sorted(missing)}"
    errors = {name for name, value in vars(passes.errors).items() if isinstance(value, type)}
    assert {name for name in errors if issubclass(getattr(passes.errors, name), SurgeryError)} <= set(surgery.__all__)


def test_all_is_sorted_and_complete() -> None:
    assert len(set(surgery.__all__)) == len(surgery.__all__)
    public = {name for name, value in vars(surgery).items() if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(surgery, name), types.ModuleType)}
    assert public - modules - {"REGISTRY", "TYPE_CHECKING"} == set(surgery.__all__)


def test_no_name_is_shadowed_by_a_sub_package() -> None:
    """Importing a sub-package binds its name in the package, over whatever had it."""
    sub_packages = {module.name for module in pkgutil.iter_modules(surgery.__path__)}
    assert not sub_packages & set(surgery.__all__)
    before = {name: getattr(surgery, name) for name in surgery.__all__}
    for module in pkgutil.walk_packages(surgery.__path__, "surgery."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert all(getattr(surgery, name) is value for name, value in before.items())
    assert not any(isinstance(value, types.ModuleType) for value in before.values())


def test_a_variant_of_ones_own_is_public_by_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type("Mine", (AntiPaSTO,), {"name": ""})
    monkeypatch.setitem(REGISTRY, "mine", cls)
    assert surgery.Mine is cls
    with pytest.raises(AttributeError, match="module 'surgery' has no attribute 'Yours'"):
        surgery.Yours  # noqa: B018


def literals(alias: object) -> set[str]:
    found: set[str] = set()
    for part in (alias, *typing.get_args(alias)):
        if typing.get_origin(part) is typing.Literal:
            found.update(typing.get_args(part))
    return found


def test_editors_complete_the_names_of_this_package() -> None:
    assert literals(argument_types.VariantName) == set(BUILT_IN)
    assert literals(argument_types.LoweringName) == {"auto", "measure", *LOWERINGS}


def test_the_overloads_take_what_the_function_takes() -> None:
    options = typing.get_type_hints(argument_types.SurgeryOptions)
    hints = typing.get_type_hints(apply_surgery)
    parameters = inspect.signature(apply_surgery).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert list(options) == keywords
    assert all(options[name] == hints[name] for name in keywords)


def test_the_base_class_is_no_variant() -> None:
    assert Variant not in REGISTRY.values()
