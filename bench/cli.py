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
    from bench.demo import run
    from bench.steps import Settings

    settings = Settings(
        model=model, text=text, out=out, cache=cache, r=r, steps=steps, batch=batch, length=length, lr=lr,
        base_steps=base_steps, seed=seed,
    )  # fmt: skip
    if not run(settings):
        raise typer.Exit(1)
