"""The contract that every exporter keeps, whatever its format: a new file in ``exporters/formats`` goes through it by
itself, as the last test shows with a toy format.

An exporter may say in its module what the suite has to know: ``SLOW = True`` (an export takes more than a few seconds:
only `make test-full` runs it), ``EXAMPLE_OPTIONS = {...}`` (options that an export cannot do without), and
``NEEDS_INPUTS = False``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from exporters import ExportError, export, formats
from exporters.shared.exporter import load_exporter
from exporters.shared.options import flags, option, parse
from surgery import InputError, SurgeryError, apply_surgery, set_coeff, sites
from tests.support.zoo import SmallModel, built_once, small_model

MODULES = {name: importlib.import_module(f"exporters.formats.{name}") for name in formats()}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
each_format = pytest.mark.parametrize(
    "format", [pytest.param(n, marks=[pytest.mark.full] * getattr(m, "SLOW", False)) for n, m in MODULES.items()]
)
each_model = pytest.mark.parametrize("name", ["mlp", "qwen3"])


def operate(p: SmallModel) -> SmallModel:
    """Operate, move the cores, and leave the model in a state that none of an exporter's own steps would give it."""
    apply_surgery(p.model, "antipasto", r=6, example_inputs=p.inputs, progress=False)
    generator = torch.Generator().manual_seed(1)
    for site in sites(p.model).values():
        site.core.g.data.normal_(std=0.3, generator=generator)
    set_coeff(p.model, 0.7)
    next(iter(sites(p.model).values())).core.requires_grad_(False)
    p.model.train()
    return p


@built_once
def operated(name: str) -> SmallModel:
    """A model of the zoo, operated on."""
    return operate(small_model(name))


