"""Commands of the bench layer; heavy imports happen when a command runs."""

from __future__ import annotations

from pathlib import Path

import typer


def demo(
    model: str | None = typer.Option(None, help="Path or hub id of a causal LM; a small byte-level one by default."),
    text: Path | None = typer.Option(None, help="Text to adapt to; Python's English documentation by default."),
    out: Path = typer.Option(
        Path("demo-out"), help="Directory for the adapter, the ONNX files, the table and the figure."
    ),
    cache: Path | None = typer.Option(None, help="Where the small model is kept once it is trained."),
    r: int = typer.Option(128, help="Rank of the adapter."),
    steps: int = typer.Option(60, help="Training steps of the core."),
    batch: int = typer.Option(16, help="Rows of a training step."),
    length: int = typer.Option(128, help="Tokens of a row."),
    lr: float = typer.Option(2e-2, help="Learning rate of the core."),
    base_steps: int | None = typer.Option(None, help="Training steps of the small model."),
    seed: int = typer.Option(0, help="Seed of everything."),
) -> None:
    """Operate on a model, train the core on another domain, steer, save, merge, export, and verify every step."""
    from bench.demo.results import DemoSettings
    from bench.demo.run import run

    settings = DemoSettings(
        model=model, text=text, out=out, cache=cache, r=r, steps=steps, batch=batch, length=length, lr=lr,
        base_steps=base_steps, seed=seed,
    )  # fmt: skip
    if not run(settings):
        raise typer.Exit(1)


def cost(
    model: str = typer.Argument(
        help="A hub id or a directory, loaded with its weights, or package.module:callable, which gives a module and "
        "its example inputs."
    ),
    config_only: bool = typer.Option(False, "--config-only", help="Random weights; only the configuration is read."),
    variants: str | None = typer.Option(None, help="Names with commas; every variant by default."),
    r: int = typer.Option(256, help="Upper bound of the rank."),
    target_modules: str | None = typer.Option(
        None,
        help='"all-linear", "residual-writers", a regular expression for whole keys, or suffixes with commas; '
        "each variant's own by default.",
    ),
    lowering: str = typer.Option("auto", help="How sites are computed, as in apply_surgery."),
    batch: int = typer.Option(1, help="Rows of a batch."),
    length: int = typer.Option(512, help="Tokens of a row."),
    device: str = typer.Option("auto", help='"cpu", "cuda:0", ...; an accelerator by default, where there is one.'),
    dtype: str = typer.Option("auto", help='"float32", "bfloat16", ...; the checkpoint\'s own by default.'),
    repeats: int = typer.Option(15, help="Pairs of runs, of the variant and of the base, that each time is taken of."),
    seed: int = typer.Option(0, help="Seed of everything."),
    out: Path | None = typer.Option(None, help="Directory for cost.md, cost.csv, cost.json and cost.png."),
    resume: bool = typer.Option(False, "--resume", help="Keep the rows that an earlier run left in the directory."),
) -> None:
    """Measure what each variant costs on a model: time, memory, size, beside the base and full fine-tuning."""
    from bench.cost.run import run
    from bench.cost.worker import CostSettings
    from passes.errors import InputError
    from surgery.cli.main import patterns

    if resume and out is None:
        raise InputError("--resume needs --out, the directory with the rows of the earlier run")
    settings = CostSettings(
        model=model, config_only=config_only, r=r, target_modules=patterns(target_modules), lowering=lowering,
        batch=batch, length=length, device=device, dtype=dtype, repeats=repeats, seed=seed,
    )  # fmt: skip
    names = [name.strip() for name in variants.split(",")] if variants else None
    run(settings, names, out, resume=resume)
