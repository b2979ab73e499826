"""Figures made from data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

INK, MUTED, BLUE, ORANGE = "#1b1f24", "#6b7280", "#2563eb", "#d97706"


def demo_figure(data: dict[str, Any], path: Path) -> None:
    """Draw the demo: the training loss, the coeff sweep, and the learned gains over the singular spectrum.

    Args:
        data: the content of ``demo.json``.
        path: the PNG to write.
    """
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED}
    with plt.rc_context(style):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.1), constrained_layout=True)
        _loss(left, data)
        _sweep(middle, data)
        _gains(right, data)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _loss(axes: Any, data: dict[str, Any]) -> None:
    loss = np.array(data["train_loss"])
    new = next(iter(data["held_out"]))
    axes.plot(np.arange(1, len(loss) + 1), loss, color=BLUE, alpha=0.3, lw=1)
    window = max(1, len(loss) // 10)
    if len(loss) >= 2 * window:
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(len(smooth)) + (window + 1) / 2, smooth, color=BLUE, lw=2, label="training (running mean)")
    for when, style in (("before", ":"), ("after", "--")):
        value = data["held_out"][new][when]
        axes.axhline(value, color=INK, ls=style, lw=1, label=f"held-out {when}: {value:.3f}")
    axes.set(title=f"Training the core on {new}", xlabel="step", ylabel=f"loss (nats/{data['unit']})")
    axes.legend(frameon=False, fontsize=9)


def _sweep(axes: Any, data: dict[str, Any]) -> None:
    for (domain, points), color in zip(data["sweep"].items(), (BLUE, ORANGE), strict=False):
        coeff, loss = np.array(points).T
        base = loss[np.flatnonzero(coeff == 0)[0]]
        axes.plot(coeff, loss - base, "o-", color=color, lw=2, ms=4, label=domain)
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.axvline(0, color=MUTED, lw=0.8)
    axes.set(title="Steering: held-out loss against the base's", xlabel="coeff", ylabel=f"change (nats/{data['unit']})")
    axes.legend(frameon=False, fontsize=9)


def _gains(axes: Any, data: dict[str, Any]) -> None:
    kinds: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for key, found in data["gains"].items():
        spectrum = np.array(found["S"])
        kinds.setdefault(key.rpartition(".")[2], []).append((spectrum / spectrum[0], np.array(found["gain"])))
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(kinds)))
    for (kind, found), color in zip(kinds.items(), colors, strict=True):
        spectrum, gain = (np.concatenate(parts) for parts in zip(*found, strict=True))
        axes.scatter(spectrum, gain, s=5, alpha=0.45, color=color, label=kind, linewidths=0)
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.set(
        title="Learned gains over the spectrum", xlabel="$S_i\\,/\\,S_1$", ylabel="elu(g) = relative change of $S_i$"
    )
    axes.legend(frameon=True, edgecolor="none", framealpha=0.85, fontsize=8, markerscale=3, ncols=2, loc="upper right")
