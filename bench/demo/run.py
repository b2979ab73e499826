"""The main job, end to end: capture, operate, train, steer, save, reload, undo, merge, export, each step verified."""

from __future__ import annotations

import copy
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import corpus
from bench.common.figures import demo_figure
from bench.common.result_provenance import environment
from bench.demo.graph_path import through_the_compiler
from bench.demo.results import DemoSettings, Results, bits
from bench.models.byte_lm import held_out_loss, language_model_loss
from bench.models.demo_model import DemoModel, hub_demo_model, small_demo_model
from bench.models.logits import frozen_logits, logits
from exporters import export
from passes.errors import InputError
from passes.infra.tolerance import relative_error
from surgery import (
    apply_surgery,
    load_adapter,
    merge,
    save_adapter,
    set_coeff,
    sites,
    steer,
    undo_surgery,
)  # fmt: skip
from surgery.hosting.state import trainable_parameters
from surgery.support.progress_bar import track

COEFFS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)


def run(settings: DemoSettings) -> bool:
    """Run the demo, write its table, data and figure, and tell whether every verification held."""
    from transformers.utils import logging as hub_logging

    _check(settings)
    torch.manual_seed(settings.seed)
    hub_logging.disable_progress_bar()
    started = time.perf_counter()
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.model:
        demo = hub_demo_model(settings.model, settings.text)
    else:
        demo = small_demo_model(settings.cache, settings.base_steps, settings.text, settings.seed)
    results = Results(demo.name, demo.unit, notes=demo.notes)
    results.seconds["base model"] = time.perf_counter() - started
    model = demo.load()
    probe = _probe(demo)
    base_logits = frozen_logits(model, probe)
    _operate(settings, model, probe, base_logits, results)
    _train(settings, demo, model, results)
    _steer(settings, demo, model, probe, base_logits, results)
    _restore(settings, demo, model, probe, base_logits, results)
    through_the_compiler(model, probe, base_logits, results)
    _merge_and_export(settings, model, probe, base_logits, results)
    _show(settings, results)
    return results.passed


def _check(settings: DemoSettings) -> None:
    if settings.steps < 1 or settings.batch < 1 or settings.length < 2:
        raise InputError("steps and batch must be at least 1, and length at least 2")
    if settings.text and not settings.text.is_file():
        raise InputError(f"there is no text file {str(settings.text)!r}")


def _probe(demo: DemoModel) -> Tensor:
    """Two held-out rows to compare models on."""
    data = next(iter(demo.held_out.values()))
    return next(iter(corpus.windows(data, batch=2, length=32, count=2)))


def _operate(settings: DemoSettings, model: nn.Module, probe: Tensor, base: Tensor, results: Results) -> None:
    started = time.perf_counter()
    apply_surgery(model, "antipasto", r=settings.r, example_inputs={"input_ids": probe}, seed=settings.seed)
    results.seconds["surgery"] = time.perf_counter() - started
    trainable, total = trainable_parameters(model)
    results.add("trainable parameters", f"{trainable:,} of {total:,} ({100 * trainable / total:.2f}%)")
    same = torch.equal(logits(model, probe), base)
    results.add("identity at insertion", bits(same), same)


