"""The speed matrix: contenders × runtimes × shapes of one decoder, each checked before it is timed.

The base is timed beside each contender, before and after it in turn, in one process; ratios are of such pairs. A cell
is written as soon as it is measured, and one that is there is not measured again, unless it is asked for or packages or
settings are others.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common.paired_timing import run_of, timed
from bench.common.result_provenance import environment
from bench.common.results_store import Store, key, read
from bench.models.decoder import CONFIGS, Shape, Sizes, decoder, inputs, shapes
from bench.speed.check import LIMIT, Answer, answer, errors
from bench.speed.contenders import BASE, BESIDE, CONTENDERS, FIRST, Absent, Contender, Makers
from bench.speed.roofline import ceilings, minimum_ms, work
from bench.speed.runtimes import RUNTIMES, Call, exists, prepare


@dataclass(frozen=True)
class SpeedSettings:
    """Options of a run, as on the command line; ``layers`` None is the configuration's own number, ``backend`` that of
    ``torch.compile``; ``again`` measures what is there already too."""

    out: Path
    config: str = "qwen3-0.6b-layer"
    layers: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    r: int = 256
    tokens: int = 512
    runtimes: tuple[str, ...] = ("eager", "compile", "aoti", "onnx")
    contenders: tuple[str, ...] = CONTENDERS
    shapes: tuple[str, ...] = ("prefill", "decode 1", "training", "decode 8", "decode 32")
    repeats: int = 15
    cell_seconds: float = 8.0
    minutes: float | None = None
    seed: int = 0
    backend: str = "inductor"
    again: bool = False

    @property
    def sizes(self) -> Sizes:
        """Of the configuration, with this number of layers."""
        own = CONFIGS[self.config]
        return Sizes(**(vars(own) | {"layers": self.layers or own.layers}))


def cells(settings: SpeedSettings) -> Iterator[tuple[str, str, str]]:
    """Runtime, shape and contender of every cell, the most important ones first."""

    def rank(cell: tuple[str, str, str]) -> tuple[Any, ...]:
        runtime, shape, contender = cell
        second = contender not in FIRST or shape in ("decode 8", "decode 32")
        order = list(shapes(settings.tokens))
        return second, RUNTIMES.index(runtime), order.index(shape), CONTENDERS.index(contender)

    device, kinds, dtype = torch.device(settings.device), shapes(settings.tokens), getattr(torch, settings.dtype)
    for cell in sorted(itertools.product(settings.runtimes, settings.shapes, settings.contenders), key=rank):
        if exists(cell[0], cell[2], device, dtype, training=kinds[cell[1]].training):
            yield cell


def named(
    settings: SpeedSettings, source: Mapping[str, Any], runtime: str, shape: str, contender: str
) -> dict[str, Any]:
    """What a cell's row says before it is measured: what identifies it, how it is measured, and where it comes from."""
    s, device = settings, torch.device(settings.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else source["hardware"]
    found = {"config": s.config, "layers": s.sizes.layers, "dtype": s.dtype, "r": s.r, "tokens": s.tokens}
    found |= {"runtime": runtime, "contender": contender, "shape": shape, "device": where}
    found |= {"threads": torch.get_num_threads(), "seed": s.seed, "repeats": s.repeats, "cell_seconds": s.cell_seconds}
    found["backend"] = s.backend if runtime in ("compile", "max-autotune") else None  # only there is one
    return found | dict(source)


class Matrix:
    """What the cells share: the base, its compiled forms, references, and the machine's ceilings; it takes long."""

    def __init__(self, settings: SpeedSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.device, self.dtype = torch.device(settings.device), getattr(torch, settings.dtype)
        self.sizes = settings.sizes
        torch.manual_seed(settings.seed)
        self.base = decoder(self.sizes, self.device, self.dtype, settings.seed)
        self.makers = Makers(self.base, settings.r, settings.seed)
        self.machine = ceilings(self.sizes, settings.tokens, self.device, self.dtype)
        self.shapes = shapes(settings.tokens)
        self.answers: dict[tuple[Any, ...], Answer] = {}
        self.bases: dict[tuple[str, str], tuple[Call, float]] = {}

    def measure(self, runtime: str, shape_name: str, name: str) -> dict[str, Any]:
        """One cell: built, prepared, checked, timed; a wrong one is not timed, and one that fails says why."""
        shape, started = self.shapes[shape_name], time.perf_counter()
        x = inputs(self.sizes, shape, next(self.base.parameters()), self.settings.seed)
        try:
            contender = self._made(name, x, shape)
            built = time.perf_counter() - started
            base, first = self._base(runtime, shape_name, x)
            if name == BESIDE:  # the base goes through the class's own code first
                answer(
                    self._prepared(runtime, self._made(BASE, x, shape), x, shared=True), x, {}, training=shape.training
                )
            started = time.perf_counter()
            call = base if name == BASE else self._prepared(runtime, contender, x, shared=name == BESIDE)
            found = answer(call, x, contender.trained, training=shape.training)
            first = first if name == BASE else time.perf_counter() - started
            wrong = self._errors(found, contender, shape_name, x)
            row: dict[str, Any] = {"errors": wrong, "limit": LIMIT[self.dtype], "build_seconds": round(built, 2)}
            row["first_seconds"] = round(first, 2)  # of exporting, compiling and the first run
            if not all(e <= LIMIT[self.dtype] for e in wrong.values()):
                return {"status": "wrong", **row}
            counted = work(
                run_of(contender.model, x, contender.trained, training=shape.training), found.output, self.device
            )
            row |= {**counted, "ceilings": self.machine, "minimum_ms": minimum_ms(counted, self.machine)}
            pair = (
                run_of(call, x, contender.trained, training=shape.training),
                run_of(base, x, {}, training=shape.training),
            )
            return {
                "status": "ok",
                **row,
                **timed(*pair, self.settings.repeats, self.settings.cell_seconds, self.device),
            }
        except Absent as absent:
            return {"status": "absent", "reason": str(absent)}
        except Exception as error:  # of any runtime: the cell is written down as failed, and tried again the next time
            return {"status": "failed", "reason": "".join(traceback.format_exception_only(error)).strip()[:500]}

    def _made(self, name: str, x: Tensor, shape: Shape) -> Contender:
        contender = self.makers.make(name, x, training=shape.training)
        contender.model.every_token = shape.training  # type: ignore[assignment]
        return contender

    def _prepared(self, runtime: str, contender: Contender, x: Tensor, *, shared: bool = False) -> Call:
        return prepare(runtime, contender.model, x, self.folder, shared=shared, backend=self.settings.backend)

    def _base(self, runtime: str, shape_name: str, x: Tensor) -> tuple[Call, float]:
        """The base, prepared once for a runtime and a shape, and the seconds which that and its first run took."""
        at, shape = (runtime, shape_name), self.shapes[shape_name]
        if at not in self.bases:
            contender, started = self._made(BASE, x, shape), time.perf_counter()
            call = self._prepared(runtime, contender, x)
            answer(call, x, {}, training=shape.training)
            self.bases[at] = call, time.perf_counter() - started
        return self.bases[at]

    def _errors(self, found: Answer, contender: Contender, shape_name: str, x: Tensor) -> dict[str, float]:
        """Errors against the contender's reference, over what that differs from the base by."""
        training, higher = self.shapes[shape_name].training, self.makers.higher
        for family, make in ((BASE, self.makers.base_reference), (contender.family, contender.reference)):
            if (family, shape_name) not in self.answers:
                model, trained = make()
                model.every_token = training  # type: ignore[assignment]
                self.answers[family, shape_name] = answer(model, x.to(higher), trained, training=training)
        base, reference = (self.answers[family, shape_name] for family in (BASE, contender.family))
        return errors(found, reference, base, contender.family != BASE)


def run(settings: SpeedSettings, say: Callable[[str], None] = print) -> bool:
    """Measure what is not there yet, until it is done or the time is up; tells whether all that there is is right."""
    deadline = math.inf if settings.minutes is None else time.monotonic() + 60 * settings.minutes
    store, longest = Store(settings.out, read(settings.out)), 0.0
    source = environment()  # before a row is written, which changes the checkout
    wanted = {cell: named(settings, source, *cell) for cell in cells(settings)}
    todo = [cell for cell, row in wanted.items() if settings.again or not store.finished(row)]
    say(f"{len(todo)} cells to measure, {len(wanted) - len(todo)} there already: {settings.out}")
    right = all(passed(store.rows[key(row)]) for cell, row in wanted.items() if cell not in todo)
    if not todo:
        return right
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(settings, Path(folder)) if time.monotonic() < deadline else None
        for number, cell in enumerate(todo, start=1):
            if matrix is None or time.monotonic() + longest > deadline:
                say(f"the time is up: {len(todo) - number + 1} cells are left for another run")
                break
            started = time.monotonic()
            row = {**wanted[cell], **matrix.measure(*cell)}
            longest = max(longest, time.monotonic() - started)
            store.put(row)
            right = right and passed(row)
            say(f"{number}/{len(todo)} {', '.join(cell)}: {told(row)}")
    return right


def passed(row: Mapping[str, Any]) -> bool:
    """Whether a row is as it should be: neither failed nor wrong, but for the one contender that shows a trap."""
    return row["status"] not in ("failed", "wrong") or (row["status"] == "wrong" and row["contender"] == BESIDE)


def told(row: Mapping[str, Any]) -> str:
    """A row in a few words."""
    if row["status"] == "ok":
        ms, ratio = row["milliseconds"]["median"], row["ratio"]
        return f"{ms:.2f} ms, {ratio['median']:.3f} of the base ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
    if row["status"] == "wrong":
        return f"WRONG, not timed: {row['errors']} of the adapter's effect"
    return f"{row['status']}: {row['reason']}"
