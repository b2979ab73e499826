"""The console command ``surgery``. Packages above add their commands through the entry points "surgery.commands"."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from importlib.metadata import entry_points, version
from inspect import getdoc
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from passes.errors import SurgeryError
from surgery.hosting.checks import check_form
from surgery.variants import DEFAULT, REGISTRY, Variant, resolve_variant

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="S-space model surgery for PyTorch.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("sspace-surgery"))
        raise typer.Exit


@app.callback()
def _root(
    show: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """S-space model surgery: adapters in the singular basis of a model's own weights."""


@app.command()
def variants() -> None:
    """List the variants of the adapter: what each is, its size, what it needs, and its options with their defaults."""
    import torch

    shared = {option.name for option in fields(Variant)}
    for name, cls in sorted(REGISTRY.items()):
        config, about = cls(), []
        tensors = config.init_core(config.r, torch.Generator())
        trainable = sum(tensor.numel() for key, tensor in tensors.items() if key not in config.frozen)
        about.append(f"{trainable:,} trainable at r = {config.r}")
        about += ["needs calibration data"] * config.needs_calibration + ["cannot be merged"] * (not config.linear)
        about += [f"on {config.default_targets}"] * (config.default_targets != "all-linear")
        about += ["in the middle third of the layers"] * config.middle_layers
        options = ", ".join(f"{o.name}={getattr(config, o.name)!r}" for o in fields(config) if o.name not in shared)
        summary = (getdoc(sys.modules[cls.__module__]) or "").partition("\n")[0]
        typer.echo(f"{name:20}{summary}\n{'':20}{'; '.join(about)}" + (f"\n{'':20}{options}" if options else ""))
    typer.echo(f"{'all':20}options of all: {', '.join(f'{o.name}={o.default!r}' for o in fields(Variant))}")


@app.command()
def inspect(
    model: str = typer.Argument(
        help="A hub id, a directory with a config.json, or package.module:callable, which gives a module, or a module "
        "and its example inputs. No weights are loaded."
    ),
    variant: str = typer.Option(DEFAULT, help="The variant to choose sites for."),
    r: int | None = typer.Option(None, help="Upper bound of the rank; the variant's own by default."),
    target_modules: str | None = typer.Option(
        None,
        help='"all-linear", "residual-writers", a regular expression for whole keys, or suffixes with commas '
        '("q_proj,").',
    ),
    exclude_modules: str | None = typer.Option(None, help="Sites to leave out, written like target_modules."),
    every: bool = typer.Option(False, "--all", help="One row per site, and not one for like sites of all layers."),
    as_json: bool = typer.Option(False, "--json", help="Print the sites as JSON."),
    site: str | None = typer.Option(None, help="The site to draw; the first chosen one by default."),
    form: str = typer.Option("delta", help='Form of the drawn site: "delta" or "residual".'),
    dot: Path | None = typer.Option(None, help="Write the operated graph around the site as DOT."),
    svg: Path | None = typer.Option(None, help="Write the operated graph around the site as SVG."),
) -> None:
    """Print the sites of a model: shape, operation, what reads the same input, role, ties, chosen or why not."""
    from surgery.cli.inspect import choose, load_model, write_text

    resolve_variant(variant, r)  # what is wrong is refused before a model is built
    check_form(form)
    loaded, inputs = load_model(model)
    targets = {"target_modules": patterns(target_modules), "exclude_modules": patterns(exclude_modules)}
    choice = choose(loaded, variant, r, inputs, **targets)
    console = Console()
    if as_json:
        typer.echo(json.dumps(choice.rows(), indent=1))
    else:
        if not console.is_terminal:
            console = Console(width=140)
        console.print(choice.table(every=every))
        for line in choice.lines():
            console.print(line, highlight=False)
    if dot or svg:
        drawing = choice.draw(site or next(iter(choice.ranks)), inputs, form)
        for path, text in ((dot, drawing.dot()), (svg, drawing.svg())):
            if path:
                write_text(path, text)
                typer.echo(f"wrote {path}", err=True)


@app.command()
def push(
    adapter: Path = typer.Argument(help="Directory that save_adapter wrote."),
    repo: str = typer.Argument(help="OWNER/NAME on the Hugging Face Hub; created if it is not there."),
    private: bool | None = typer.Option(None, "--private/--public", help="Of a new repository."),
    revision: str | None = typer.Option(None, help="Branch; main by default."),
    message: str = typer.Option("Upload S-space adapter", help="Message of the commit."),
) -> None:
    """Send an adapter to the Hugging Face Hub: its two files and its README.md, in one commit."""
    from surgery.storage.hub import push_adapter

    typer.echo(push_adapter(adapter, repo, private=private, revision=revision, message=message))


@app.command()
def pull(
    repo: str = typer.Argument(help="OWNER/NAME on the Hugging Face Hub."),
    path: Path = typer.Argument(help="A directory that is new or empty."),
    revision: str | None = typer.Option(None, help="Branch, tag or commit."),
) -> None:
    """Fetch an adapter from the Hugging Face Hub into a directory, and check it."""
    from surgery.storage.hub import pull_adapter

    typer.echo(pull_adapter(repo, path, revision=revision))


def patterns(text: str | None) -> str | list[str] | None:
    """A pattern of the command line as ``apply_surgery`` takes it: with a comma, a list of suffixes."""
    return [part.strip() for part in text.split(",") if part.strip()] if text and "," in text else text


def main() -> None:
    """Run the command line; an expected error is one line on the standard error stream and exit status 1."""
    for point in sorted(entry_points(group="surgery.commands"), key=lambda p: p.name):
        app.command(name=point.name)(point.load())
    try:
        app()
    except SurgeryError as error:
        text = Text.assemble((type(error).__name__, "bold red"), ": ", " ".join(str(error).split()))
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        sys.exit(1)