def _train(settings: DemoSettings, demo: DemoModel, model: nn.Module, results: Results) -> None:
    """Train the core on the new domain, and measure the held-out loss of both domains before and after."""
    before = {domain: held_out_loss(model, data) for domain, data in demo.held_out.items()}
    cores = [p for p in model.parameters() if p.requires_grad]
    frozen = {name: p._version for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(cores, lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.steps)
    rows = corpus.batches(
        demo.train, batch=settings.batch, length=settings.length, steps=settings.steps, seed=settings.seed
    )
    started = time.perf_counter()
    model.train()
    for tokens in track(rows, "training the core", enabled=True, total=settings.steps):
        loss = language_model_loss(model, tokens)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        results.train_loss.append(loss.item())
    model.eval()
    results.seconds["training"] = time.perf_counter() - started
    untouched = all(p._version == frozen[n] for n, p in model.named_parameters() if n in frozen)
    results.add("base untouched by training", "no base tensor was written" if untouched else "WRITTEN", untouched)
    for i, (domain, data) in enumerate(demo.held_out.items()):
        results.held_out[domain] = {"before": before[domain], "after": held_out_loss(model, data)}
        line = f"{before[domain]:.3f} → {results.held_out[domain]['after']:.3f} nats/{demo.unit}"
        learned = results.held_out[domain]["after"] < before[domain] if i == 0 else None
        results.add(f"held-out loss, {domain}", line, learned)


def _steer(
    settings: DemoSettings, demo: DemoModel, model: nn.Module, probe: Tensor, base: Tensor, results: Results
) -> None:
    """Sweep coeff, check that 0 is the base bit for bit, and that one batch can hold several values."""
    started = time.perf_counter()
    for domain, data in demo.held_out.items():
        results.sweep[domain] = []
        for coeff in track(COEFFS, f"coeff sweep, {domain}", enabled=True):
            with steer(model, coeff):
                results.sweep[domain].append((coeff, held_out_loss(model, data, max_bytes=8192)))
    results.seconds["coeff sweep"] = time.perf_counter() - started
    with steer(model, 0.0):
        same = torch.equal(logits(model, probe), base)
    results.add("coeff = 0 after training", bits(same), same)
    rows = torch.linspace(-1, 1, len(probe))
    with steer(model, rows):
        together = logits(model, probe)
    apart = []
    for i, coeff in enumerate(rows.tolist()):
        with steer(model, coeff):
            apart.append(logits(model, probe)[i])
    error = relative_error(together, torch.stack(apart))
    results.add("per-row coeff against one by one", f"{error:.1e} relative", error < 1e-5)
    for key, site in sites(model).items():
        gains = torch.nn.functional.elu(site.core.g.detach())
        results.gains[key] = {"S": site.factors.S.tolist(), "gain": gains.tolist()}


def _restore(
    settings: DemoSettings, demo: DemoModel, model: nn.Module, probe: Tensor, base: Tensor, results: Results
) -> None:
    """Save, reload on a fresh base, undo on a copy."""
    steered = logits(model, probe)
    folder = save_adapter(model, settings.out / "adapter")
    size = sum(file.stat().st_size for file in folder.iterdir())
    fresh = demo.load()
    tensors = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    load_adapter(fresh, folder)
    same = torch.equal(logits(fresh, probe), steered)
    results.add(f"reload from disk ({size / 1e6:.1f} MB)", bits(same), same)
    undo_surgery(fresh)
    parameters = dict(fresh.named_parameters())
    restored = list(parameters) == list(tensors) and all(torch.equal(p, tensors[n]) for n, p in parameters.items())
    same = restored and torch.equal(frozen_logits(fresh, probe), base)
    results.add("undo", bits(same), same)


def _merge_and_export(settings: DemoSettings, model: nn.Module, probe: Tensor, base: Tensor, results: Results) -> None:
    """Merge a copy and export to ONNX; errors are judged against the adapter's own effect."""
    steered = logits(model, probe)
    effect = float((steered - base).abs().max())
    started = time.perf_counter()
    merged = merge(copy.deepcopy(model))
    results.seconds["merge"] = time.perf_counter() - started
    error = float((logits(merged, probe) - steered).abs().max())
    results.add("merge error", f"{error:.1e}, adapter's effect {effect:.2g}", error < 1e-3 * effect)
    for mode in ("merged", "live"):
        started = time.perf_counter()
        target = settings.out / f"{mode}.onnx"
        report = export(model, "onnx", target, mode=mode, example_inputs={"input_ids": probe})
        results.seconds[f"ONNX {mode}"] = time.perf_counter() - started
        error, other = _in_onnxruntime(target, model, base, probe, mode)
        size = report.path.stat().st_size / 1e6
        text = f"{error:.1e}, at another shape {other:.1e} (effect {effect:.2g}); {size:.1f} MB"
        results.add(f"ONNX Runtime, {mode}", text, max(error, other) < 1e-3 * effect)
    set_coeff(model, 1.0)


def _in_onnxruntime(path: Path, model: nn.Module, base: Tensor, probe: Tensor, mode: str) -> tuple[float, float]:
    """Largest deviation on the probe and on another batch and length; the live graph also at coeff = 0."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def deviation(tokens: Tensor, expected: Tensor, **coefficient: Any) -> float:
        found = session.run(["logits"], {"input_ids": tokens.numpy(), **coefficient})[0]
        return float((torch.from_numpy(found) - expected).abs().max())

    errors = [deviation(probe, logits(model, probe))]
    if mode == "live":
        errors.append(deviation(probe, base, coeff=np.zeros((), np.float32)))
    other = torch.cat([probe[:, :11]] * 2)[:3]
    return max(errors), deviation(other, logits(model, other))


def _show(settings: DemoSettings, results: Results) -> None:
    """Print the table, and write it with the data and the figure."""
    from rich.console import Console

    results.add("seconds", ", ".join(f"{name} {value:.0f}" for name, value in results.seconds.items()))
    data = {**environment(), "settings": {k: str(v) for k, v in asdict(settings).items()}, **asdict(results)}
    (settings.out / "demo.json").write_text(json.dumps(data, indent=1, default=str) + "\n")
    (settings.out / "demo.md").write_text(markdown(results))
    demo_figure(data, settings.out / "demo.png")
    console = Console()
    width = None if console.is_terminal else max(110, shutil.get_terminal_size().columns)
    Console(width=width).print(_table(results))
    files = ", ".join(sorted(file.name for file in settings.out.iterdir()))
    verdict = "every verification held" if results.passed else "A VERIFICATION FAILED"
    Console(width=width).print(f"{verdict}; wrote {settings.out}/: {files}", highlight=False, soft_wrap=True)


def _table(results: Results) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=f"{results.model}: what was verified", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("measured")
    table.add_column("")
    marks = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: ""}
    for what, value, passed in results.rows:
        table.add_row(what, value, marks[passed])
    return table


def markdown(results: Results) -> str:
    """The table as Markdown."""
    marks = {True: "ok", False: "**FAILED**", None: ""}
    lines = ["| what | measured | |", "|---|---|---|"]
    lines += [f"| {what} | {value} | {marks[passed]} |" for what, value, passed in results.rows]
    return "\n".join(lines) + "\n"