def run(p: SmallModel, format: str, path: Path, **options: Any) -> Any:
    return export(
        p.model,
        format,
        path,
        **{"example_inputs": p.inputs, **getattr(MODULES[format], "EXAMPLE_OPTIONS", {}), **options},
    )


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Remember everything of a model; calling the result asserts that it is so still."""
    tensors = {name: (t, t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    coeffs = {key: (site.steering.coeff, site.steering.coeff.clone()) for key, site in sites(model).items()}
    look = lambda: [  # noqa: E731
        (name, id(m), type(m), m.training, sorted(vars(m)), [list(getattr(m, hooks)) for hooks in HOOKS])
        for name, m in model.named_modules()
    ]
    modules = look()

    def unchanged() -> None:
        assert look() == modules
        now = model.state_dict(keep_vars=True)
        assert list(now) == list(tensors)
        for name, (tensor, value, version) in tensors.items():
            assert now[name] is tensor, name
            assert torch.equal(tensor, value), name
            assert tensor._version == version, name
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        for key, site in sites(model).items():
            assert site.steering.coeff is coeffs[key][0]
            assert torch.equal(site.steering.coeff, coeffs[key][1])

    return unchanged


@pytest.mark.matrix
@each_format
@each_model
def test_an_export_is_reported_and_leaves_the_model_as_it_was(format: str, name: str, tmp_path: Path) -> None:
    p = operated(name)
    unchanged = snapshot(p.model)
    report = run(p, format, tmp_path / "out")
    unchanged()
    assert report.format == format
    assert report.path.exists()
    assert report.files
    assert all(file.is_file() for file in report.files)
    assert {f for f in tmp_path.rglob("*") if f.is_file()} == set(report.files)
    assert math.isfinite(report.max_error)
    assert 0 <= report.max_error < 1e-4
    data = b"".join(file.read_bytes() for file in report.files)
    for place in (Path(__file__).parents[2], tmp_path, Path(sys.prefix), "site-packages"):
        assert str(place).encode() not in data


@each_format
def test_an_unknown_option_is_refused_and_the_known_ones_are_named(format: str, tmp_path: Path) -> None:
    known = [field.name for field in dataclasses.fields(load_exporter(format).Options)]
    with pytest.raises(ExportError, match="no option spped") as error:
        run(operated("mlp"), format, tmp_path / "out", spped=1)
    assert all(name in str(error.value) for name in known)
    assert list(tmp_path.iterdir()) == []


@each_format
def test_every_option_has_help_and_refuses_another_type(format: str, tmp_path: Path) -> None:
    kind = load_exporter(format).Options
    assert {flag.name for flag in flags(kind)} <= {field.name for field in dataclasses.fields(kind)}
    p = operated("mlp")
    for field in dataclasses.fields(kind):
        assert field.metadata["help"]
        assert not field.metadata["help"].endswith(".")
        with pytest.raises(ExportError, match=f"{field.name} must be .*; found <object object"):
            run(p, format, tmp_path / "out", **{field.name: object()})
    assert list(tmp_path.iterdir()) == []


def test_options_are_checked_by_their_types() -> None:
    @dataclasses.dataclass(frozen=True)
    class Options:
        mode: typing.Literal["fast", "small"] = option("fast", "how")
        level: int | None = option(None, "how hard")
        share: float = option(0.5, "how much")
        switch: bool = option(False, "whether")

    good = {"mode": "small", "level": 3, "share": 1, "switch": True}
    assert parse(Options, "toy", good) == Options("small", 3, 1, True)
    assert parse(Options, "toy", {}) == Options()
    for name, wrong, expected in (
        ("mode", "smal", "one of 'fast', 'small'; found 'smal'"),
        ("mode", None, "one of 'fast', 'small'; found None"),
        ("level", True, "a whole number or None; found True"),
        ("level", 1.5, "a whole number or None; found 1.5"),
        ("share", "1", "a number; found '1'"),
        ("share", True, "a number; found True"),
        ("switch", 1, "True or False; found 1"),
    ):
        with pytest.raises(ExportError, match=re.escape(f"{name} must be {expected}")):
            parse(Options, "toy", {name: wrong})
    assert [(flag.name, flag.kind) for flag in flags(Options)] == [
        ("mode", str), ("level", int), ("share", float), ("switch", bool)
    ]  # fmt: skip
    assert flags(Options)[0].help == "how: fast, small (default: fast)."


def test_a_core_is_not_chosen_by_name_yet(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="core='french': a model has one core so far"):
        run(operated("mlp"), "pt2", tmp_path / "out", core="french")
    with pytest.raises(ExportError, match="format 'pt2' has no option tokenizer"):
        run(operated("mlp"), "pt2", tmp_path / "out", tokenizer="words")
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_is_no_exporter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(model, path, inputs, options): ...

    @dataclasses.dataclass
    class Thawed: ...

    @dataclasses.dataclass(frozen=True)
    class Frozen: ...

    for parts, why in (
        ({"write": write, "Options": Frozen}, "no DEFAULT_NAME"),
        ({"DEFAULT_NAME": None, "write": write, "Options": Thawed}, "must be a frozen dataclass"),
        ({"DEFAULT_NAME": None, "write": write, "Options": Frozen}, "must take model, path, example_inputs, options"),
    ):
        module = types.ModuleType("exporters.formats.odd")
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        with pytest.raises(TypeError, match=why):
            load_exporter("odd")


@each_format
def test_a_directory_with_something_in_it_is_kept(format: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="new or empty directory"):
        run(operated("mlp"), format, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@each_format
def test_an_existing_empty_directory_is_filled(format: str, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert all(file.is_relative_to(folder) for file in run(operated("mlp"), format, folder).files)


@each_format
def test_a_plain_module_needs_example_inputs_that_fit(format: str, tmp_path: Path) -> None:
    p = operated("mlp")
    if getattr(MODULES[format], "NEEDS_INPUTS", True):
        with pytest.raises(InputError, match="needs example_inputs"):
            run(p, format, tmp_path / "out", example_inputs=None)
    with pytest.raises(InputError, match="does not run"):
        run(p, format, tmp_path / "out", example_inputs=torch.randn(2, 99))
    assert list(tmp_path.iterdir()) == []


class Faulty(nn.Module):
    """An MLP in which every call is counted, also by copies, and does what a test says."""

    calls = 0
    effect: Callable[[int, torch.Tensor], torch.Tensor] = staticmethod(lambda _, y: y)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 24)
        self.down = nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.tanh(self.up(x)))
        Faulty.calls += 1  # of inputs that fit
        return Faulty.effect(Faulty.calls, y)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> SmallModel:
    monkeypatch.setattr(Faulty, "calls", 0)
    monkeypatch.setattr(Faulty, "effect", Faulty.effect)  # put back whatever a test sets
    torch.manual_seed(0)
    p = operate(SmallModel("faulty", Faulty(), torch.randn(5, 12)))
    Faulty.calls = 0
    return p


def failing(module: ModuleType, error: BaseException) -> Callable[..., Any]:
    """The exporter, but something fails once everything is written."""

    @functools.wraps(module.write)
    def write(*args: Any, **kwargs: Any) -> Any:
        module.__dict__["_write"](*args, **kwargs)
        raise error

    return write


@pytest.mark.matrix
@each_format
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is full")], ids=lambda e: type(e).__name__)
def test_a_failure_in_the_middle_leaves_nothing(
    format: str, error: BaseException, faulty: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(faulty, format, tmp_path / "good")
    total, unchanged = Faulty.calls, snapshot(faulty.model)

    def expect_nothing() -> None:
        kinds = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else (SurgeryError, OSError)
        with pytest.raises(kinds):
            run(faulty, format, tmp_path / "new" / "out")
        unchanged()
        assert [file.name for file in tmp_path.iterdir()] == ["good"]

    for at in sorted({1, (total + 1) // 2, total} if total else ()):

        def fail(call: int, y: torch.Tensor, at: int = at) -> torch.Tensor:
            if call >= at:
                raise error
            return y

        Faulty.calls, Faulty.effect = 0, staticmethod(fail)  # type: ignore[assignment]
        expect_nothing()
    Faulty.effect = staticmethod(lambda _, y: y)  # type: ignore[assignment]
    module = MODULES[format]
    monkeypatch.setitem(module.__dict__, "_write", module.write)
    monkeypatch.setattr(module, "write", failing(module, error))
    expect_nothing()


@each_format
def test_what_differs_from_the_model_is_refused(format: str, faulty: SmallModel, tmp_path: Path) -> None:
    Faulty.effect = staticmethod(lambda call, y: y * (1 + 0.1 * call))  # type: ignore[assignment]
    with pytest.raises(ExportError, match="differ"):
        run(faulty, format, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


CASES = Path(__file__).read_text().count("\n@each_format\n") + 2
ROOT = Path(__file__).parents[2]
TOY = '''
"""A toy: the state dict of the merged model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from exporters.program.live_program import subject_of
from exporters.shared.agreement import compare_program
from exporters.shared.options import option
from exporters.shared.export_report import Exported

