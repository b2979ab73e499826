"""The figure of the cost report: what a variant costs in time, trains, and needs in memory."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.common.figures import BLUE, INK, MUTED, ORANGE, plt

LABELS = {"base": "plain base"}


def cost_figure(records: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw times and FLOPs over the base's, trainable parameters, and memory, one row per variant.

    Args:
        records: as ``bench.cost.table.record`` gives them; the base first.
        title: what was measured.
        path: the PNG to write.
    """
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED}
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            1, 3, figsize=(14, 2.4 + 0.5 * len(records)), sharey=True, layout="constrained", width_ratios=(1.8, 1, 1.1)
        )
        _times(axes[0], records)
        _trainable(axes[1], records)
        _memory(axes[2], records)
        names = [LABELS.get(r["variant"], r["variant"]) + ("\n(failed)" if r["error"] else "") for r in records]
        axes[0].set_yticks(range(len(records)), names)
        axes[0].set_ylim(len(records) - 0.4, -0.6)
        for each in axes:
            each.tick_params(axis="y", length=0)
            each.grid(axis="x", color=MUTED, alpha=0.2)
            each.set_axisbelow(True)
            if each.get_legend_handles_labels()[0]:
                below, columns = (0.5, -0.3 / len(records) - 0.08), 2 if each is axes[0] else 1
                each.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=below, ncols=columns)
        figure.suptitle("\n".join(textwrap.wrap(title, 190)), fontsize=10, color=MUTED, x=0.01, ha="left")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _times(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    """Bars of the ratios, whiskers from quartile to quartile, and a tick at the ratio of the counted FLOPs."""
    names = {"forward": "forward", "step": "forward + backward"}
    for kind, color, shift in (("forward", BLUE, -0.19), ("step", ORANGE, 0.19)):
        found = [(i + shift, r) for i, r in enumerate(records) if r[f"{kind}_ratio"] is not None]
        if not found:
            continue
        y = np.array([at for at, _ in found])
        ratio, low, high = (np.array([r[f"{kind}_ratio{end}"] for _, r in found]) for end in ("", "_low", "_high"))
        axes.barh(y, ratio, height=0.34, color=color, alpha=0.75, label=names[kind])
        axes.hlines(y, low, high, color=INK, lw=1, label="half of the pairs (quartiles)" if kind == "step" else None)
        flops = [r[f"{kind}_flop_ratio"] or np.nan for _, r in found]
        for at, value, end in zip(y, ratio, np.fmax(np.fmax(ratio, high), flops), strict=True):
            axes.annotate(f"{value:.2f}", (end, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        label = "FLOPs over the base's, counted" if kind == "step" else None
        axes.vlines(flops, y - 0.18, y + 0.18, color=INK, lw=2.6, zorder=4, label=label)
    axes.axvline(1, color=MUTED, lw=1, ls="--", zorder=1)
    axes.margins(x=0.08)
    base = records[0]
    took = ", ".join(f"{names[k]} {base[f'{k}_ms']:.3g} ms" for k in names if base[f"{k}_ms"] is not None)
    axes.set(
        title="Time, as a multiple of the plain base's (shorter is faster)", xlabel=f"1 = the frozen base ({took})"
    )


def _trainable(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    axes.set_xscale("log")
    for i, record in enumerate(records):
        value = record["trainable"]
        if value:
            axes.hlines(i, 1, value, color=BLUE, lw=1, alpha=0.5)
            axes.plot(value, i, "o", color=BLUE, ms=6)
        text = "nothing is trained" if value == 0 else "" if value is None else f"{value:,}"
        axes.annotate(text, (value or 1, i), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(1, 100 * max([r["trainable"] for r in records if r["trainable"]] + [10]))
    axes.set(title="Trainable parameters", xlabel="parameters, logarithmic")


def _memory(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    """Bars of the peak of a training step, and within them what the adapter holds all the time."""
    for name, height, color, alpha, label in (
        ("peak_step_mb", 0.62, ORANGE, 0.75, "peak of forward + backward, without an optimiser"),
        ("held_mb", 0.2, INK, 1, "of it, held by the adapter all the time"),
    ):
        found = [(i, r[name]) for i, r in enumerate(records) if r[name] is not None]
        if found:
            at, value = np.array(found).T
            axes.barh(at, value, height=height, color=color, alpha=alpha, label=label)
    for i, record in enumerate(records):
        if record["peak_step_mb"] is not None:
            end = max(record["peak_step_mb"], record["held_mb"] or 0)
            axes.annotate(f"{record['peak_step_mb']:,.3g}", (end, i), xytext=(5, 0), textcoords="offset points",
                          va="center", fontsize=9)  # fmt: skip
    axes.margins(x=0.15)
    axes.set(title="Memory beyond the model's weights", xlabel="MB")
