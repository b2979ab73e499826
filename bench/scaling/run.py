"""How costs grow: ``python -m bench scaling``.

One size is varied at a time. Forwards and training steps are timed beside the plain base, and what an adapter adds is
the paired difference; factorisations and calibrations are timed by themselves, in one thread, taking turns. A point is
a line of ``scaling.jsonl`` as soon as it is there, and one that is there already is not measured again.

The limits are what FLOPs grow with. Those of forwards and steps are counted: the products of low-rank forwards grow
with rank, sites, tokens and width, while steps run as ``auto`` has it. A factorisation grows with the cube of the
width, a randomised one of few directions with its square, the sums of a calibration with the tokens and the square of
the width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.paired_timing import run_of, spread, timed
from bench.common.result_provenance import environment
from bench.common.results_store import Store, lines
from bench.common.runs import products
from bench.common.timing import alternate
from bench.models.decoder import CONFIGS, Decoder, Shape, Sizes, decoder, inputs
from bench.models.random_weights import TwoLinears, weight_of
from surgery import apply_surgery, calibrate, sites
from surgery.factors.svd import factorise
from surgery.support.determinism import one_thread
from surgery.support.progress_bar import track

KEY = ("axis", "line", "x", "device", "threads", "seed", "repeats")
CPU = torch.device("cpu")
SECONDS = 6.0  # that a pair of contenders takes, where that is enough
TOKENS, RANK = 512, 64
Row = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """Lines of cost against one size.

    Attributes:
        label: of the size, in words.
        expected: by line, the exponent that FLOPs say; None where they are counted with each point.
        sizes: to measure.
        measure: gives the rows of a size, by line.
    """

    label: str
    expected: dict[str, float | None]
    sizes: tuple[int, ...]
    measure: Callable[[int, int], dict[str, Row]]


def read(path: Path) -> list[Row]:
    """The recorded points."""
    return lines(path, (*KEY, "milliseconds"), "python -m bench scaling")


def layers_of(hidden: int, layers: int = 1) -> Sizes:
    """Decoder layers of a width, in the proportions of Qwen3."""
    return Sizes(hidden, 3 * hidden, hidden // 64, hidden // 128, 64, layers)


def operated(model: nn.Module, r: int, lowering: str, targets: Any = None) -> None:
    """Operate on a model, in place."""
    apply_surgery(model, "antipasto", r=r, lowering=lowering, target_modules=targets, progress=False)


def adapted(base: Decoder, r: int, lowering: str, targets: Any = None) -> nn.Module:
    """A copy with live cores away from their start."""
    model = copy.deepcopy(base)
    operated(model, r, lowering, targets)
    with torch.no_grad():
        for site in sites(model).values():
            site.core.g.normal_(0, 0.2)
    return model


def beside(model: nn.Module, base: nn.Module, x: Tensor, repeats: int, *, training: bool = False) -> Row:
    """A model and the base in turn."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad} if training else {}
    runs = (run_of(model, x, trained, training=training), run_of(base, x, {}, training=training))
    for run in runs:
        run()
    return timed(*runs, repeats, SECONDS, CPU) | {"flops": [products(run, CPU) for run in runs]}


def against_base(base: Decoder, sizes: Sizes, tokens: int, r: int, repeats: int, targets: Any = None) -> dict[str, Row]:
    """What low-rank forwards, and training steps as ``auto`` has them, add to the base's."""
    x = inputs(sizes, Shape(1, tokens), next(base.parameters()), 0)
    found = {"forward, low-rank": beside(adapted(base, r, "lowrank", targets), base, x, repeats)}
    base.every_token = True
    return found | {"training step": beside(adapted(base, r, "auto", targets), base, x, repeats, training=True)}


def by_rank(r: int, repeats: int) -> dict[str, Row]:
    """On a layer of Qwen3-0.6B."""
    sizes = CONFIGS["qwen3-0.6b-layer"]
    return against_base(decoder(sizes, CPU, torch.float32, 0), sizes, TOKENS, r, repeats)


def by_tokens(tokens: int, repeats: int) -> dict[str, Row]:
    """On a layer of Qwen3-0.6B; the base's own time as well."""
    sizes = CONFIGS["qwen3-0.6b-layer"]
    found = against_base(decoder(sizes, CPU, torch.float32, 0), sizes, tokens, 4 * RANK, repeats)
    return found | {"the base's forward": own(found["forward, low-rank"])}


