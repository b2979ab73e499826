"""What was aimed at, and what the recorded runs show: a table with a verdict for each target."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.common.timing import quartiles
from bench.micro import lowerings

Row = dict[str, Any]


class Measured(NamedTuple):
    """A figure in favour of or against a target, by what was measured, with its quartiles (or itself)."""

    of: str
    value: float
    low: float
    high: float


class Target(NamedTuple):
    """What was aimed at.

    Attributes:
        what: in words.
        limit: that every figure has to keep.
        most: whether the limit is the largest value, or else the smallest.
        found: the figures.
    """

    what: str
    limit: float
    most: bool
    found: list[Measured]

    def verdict(self) -> str:
        """Reached by all medians; else how many miss it, and whether the limit lies within the quartiles of those."""
        missed = [m for m in self.found if (m.value > self.limit if self.most else m.value < self.limit)]
        if not missed:
            return "reached"
        within = all((m.low <= self.limit) if self.most else (m.high >= self.limit) for m in missed)
        word = "within the quartiles" if within else "missed"
        return f"{word} ({len(missed)} of {len(self.found)})"


def _ratio(of: str, over: Sequence[Sequence[float]], under: Sequence[Sequence[float]] | float = 1.0) -> Measured:
    """Paired ratios to the base, over those of another contender (its median) or a number."""
    low, middle, high = quartiles(over)
    by = under if isinstance(under, float) else quartiles(under)[1]
    return Measured(of, middle / by, low / by, high / by)


def _overhead(row: Row, other: str) -> Measured:
    """The overhead of ``auto`` over the frozen base, as a share of another's."""
    share = lowerings.ratio(row, other) - 1
    low, middle, high = (q - 1 for q in quartiles(row["milliseconds"]["auto"]))
    return Measured(row["mode"], middle / share, low / share, high / share)


def of_lowerings(rows: list[Row]) -> Iterator[Target]:
    """Targets of the lowerings, on a decoder layer of Qwen3-0.6B's sizes."""
    forwards = [row for row in rows if row["kind"] == "inference"]
    at = [(f"{row['mode']}, r = {row['r']}", row, row["milliseconds"]) for row in forwards]
    yield Target("a live core under `dense`, over the plain base: at most 1.02", 1.02, True,
                 [_ratio(of, ms["dense"]) for of, _, ms in at])  # fmt: skip
    yield Target("a change of coeff under `dense`: at most one forward", 1.0, True, [
        Measured(of, *(q - quartiles(ms["dense"])[1] for q in (middle, low, high)))
        for of, _, ms in at for low, middle, high in [quartiles(ms["dense, coeff changed"])]
    ])  # fmt: skip
    yield Target("the chosen low-rank lowering, over the bound of its FLOPs: at most 1.10", 1.1, True, [
        _ratio(of, ms["low-rank"], lowerings.bound(row["r"], row["tokens"])) for of, row, ms in at
    ])  # fmt: skip
    yield Target("a coeff per row under `lowrank`, over a scalar one: at most 1.05", 1.05, True,
                 [_ratio(of, ms["lowrank, coeff by row"], ms["lowrank"]) for of, _, ms in at])  # fmt: skip
    steps = [row for row in rows if row["kind"] == "training"]
    for tokens, other, limit in ((512, "LoRA", 0.8), (4096, "LoRA", 0.4), (4096, "naive residual", 0.7)):
        name = "PEFT's LoRA" if other == "LoRA" else "the naive residual form"
        yield Target(f"overhead of a training step, {tokens:,} tokens, over that of {name}: at most {limit}", limit,
                     True, [_overhead(row, other) for row in steps if row["tokens"] == tokens])  # fmt: skip


def _faster(of: str, times: dict[str, list[float]], slow: str, fast: str) -> Measured:
    low, middle, high = quartiles(list(zip(times[slow], times[fast], strict=True)))
    return Measured(of, middle, low, high)


def of_factors(data: Row) -> Iterator[Target]:
    """Targets of the factorisations, of CorDA, of calibration and of rotation."""
    rows = [(f"{' × '.join(map(str, row['shape']))}, r = {row['r']}{', i^-1/2' * bool(row['decay'])}", row)
            for row in data["factorisation"]]  # fmt: skip
    for method, least, excess in (("exact", 1.3, 1e-5), ("randomised", 4.0, 1e-2)):
        yield Target(f"{method} factors, faster than the full SVD: at least {least:g}×", least, False,
                     [_faster(of, row["milliseconds"], "svd", method) for of, row in rows])  # fmt: skip
        yield Target(f"excess residual of {method} factors: at most {excess:.0e}", excess, True,
                     [Measured(of, *[row[method]["excess_residual"]] * 3) for of, row in rows])  # fmt: skip
    wide = [row for row in data["corda"] if row["shape"] == [1024, 3072]]
    yield Target("CorDA's initialisation on 1024 × 3072, faster than the original's: at least 7×", 7.0, False, [
        _faster("from the moment", row["milliseconds"], "original, from C", "ours, from the moment") for row in wide
    ])  # fmt: skip
    yield Target("difference of its U diag(S) P: at most 1e-04", 1e-4, True,
                 [Measured("", *[row["error"]["ours"]] * 3) for row in data["corda"]])  # fmt: skip
    first, last = data["memory"]
    grown = last["peak_bytes"] / first["peak_bytes"] if first["peak_bytes"] else float(last["peak_bytes"] > 0)
    yield Target("memory of a calibration, ten times the tokens: at most 1.10", 1.1, True,
                 [Measured("above what was held", *[grown] * 3)])  # fmt: skip
    cores = {row["variant"]: {"ms": row["forward_backward"]} for row in data["cores"]}
    times = {name: cores[name]["ms"] for name in ("antipasto_rot", "antipasto")}
    yield Target("forward and backward of `antipasto_rot`, over `antipasto`: at most 1.10", 1.1, True,
                 [_faster("4,096 tokens", times, "antipasto_rot", "antipasto")])  # fmt: skip


def targets(folder: Path) -> list[Target]:
    """All targets of which there are recorded runs."""
    found: list[Target] = []
    if (folder / "lowerings.jsonl").exists():
        found += of_lowerings(lowerings.read(folder / "lowerings.jsonl"))
    if (folder / "factors.json").exists():
        found += of_factors(json.loads((folder / "factors.json").read_text()))
    return [target for target in found if target.found]


def _figures(found: list[Measured]) -> str:
    """All figures, or the range and the median of many."""
    if len(found) <= 4:
        return "; ".join(f"{_number(m.value)}{f' ({m.of})' * bool(m.of)}" for m in found)
    values = sorted(m.value for m in found)
    return f"{_number(values[0])} to {_number(values[-1])}, median {_number(statistics.median(values))} of {len(found)}"


def _number(value: float) -> str:
    return f"{value:.1e}" if abs(value) < 1e-2 else f"{value:.3f}" if abs(value) < 2 else f"{value:.2f}"


def markdown(folder: Path) -> str:
    """The targets as a table."""
    lines = ["| target | measured | |", "|---|---|---|"]
    lines += [f"| {target.what} | {_figures(target.found)} | {target.verdict()} |" for target in targets(folder)]
    return "\n".join(lines) + "\n"
