"""How long a training step of each method takes: they take turns in one process and thread, at their chosen rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench.common import corpus
from bench.common.paired_timing import spread
from bench.common.result_provenance import environment
from bench.common.timing import alternate
from bench.quality.methods import BASE, Method, build
from bench.quality.training import QualitySettings, Trainer, prepare
from surgery.support.determinism import one_thread

ROUNDS = 15
Row = dict[str, Any]


def read(path: Path) -> Row | None:
    """The recorded times; None if there are none."""
    return json.loads(path.read_text()) if path.exists() else None  # type: ignore[no-any-return]


def complete(
    settings: QualitySettings, found: Sequence[Row], path: Path, cache: Path | None, rounds: int = ROUNDS
) -> None:
    """Time the steps of all methods that were run, unless the file has them.

    Args:
        found: a row for each method, with its ``rate``.
    """
    rates = {Method(row["name"], row["family"], row["kind"], row["rank"]): row["rate"] for row in found}
    rates.pop(BASE, None)
    source = {**environment(), "threads": 1, "settings": asdict(settings), "seed": 0, "rounds": rounds}
    old, same = read(path), ("settings", "versions", "hardware")
    if old and all(old[name] == source[name] for name in same) and {m.name for m in rates} <= set(old["milliseconds"]):
        return
    with one_thread():
        setting = prepare(settings, cache)
        batches = {"batch": settings.batch, "length": settings.length, "seed": 0}
        tokens, *_ = data = list(corpus.batches(setting.train, steps=settings.calibration, **batches))
        runs = {}
        for method, rate in rates.items():
            trainer = Trainer(build(method, setting.base, 0, data), rate, settings.steps)
            runs[method.name] = partial(trainer.step, tokens)
        times = alternate(runs, rounds)
    record = {**source, "milliseconds": {name: spread(values) for name, values in times.items()}}
    path.write_text(json.dumps(record, indent=1) + "\n")