def by_width(hidden: int, repeats: int) -> dict[str, Row]:
    """On one layer; the base's own time as well."""
    sizes = layers_of(hidden)
    found = against_base(decoder(sizes, CPU, torch.float32, 0), sizes, TOKENS, RANK, repeats)
    return found | {"the base's forward": own(found["forward, low-rank"])}


def own(row: Row) -> Row:
    """The base's time in a row, as a row."""
    return {"milliseconds": row["base_milliseconds"], "flops": [row["flops"][1]]}


DEPTH = 16


def by_sites(count: int, repeats: int) -> dict[str, Row]:
    """In a decoder of 16 narrow layers, of which the first ones are adapted; surgery's own time as well."""
    sizes = layers_of(256, DEPTH)
    base = decoder(sizes, CPU, torch.float32, 0)
    names = [name for name, module in base.layers.named_modules() if isinstance(module, nn.Linear)][:count]
    targets = [f"layers.{name}" for name in names]
    found = against_base(base, sizes, TOKENS // 4, RANK, repeats, targets)
    rounds = max(3, repeats // 3)
    copies = [copy.deepcopy(base) for _ in range(rounds + 1)]
    times = alternate({"it": lambda: operated(copies.pop(), RANK, "auto", targets)}, rounds)
    return found | {"surgery": {"milliseconds": spread(times["it"])}}


def by_weight(d: int, repeats: int) -> dict[str, Row]:
    """A square weight, in one thread."""
    W = weight_of(d, d, 0.5)
    run = {
        "full SVD": lambda: torch.linalg.svd(W, full_matrices=False),
        "exact": lambda: factorise(W, RANK, "exact"),
        "randomised": lambda: factorise(W, RANK, "randomised"),
    }
    with one_thread():
        times = alternate(run, max(3, repeats // 3))
    return {line: {"milliseconds": spread(found)} for line, found in times.items()}


def calibrated(d: int, tokens: int, repeats: int) -> dict[str, Row]:
    """The pass of CorDA over so many tokens, and the model's own forwards of them, which it contains."""
    torch.manual_seed(0)
    model, batches = TwoLinears(d), [torch.randn(512, d) for _ in range(tokens // 512)]

    def forwards() -> None:
        with torch.no_grad():
            for x in batches:
                model(x)

    run = {"calibration": lambda: calibrate(model, "antipasto_corda", batches, r=RANK, progress=False)}
    with one_thread():
        times = alternate({**run, "its forwards": forwards}, max(3, repeats // 3))
    return {line: {"milliseconds": spread(found)} for line, found in times.items()}


LINES: dict[str, float | None] = {"forward, low-rank": None, "training step": None}
CURVES = {
    "rank": Curve("rank", LINES, (8, 16, 32, 64, 128, 256, 512), by_rank),
    "sites": Curve("adapted sites", {**LINES, "surgery": 1.0}, (7, 14, 28, 56, 112), by_sites),
    "tokens": Curve("tokens", {**LINES, "the base's forward": None}, (16, 64, 256, 1024, 4096), by_tokens),
    "width": Curve("width", {**LINES, "the base's forward": None}, (256, 512, 1024, 2048), by_width),
    "factorisation": Curve(
        "width of a square weight", {"full SVD": 3.0, "exact": 3.0, "randomised": 2.0}, (256, 512, 1024, 2048),
        by_weight,
    ),
    "calibration, tokens": Curve(
        "tokens", {"calibration": 1.0, "its forwards": 1.0}, (2048, 4096, 8192, 16384, 32768),
        lambda tokens, repeats: calibrated(512, tokens, repeats),
    ),
    "calibration, width": Curve(
        "width", {"calibration": 2.0, "its forwards": 2.0}, (128, 256, 512, 1024),
        lambda d, repeats: calibrated(d, 4096, repeats),
    ),
}  # fmt: skip


def run(out: Path, axes: list[str], repeats: int, *, seed: int = 0, most: int | None = None) -> None:
    """Measure the points that are not there yet, from small ones to large ones."""
    source = environment()
    where = {"device": source["hardware"], "threads": source["threads"], "seed": seed, "repeats": repeats}
    store = Store(out, read(out), KEY)
    todo = [(axis, x) for axis in axes for x in CURVES[axis].sizes if most is None or x <= most]
    left = [
        (axis, x) for axis, x in todo
        if any({"axis": axis, "line": line, "x": x, **where} not in store for line in CURVES[axis].expected)
    ]  # fmt: skip
    for axis, x in track(left, "points", enabled=bool(left)):
        torch.manual_seed(seed)
        for line, row in CURVES[axis].measure(x, repeats).items():
            store.put({"axis": axis, "line": line, "x": x, **where, **row, **source})
