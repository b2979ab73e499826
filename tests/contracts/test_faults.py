"""A fault at every call and every return of every verb: the model and the files are the old or the new, never between.

A first run of an operation counts the calls and the returns of functions in ``passes``, ``surgery`` and ``exporters``,
resumed generators (and so the exits of context managers) among them. Then the operation is run again and again, and
each time another of them raises. What is rolled back is not disturbed: a fault is single.

The fast lane takes an evenly spread sample of these places, the full one takes all of them, up to ``LIMIT`` per case,
and as many as fit ``SECONDS``.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import fx, nn

import exporters
import passes
import surgery
from exporters import export, export_core, merge_checkpoint
from surgery import (
    apply_surgery,
    fold,
    load_adapter,
    merge,
    recalibrate,
    save_adapter,
    set_coeff,
    sites,
    steer,
    to_graph,
    undo_surgery,
)
from surgery.modules.adapter import Adapter
from tests.support import expert_models, packed_attention
from tests.support.fault_points import POINTS
from tests.support.model_state import state_of
from tests.support.operated_models import randomise
from tests.support.processes import at_call, calls_of, in_child
from tests.support.zoo import SmallModel, small_model

FOLDERS = tuple(str(Path(package.__path__[0])) + os.sep for package in (passes, surgery, exporters))
ERRORS = (RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError, MemoryError)
SAMPLE, LIMIT, SECONDS = 5, 400, 30
Record = Callable[[str, object], None]


class Places:
    """Counts the calls and returns of functions of the packages, and raises at one of them."""

    def __init__(self, at: int = -1, error: type[BaseException] = RuntimeError) -> None:
        self.at, self.error, self.count = at, error, 0
        self.where = ""

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        # to leave a generator may be to yield: it is who resumed it that is interrupted, and closing it runs its exits
        leaves = event == "return" and not code.co_flags & inspect.CO_GENERATOR
        if not (event == "call" or leaves) or not code.co_filename.startswith(FOLDERS):
            return
        if code.co_qualname.startswith("_Sink."):  # called by torch's writer, while interrupts wait
            return
        self.count += 1
        if self.count == self.at + 1:
            self.where = f"{event} of {frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
            sys.setprofile(None)
            raise self.error("injected")

    @contextmanager
    def watching(self) -> Iterator[None]:
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)


def everything(p: SmallModel) -> list[str]:
    """All that may be seen of a model: what ``state_of`` has, and hooks, tables, graph, record, outputs."""
    model, lines = p.model, list(state_of(p.model))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) in (dict, OrderedDict, set, list):
                items = list(value.items()) if isinstance(value, dict) else sorted(map(id, value))
                lines.append(f"{path} {name} {id(value)} {[(k, id(v)) for k, v in items if not callable(k)]}" if items
                             and isinstance(items[0], tuple) else f"{path} {name} {id(value)} {items}")  # fmt: skip
        if isinstance(module, Adapter):
            lines.append(f"{path} host {[(n, id(v)) for n, v in vars(module.host).items()]} {module.form}")
    if isinstance(model, fx.GraphModule):
        lines += [model.code, str(id(model.graph)), str(sorted(vars(type(model))))]
    record = vars(model).get("_surgery")
    if record is not None:
        notes = {key: sorted(note.items(), key=str) for key, note in record.factorisation.items()}
        lines += [f"record {id(record)} {sorted(record.requires_grad.items())} {notes}"]
        if record.original is not None:
            lines.append(f"original {list(record.original.parameters)} {list(record.original.modules)}")
    if hasattr(model, "config"):
        lines.append(str(model.config.to_dict()))
    lines.append(f"coeff {[(key, site.steering.coeff.tolist()) for key, site in sites(model).items()]}")
    lines.append(f"fastpath {torch.backends.mha.get_fastpath_enabled()} {torch.is_grad_enabled()}")
    numbers = torch.get_rng_state()
    lines.append(f"random {hashlib.sha256(numbers.numpy().tobytes()).hexdigest()} {hash(random.getstate())}")
    lines.append(f"output {digest(p.run())}")
    torch.set_rng_state(numbers)
    return lines


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def result(p: SmallModel) -> list[str]:
    """What an operation gives, the same for equal models."""
    tensors = [*p.model.named_parameters(remove_duplicate=False), *p.model.named_buffers()]
    lines = [f"{n} {t.requires_grad} {t.dtype} {digest(t.detach())}" for n, t in tensors]
    lines += [f"{path} {type(m).__name__} {m.training}" for path, m in p.model.named_modules()]
    lines += [f"{key} {site.form} {site.steering.coeff.tolist()}" for key, site in sites(p.model).items()]
    return [*lines, digest(p.run())]


def files(folder: Path) -> dict[str, bytes | None]:
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in sorted(folder.rglob("*"))}


# The models: how a fresh one is made, before any operation.


def packed() -> SmallModel:
    return SmallModel("packed", packed_attention.attention(), packed_attention.CALLS["self"])


def experts() -> SmallModel:
    return SmallModel("experts", expert_models.build("mixtral"), {"input_ids": expert_models.IDS})


def graph() -> SmallModel:
    p = small_model("mlp")
    return SmallModel("graph", fx.symbolic_trace(p.model).eval(), p.inputs)


HOSTS: dict[str, tuple[Callable[[], SmallModel], dict[str, Any]]] = {
    "mlp": (lambda: small_model("mlp"), {}),
    "raw": (lambda: small_model("raw"), {}),
    "attention": (lambda: small_model("attention"), {}),
    "residual": (lambda: small_model("mlp"), {"form": "residual"}),
    "dropped": (lambda: small_model("mlp"), {"form": "residual", "keep_base": False}),
    "packed": (packed, {"target_modules": packed_attention.QV}),
    "graph": (graph, {}),
    "experts": (experts, {}),
    "qwen3": (lambda: small_model("qwen3"), {}),
}


def operate(p: SmallModel, options: dict[str, Any], **more: Any) -> None:
    apply_surgery(p.model, "antipasto", **{"r": 3, "example_inputs": p.inputs, "progress": False, **options, **more})


def data(p: SmallModel) -> list[Any]:
    return [p.inputs]


@dataclass(frozen=True)
class Case:
    """An operation on a model.

    Attributes:
        before: what is done to a fresh model first; gets a folder.
        act: the operation.
        writes: whether it writes files, and leaves the model alone.
    """

    host: str
    before: Callable[[SmallModel, Path], Any]
    act: Callable[[SmallModel, Path], Any]
    writes: bool = False


def trained(p: SmallModel, _: Path, options: dict[str, Any] | None = None) -> None:
    torch.manual_seed(0)
    operate(p, HOSTS[p.host][1] if options is None else options)  # type: ignore[attr-defined]
    randomise(p.model, 0.5)
    set_coeff(p.model, 0.75)


def saved(p: SmallModel, folder: Path) -> None:
    trained(p, folder)
    save_adapter(p.model, folder / "adapter")
    randomise(p.model, 0.1)


def saved_and_plain(p: SmallModel, folder: Path) -> None:
    saved(p, folder)
    undo_surgery(p.model)


def checkpoint(p: SmallModel, folder: Path) -> None:
    p.model.save_pretrained(folder / "base")  # type: ignore[operator]
    saved(p, folder)


def nothing(p: SmallModel, folder: Path) -> None:
    pass


def steered(p: SmallModel, _: Path) -> None:
    with steer(p.model, 0.5):
        p.run()


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for host, (_, options) in HOSTS.items():
        found[f"apply {host}"] = Case(host, nothing, lambda p, _, o=options: operate(p, o))
        found[f"set_coeff {host}"] = Case(host, trained, lambda p, _: set_coeff(p.model, -0.25))
        found[f"steer {host}"] = Case(host, trained, steered)
        found[f"merge {host}"] = Case(host, trained, lambda p, _: merge(p.model))
        found[f"save {host}"] = Case(host, saved, lambda p, f: save_adapter(p.model, f / "adapter"), writes=True)
        found[f"load {host}"] = Case(host, saved_and_plain, lambda p, f: load_adapter(p.model, f / "adapter"))
        if host == "dropped":
            found.pop(f"load {host}")
            continue
        found[f"undo {host}"] = Case(host, trained, lambda p, _: undo_surgery(p.model))
        found[f"load over {host}"] = Case(host, saved, lambda p, f: load_adapter(p.model, f / "adapter"))
        found[f"recalibrate {host}"] = Case(
            host, trained, lambda p, _: recalibrate(p.model, data(p), reset=True, progress=False)
        )
    second = [("mlp", "0", ["2", "4"]), ("raw", "w", ["v", "out"]), ("graph", "0", ["2", "4"])]
    for host, first, rest in second:
        found[f"apply again {host}"] = Case(
            host,
            lambda p, f, t=first: trained(p, f, {"target_modules": [t]}),
            lambda p, _, t=rest: operate(p, {"target_modules": t}),
        )
    for host in ("mlp", "raw", "qwen3"):
        found[f"to_graph {host}"] = Case(host, trained, lambda p, _: to_graph(p.model, p.inputs, verify=True))
    found["to_graph packed"] = Case("packed", trained, lambda p, _: to_graph(p.model, p.inputs))
    found["to_graph residual form mlp"] = Case(
        "mlp", trained, lambda p, _: to_graph(p.model, p.inputs, form="residual")
    )
    for freeze in (False, True):
        found[f"fold {freeze} graph"] = Case("graph", trained, lambda p, _, f=freeze: fold(p.model, freeze_core=f))
    found["fold verify graph"] = Case("graph", trained, lambda p, _: fold(p.model, verify=p.inputs))
    found["merge verify graph"] = Case("graph", trained, lambda p, _: merge(p.model, verify=p.inputs))
    found["merge untie qwen3"] = Case(
        "qwen3",
        lambda p, f: trained(p, f, {"target_modules": ["lm_head"]}),
        lambda p, _: merge(p.model, untie=True),
    )
    slow = {"onnx": {}, "pt2": {"mode": "live"}, "torchscript": {}, "lora": {}, "dense": {}}
    for format, options in slow.items():
        host = "qwen3" if format == "lora" else "mlp"
        found[f"export {format} {host}"] = Case(
            host,
            trained,
            lambda p, f, n=format, o=options: export(p.model, n, f / "out", example_inputs=p.inputs, **o),
            writes=True,
        )
    found["export_core mlp"] = Case(
        "mlp", trained, lambda p, f: export_core(p.model, f / "core.onnx_adapter"), writes=True
    )
    found["merge_checkpoint qwen3"] = Case(
        "qwen3",
        checkpoint,
        lambda _, f: merge_checkpoint(f / "base", f / "adapter", f / "out", progress=False),
        writes=True,
    )
    return found


CASES = cases()
HEAVY = ("export onnx", "export pt2", "export torchscript", "recalibrate experts", "apply experts", "to_graph qwen3")
FAST = [name for name in CASES if not name.startswith(HEAVY) and not name.endswith((" qwen3", " experts"))]
FAST = [name for name in FAST if name not in ("to_graph packed", "to_graph residual form mlp", "to_graph raw")]
FAST += ["merge untie qwen3", "merge experts", "export lora qwen3"]


def begin(case: Case, folder: Path) -> SmallModel:
    """A model as the operation finds it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    p = HOSTS[case.host][0]()
    p.host = case.host  # type: ignore[attr-defined]
    case.before(p, folder)
    torch.manual_seed(1)
    p.run()
    return p


