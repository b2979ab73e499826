"""The table and the words of the quality comparison, from its recorded runs."""

from __future__ import annotations

import math
import statistics
from typing import Any

from bench.quality.methods import BASE, EXTENSION, FULL, GRID, methods, rate, untrainable
from bench.quality.training import CLIP, OPTIMIZER, WARM_UP, QualitySettings

Row = dict[str, Any]
FEW = 0.01
NEAR = 1.25


def losses(row: Row) -> list[float]:
    """Held-out losses of a method's runs; infinite where one diverged."""
    return [math.inf if run["held_out_loss"] is None else run["held_out_loss"] for run in row["runs"]]


def mean(row: Row) -> float:
    """Mean held-out loss over the seeds."""
    return statistics.fmean(losses(row))


def trainable(row: Row) -> int:
    """Number of trainable parameters."""
    return int(row["runs"][0]["trainable"])


def overlap(a: Row, b: Row) -> bool:
    """Whether the ranges of two methods over the seeds meet."""
    return min(losses(a)) <= max(losses(b)) and min(losses(b)) <= max(losses(a))


def _loss(row: Row) -> str:
    found = losses(row)
    if math.isinf(max(found)):
        return "diverged"
    return f"{mean(row):.4f}" + (f" ({min(found):.4f} to {max(found):.4f})" if len(found) > 1 else "")


def _start(row: Row) -> float:
    """The largest difference of a logit from the base's before training, at the seed where it is largest."""
    return max(float(run["initial_difference"]) for run in row["runs"])


def _table(found: list[Row], base: Row, full: Row | None, times: Row) -> list[str]:
    lines = [
        "| method | trainable | learning rate | held-out loss (range) | share of full fine-tuning's gain "
        "| logits before training, off the base's by | ms a step (quartiles) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(found, key=mean):
        share = "" if full is None or row is base else f"{_share(row, base, full):.0%}"
        ms = times.get(row["name"])
        cells = [row["name"], f"{trainable(row):,}", "" if row["rate"] is None else f"{row['rate']:g}", _loss(row)]
        start = "" if row is base else f"{_start(row):.0e}" if _start(row) else "none"
        cells += [share, start, f"{ms['median']:.0f} ({ms['q1']:.0f} to {ms['q3']:.0f})" if ms else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _share(row: Row, base: Row, full: Row) -> float:
    gain = mean(base) - mean(full)
    return (mean(base) - mean(row)) / gain if gain else math.nan


def _names(rows: list[Row]) -> str:
    return ", ".join(row["name"] for row in rows)


def _shown(found: list[Row], base: Row, full: Row | None) -> list[str]:
    """What the figures say, in words."""
    trained = sorted((row for row in found if row is not base), key=mean)
    if not trained:
        return ["Nothing was trained."]
    first = trained[0]
    close = [row for row in trained[1:] if overlap(row, first)]
    lines = [f"The base has {mean(base):.4f} nats/byte. The lowest mean is that of {first['name']}: {_loss(first)}."]
    lines.append(f"Ranges that meet its own: {_names(close)}." if close else "No other method's range meets its own.")
    if full is not None and (few := [row for row in trained if 0 < trainable(row) <= FEW * trainable(full)]):
        best = few[0]
        peers = [row for row in few[1:] if overlap(row, best)]
        lines.append(
            f"With at most {FEW:.0%} of full fine-tuning's parameters the lowest is {best['name']}: {_loss(best)}, "
            f"{_share(best, base, full):.0%} of full fine-tuning's gain with {trainable(best):,} numbers"
            + (f"; ranges that meet its own: {_names(peers)}." if peers else ".")
        )
    for ours in (row for row in trained if row["family"] == "surgery"):
        for theirs in (row for row in trained if row["family"] == "peft"):
            ratio = trainable(ours) / trainable(theirs)
            if 1 / NEAR <= ratio <= NEAR:
                lower, higher = sorted((ours, theirs), key=mean)
                apart = "their ranges meet" if overlap(lower, higher) else "their ranges do not meet"
                lines.append(
                    f"At about the same number of parameters, {lower['name']} ({_loss(lower)}) is lower than "
                    f"{higher['name']} ({_loss(higher)}); {apart}."
                )
    failed = [row for row in trained if max(losses(row)) >= mean(base)]
    lines.append(
        f"Not below the base with every seed: {_names(failed)}."
        if failed
        else "Every method is below the base with every seed."
    )
    edge = [row for row in trained if row["at_edge"]]
    lines.append(
        f"The chosen rate lies at the edge of the extended grid, so a better one may lie beyond: {_names(edge)}."
        if edge
        else "Every chosen rate lies inside its grid."
    )
    moved = [f"{row['name']} ({_start(row):.0e})" for row in trained if _start(row)]
    lines.append(
        "Before training the logits are the base's bit for bit: all methods"
        + (f" but {', '.join(moved)}, in the largest logit." if moved else ".")
    )
    return lines


def _grids() -> str:
    words = {"surgery": "variants", "peft": "PEFT", "full": "full fine-tuning"}
    return "; ".join(f"{words[name]} {', '.join(f'{rate(n):g}' for n in grid)}" for name, grid in GRID.items())


def quality_markdown(found: list[Row], settings: QualitySettings, recorded: list[Row], steps: Row | None) -> str:
    """The comparison as Markdown: how it was made, the table, what it shows and what it does not.

    Args:
        found: a row for each complete method, with its ``runs``, ``rate`` and ``at_edge``.
        settings: of all runs.
        recorded: all runs, for what they say of the machine.
        steps: how long steps take, by method.
    """
    base = next(row for row in found if row["family"] == BASE.family)
    full = next((row for row in found if row["family"] == FULL.family), None)
    missing = [m.name for m in methods(settings.r) if m.name not in {row["name"] for row in found}]
    machines = sorted({run["hardware"] for run in recorded})
    first, second = OPTIMIZER["betas"]
    how = (
        f"A byte-level Qwen3 trained on Python source ({settings.base_steps} steps) is trained further on English: "
        f"{settings.steps} steps of {settings.batch} × {settings.length} bytes, {settings.seeds} seeds, the same "
        "batches for every method. All linear layers but the tied head (full fine-tuning: all parameters), "
        f"r = {settings.r} for every variant (defaults otherwise); PEFT's scaling is 1. AdamW (betas {first} and "
        f"{second}, no weight decay), gradients clipped at {CLIP:g}, {WARM_UP:.0%} linear warm-up, then a cosine to "
        f"zero. The learning rate is each method's own: the best of a grid of half decades ({_grids()}) by the "
        f"validation loss of seed 0; a best rate at an edge extends the grid by {EXTENSION} more, once. What is "
        "reported is another part of the held-out text. Means over the seeds, and their range."
    )
    lines = [how, "", *_table(found, base, full, steps["milliseconds"] if steps else {}), ""]
    if left_out := untrainable():
        lines.append(f"Left out, having nothing to train: {', '.join(left_out)}.")
    if missing:
        lines.append(f"Not run, or not completely: {', '.join(missing)}.")
    if steps:
        lines.append("Steps are timed apart from the runs, the methods taking turns in one thread.")
    lines += [
        f"Hardware: {'; '.join(machines)}.", "",
        "What it shows:", "", *(f"- {line}" for line in _shown(found, base, full)), "",
        "What it does not show: anything about large models, other tasks, or long training. This is one byte-level "
        "model of 1.6 million parameters, one text, a short run, rates from a small grid, and a range over few seeds "
        "that is no confidence interval. Ablation is made for removing directions, not for lowering a loss; at the "
        "same rank the methods differ greatly in the number of parameters.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
