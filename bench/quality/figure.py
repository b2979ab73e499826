"""The figure of the quality comparison, from its recorded runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.common.figures import BLUE, INK, MUTED, ORANGE
from bench.quality.methods import BASE, FULL
from bench.quality.report import Row, losses, mean, trainable


class Point(NamedTuple):
    """A point to label, with the range around it."""

    name: str
    x: float
    y: float
    low: float
    high: float
    color: str


def quality_figure(found: list[Row], path: Path) -> None:
    """Draw held-out loss against trainable parameters, with ranges; the base and full fine-tuning are lines."""
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(9, 5.6), constrained_layout=True)
        points = [row for row in found if row["family"] in ("surgery", "peft") and math.isfinite(mean(row))]
        axes.set_xscale("log")
        for family, color, label in (("surgery", BLUE, "this library"), ("peft", ORANGE, "PEFT")):
            rows = [row for row in points if row["family"] == family]
            y = [mean(row) for row in rows]
            reach = [[m - min(losses(r)) for m, r in zip(y, rows, strict=True)],
                     [max(losses(r)) - m for m, r in zip(y, rows, strict=True)]]  # fmt: skip
            x = [trainable(row) for row in rows]
            axes.errorbar(x, y, reach, fmt="o", color=color, ms=5, lw=1.5, capsize=2, label=label)
        for row in found:
            if row["family"] in (BASE.family, FULL.family) and math.isfinite(mean(row)):
                dashes = "--" if row["family"] == FULL.family else ":"
                axes.axhline(mean(row), color=INK, ls=dashes, lw=1, label=f"{row['name']}: {mean(row):.3f}")
                axes.axhspan(min(losses(row)), max(losses(row)), color=MUTED, alpha=0.15, lw=0)
        axes.set(xlabel="trainable parameters", ylabel="held-out loss, nats/byte: mean and range over the seeds")
        axes.margins(x=0.16, y=0.1)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.09), ncols=4, frameon=False, fontsize=9)
        label_points(figure, axes, [_point(row) for row in points])
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _point(row: Row) -> Point:
    color = BLUE if row["family"] == "surgery" else ORANGE
    return Point(row["name"], trainable(row), mean(row), min(losses(row)), max(losses(row)), color)


def label_points(figure: Any, axes: Any, points: list[Point]) -> list[Any]:
    """Write names beside points, each at the nearest place that is free, and return their boxes in pixels.

    A label is nearer to its own point than to any other, where there is such a place; without a free one it lies over
    others.
    """
    from matplotlib.transforms import Bbox

    figure.canvas.draw()
    renderer, frame = figure.canvas.get_renderer(), axes.get_window_extent()
    middles = [axes.transData.transform((point.x, point.y)) for point in points]
    taken = []
    for point, (x, _) in zip(points, middles, strict=True):
        reach = [axes.transData.transform((point.x, y))[1] for y in (point.low, point.high)]
        taken.append(Bbox.from_extents(x - 6, min(reach) - 5, x + 6, max(reach) + 5))
    level = [line.get_ydata() for line in axes.lines]
    lines = [axes.transData.transform((1, y[0]))[1] for y in level if len(y) == 2 and y[0] == y[1]]
    places = [(dx, dy) for dx in (10, -10, 40, -40, 80, -80, 130, -130) for dy in range(-180, 181, 6)]
    tries = [(own, *place) for own in (True, False) for place in sorted(places, key=lambda place: math.hypot(*place))]
    boxes = []
    for i in sorted(range(len(points)), key=lambda i: points[i].y):
        for own, dx, dy in tries:
            text = axes.annotate(
                points[i].name, (points[i].x, points[i].y), (dx, dy), textcoords="offset points", va="center",
                ha="left" if dx > 0 else "right", fontsize=8.5, color=points[i].color,
                arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.6, "shrinkB": 4},
            )  # fmt: skip
            box = _text_box(text, renderer)
            near = box.x0 if dx > 0 else box.x1, (box.y0 + box.y1) / 2
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            free = not any(box.overlaps(other) for other in taken)
            free = free and not any(box.y0 - 3 <= line <= box.y1 + 3 for line in lines)
            nearest = min(range(len(points)), key=lambda j: math.dist(near, middles[j]))
            if inside and free and (nearest == i or not own):
                taken.append(box)
                boxes.append(box)
                break
            text.remove()
        else:
            axes.annotate(points[i].name, (points[i].x, points[i].y), fontsize=8.5, color=points[i].color)
    return boxes


def _text_box(text: Any, renderer: Any) -> Any:
    """The box of an annotation's text without its arrow."""
    from matplotlib.text import Text

    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)