def survive(name: str, folder: Path, limit: int) -> int:
    """Put a case through its faults; gives how many there were."""
    case = CASES[name]
    p = begin(case, folder)
    case.act(p, folder)  # what is done once in a process, such as imports and traces, is done
    started = time.perf_counter()
    p = begin(case, folder)
    places = Places()
    with places.watching():
        case.act(p, folder)
    limit = min(limit, max(SAMPLE, int(SECONDS / (time.perf_counter() - started))))
    expected, written = result(p), files(folder)
    step = max(1, -(-places.count // limit))
    points = range(random.Random(name).randrange(step), places.count, step)
    p = begin(case, folder)
    old, on_disk = everything(p), files(folder)
    for i, at in enumerate(points):
        fault = Places(at, ERRORS[i % 2] if i % 8 else ERRORS[2 + i // 8 % 2])
        raised = False
        try:
            with fault.watching():
                case.act(p, folder)
        except (fault.error, surgery.SurgeryError):  # some say what was done, and name the fault as the cause
            raised = True
        now, here = everything(p), files(folder)
        if (
            name.startswith("merge_checkpoint") and fault.error is KeyboardInterrupt
        ):  # its steps are kept, to go on with
            here = {file: value for file, value in here.items() if not file.startswith(".out.merging")}
        if now == old and here == on_disk and (raised or case.writes):
            continue
        if not raised and fell_back(p.model):
            p = begin(case, folder)
            old = everything(p)
            continue
        # the operation had been completed
        changes = [line for line in now if line not in old] if case.writes else []
        assert not changes, f"{name}: {fault.where}: {changes[:3]}"
        assert result(p) == expected, f"{name}: {fault.where}: {differences(p, old, expected)}"
        settled = {file: value for file, value in here.items() if file in written}
        assert here == settled, f"{name}: {fault.where}: {sorted(set(here) - set(written))} is left"
        assert case.writes or here == on_disk, f"{name}: {fault.where}"
        if case.writes and raised:
            assert same_files(here, written), f"{name}: {fault.where}: files are neither the old nor the new ones"
        p = begin(case, folder)
        old = everything(p)
    case.act(p, folder)
    assert result(p) == expected, f"{name}: another result after faults"
    assert same_files(files(folder), written), f"{name}: other files after faults"
    return len(points)


def fell_back(model: nn.Module) -> bool:
    """Whether an error was taken for the model's, which is then operated on without a graph, as the report says."""
    record = vars(model).get("_surgery")
    inspection = record.inspection if record is not None else None
    return inspection is not None and any("injected" in note for note in inspection.notes)


def same_files(found: dict[str, bytes | None], expected: dict[str, bytes | None]) -> bool:
    """Equal names, and equal bytes but in formats that have a time or an identifier in them."""
    vague = (".pt2", ".pt")
    return found.keys() == expected.keys() and all(
        found[name] == expected[name] or name.endswith(vague) for name in expected
    )


def differences(p: SmallModel, old: list[str], expected: list[str]) -> list[str]:
    """How the model differs from what it was, in short."""
    now = everything(p)
    new, gone = ([line[:300] for line in a if line not in b][:4] for a, b in ((now, old), (old, now)))
    return [*new, "/", *gone]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised while a generator is dropped
@pytest.mark.parametrize("name", FAST)
def test_faults_at_a_sample_of_places(name: str, tmp_path: Path, record_property: Record) -> None:
    count = survive(name, tmp_path / "place", SAMPLE)
    record_property(POINTS, count)
    assert count >= min(4, SAMPLE)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CASES)
def test_faults_at_all_places(name: str, tmp_path: Path, record_property: Record) -> None:
    count = survive(name, tmp_path / "place", LIMIT)
    record_property(POINTS, count)
    assert count >= 4


DISK = ["save mlp", "export dense mlp", "export_core mlp", "merge_checkpoint qwen3"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "save mlp" else pytest.mark.full) for n in DISK])
def test_kills_and_full_disks_on_the_way_to_the_disk(name: str, tmp_path: Path) -> None:
    case, folder = CASES[name], tmp_path / "place"
    p = begin(case, folder)
    case.act(p, folder)
    written = files(folder)
    p = begin(case, folder)
    total, old = calls_of(lambda: case.act(p, folder)), {}
    p = begin(case, folder)
    old = files(folder)
    for number in range(0, total, max(1, total // 15)):
        assert in_child(killed(partial(case.act, p, folder), number)) == -signal.SIGKILL
        seen = files(folder)
        visible = {file: value for file, value in seen.items() if not any(x[0] == "." for x in Path(file).parts)}
        if name.startswith("save"):
            reloaded = HOSTS[case.host][0]()
            load_adapter(reloaded.model, folder / "adapter")
            assert {site.core.g.sum().item() for site in sites(reloaded.model).values()} in (cores(old), cores(written))
        else:
            assert visible in (old, written)
        if visible != written:
            case.act(p, folder)
        p = begin(case, folder)
    largest = max(len(value or b"") for file, value in written.items() if old.get(file) != value)
    for size in (size for size in (0, 100, 1000) if size < largest):
        assert in_child(refused_disk(size, lambda: case.act(p, folder))) == 0
        assert files(folder) == old
    case.act(p, folder)
    assert files(folder) == written


def killed(work: Callable[[], Any], number: int) -> Callable[[], None]:
    def run() -> None:
        with at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            work()

    return run


def refused_disk(size: int, work: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with pytest.raises((surgery.SurgeryError, OSError)):
            work()

    return run


def cores(found: dict[str, bytes | None]) -> set[float]:
    tensors = load(found["adapter/adapter_model.safetensors"] or b"")
    return {tensor.sum().item() for name, tensor in tensors.items() if name.endswith("core.g")}
