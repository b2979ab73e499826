"""Whether one down-projection for the sites of one input pays: ``python -m bench fuse``.

Three contenders take turns in one process: the plain base, its operated graph with all folded, and the same graph with
``fuse``. Decoding is one token of one row, prefill many. Outputs are checked before anything is timed, and ratios are
of pairs of neighbours; "fused over folded" pairs these two with one another. What is timed is the processor's time of
one thread, which other programs of the machine disturb less than they do a clock.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.load_model import inputs_for, load
from bench.common.paired_timing import repeated
from bench.common.result_provenance import environment
from bench.common.results_store import Store, lines
from bench.common.timing import Run, quartiles, settled
from passes.ir.forward_context import Call
from passes.ir.torch_internals import tree_iter
from surgery import apply_surgery, pipeline, sites, undo_surgery

KEY = ("model", "mode", "r", "tokens")
SEED = 0
SAMPLE_MS = 20.0  # a sample is at least so long


def contenders(model: nn.Module, call: Call, r: int) -> tuple[dict[str, Any], float]:
    """The plain model and two graphs of it with live cores, each called without arguments; and what they differ by.

    Returns:
        Functions by name, and the largest difference of the two graphs relative to the adapter's own effect.
    """
    args, kwargs = call
    inputs: Any = kwargs or args
    apply_surgery(model, "antipasto", r=r, example_inputs=inputs, progress=False)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for site in sites(model).values():
            site.core.g.copy_(0.2 * torch.randn(len(site.core.g), generator=generator))
    folded = pipeline(model, inputs, stop_after="fold").graph
    fused = pipeline(model, inputs, fuse=True, stop_after="fuse").graph
    undo_surgery(model)
    given = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    found = {"base": (model, args, kwargs), "folded": (folded, args, given), "fused": (fused, args, given)}
    with torch.no_grad():
        plain, one, other = (first(run(*a, **k)) for run, a, k in found.values())
    effect = float((one - plain).abs().max())
    error = float((one - other).abs().max()) / effect
    if not error < 1e-3:
        raise SystemExit(f"the two graphs do not compute the same: {error}, effect {effect}")
    return found, error


def first(output: Any) -> Tensor:
    """The first tensor of an output."""
    return next(leaf for leaf in tree_iter(output) if isinstance(leaf, Tensor))


@settled()
def timed(found: dict[str, Any], mode: str, repeats: int) -> dict[str, list[list[float]]]:
    """Milliseconds of the contenders beside the base, and of the fused graph beside the folded one."""
    runs: dict[str, Run] = {}
    for name, (model, args, kwargs) in found.items():
        prepared = model if mode == "eager" else torch.compile(model, dynamic=False)
        runs[name] = forward(prepared, args, kwargs)
    for run in (*runs.values(), *runs.values()):
        run()
    loops = max(1, round(SAMPLE_MS / milliseconds(runs["base"])))
    runs = {name: repeated(run, loops) for name, run in runs.items()}
    names = [("base again", "base"), ("folded", "base"), ("fused", "base"), ("fused over folded", "folded")]
    samples: dict[str, list[list[float]]] = {name: [] for name, _ in names}
    for i in range(repeats):
        for name, beside in names if i % 2 else reversed(names):
            pair = [runs["base" if name == "base again" else name.partition(" ")[0]], runs[beside]]
            found_ms = [milliseconds(run) / loops for run in (pair if i % 2 else reversed(pair))]
            samples[name].append(found_ms if i % 2 else found_ms[::-1])
    return samples


def milliseconds(run: Run) -> float:
    """Processor time of one run."""
    gc.collect()
    started = time.process_time()
    run()
    return 1000 * (time.process_time() - started)


def forward(model: Any, args: Any, kwargs: Any) -> Run:
    """One forward without gradients."""

    def run() -> None:
        with torch.no_grad():
            model(*args, **kwargs)

    return run


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as a table."""
    lines = [
        "| model, r | runtime | tokens | base, ms | base again | folded | fused | fused over folded |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        its = sorted(base for _, base in row["milliseconds"]["base again"])
        ratios = []
        for name in ("base again", "folded", "fused", "fused over folded"):
            low, middle, high = quartiles(row["milliseconds"][name])
            ratios.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        where = f"{row['model']}, {row['r']} | {row['mode']} | {row['tokens']} | {its[len(its) // 2]:.1f}"
        lines.append(f"| {where} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The recorded rows, in the order of the table."""
    rows = lines(path, (*KEY, "milliseconds"), "python -m bench fuse")
    return sorted(rows, key=lambda row: (row["model"], row["r"], row["mode"] != "eager", row["tokens"]))


def measure(
    out: Path, source: str, *, repeats: int, modes: Sequence[str], ranks: Sequence[int], tokens: Sequence[int]
) -> str:
    """Measure, write each row as it is there, and return the table of all.

    Args:
        source: a hub id, a folder, or ``package.module:callable``, which gives a model of one tensor (1, tokens, ...).
    """
    path = out / "fuse.jsonl"
    store = Store(path, read(path), KEY)
    told = {**environment(), "seed": SEED}  # before a row is written, which changes the checkout
    for mode in modes:
        for r in ranks:
            for length in tokens:
                torch.compiler.reset()
                model, given = load(source, device=torch.device("cpu"), dtype="float32", seed=SEED)
                given = given[:, :length] if isinstance(given, Tensor) else given
                call = inputs_for(model.requires_grad_(False), given, 1, length, SEED)
                found, error = contenders(model, call, r)
                row = {"model": type(model).__name__, "mode": mode, "r": r, "tokens": length, "error": error}
                row["parameters"] = sum(p.numel() for p in model.parameters())
                store.put({**row, "milliseconds": timed(found, mode, repeats), **told})
    text = markdown(read(path))
    (out / "fuse.md").write_text(text)
    return text