DEFAULT_NAME = "model.toy"


@dataclass(frozen=True)
class Options:
    """Options of the format "toy"."""

    order: Literal["model", "name"] = option("model", "in which order tensors are written")


def write(model, path, example_inputs, options: Options) -> Exported:
    subject = subject_of(model, example_inputs, "merged")
    state = {name: tensor.detach().clone() for name, tensor in subject.root.state_dict().items()}
    save_file(state if options.order == "model" else dict(sorted(state.items())), path)

    def run(*args, **kwargs):
        return torch.func.functional_call(subject.root, load_file(path), args, kwargs, tie_weights=False)

    return Exported(compare_program(subject, run, lambda coeff: None, "the toy"), {"order": options.order})
'''


@pytest.mark.long
def test_a_new_file_is_all_that_a_new_format_needs(tmp_path: Path) -> None:
    """The whole contract, and the command line, on a copy of the tree that has one file more."""
    for package in ("surgery", "passes", "exporters", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "exporters" / "formats" / "toy.py").write_text(TOY)

    def run_in_copy(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    contract = Path(__file__).relative_to(ROOT)
    out = run_in_copy("-m", "pytest", str(contract), "-k", "toy", "-p", "no:cacheprovider")
    passed = re.search(r"(\d+) passed", out)  # only the copy has a toy, so that the copy was imported
    assert passed, out
    assert int(passed[1]) == CASES, out  # each of the contract's tests, with both models and both errors
    assert "failed" not in out
    assert "skipped" not in out
    shown = "from exporters.cli import options; print(options()['order'])"
    assert "toy: in which order tensors are written: model, name (default: model)." in run_in_copy("-c", shown)
