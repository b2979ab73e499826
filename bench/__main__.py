"""``python -m bench``: every benchmark, the pages made of what they recorded, and the comparison of two runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from bench.cli import cost, demo
from passes.errors import InputError, SurgeryError

RESULTS = Path("bench/results")
OUT = typer.Option(RESULTS, help="Directory of the results.")
DTYPES = ("float64", "float32", "bfloat16", "float16")
BACKENDS = ("inductor", "aot_eager", "eager")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.command()(cost)
app.command()(demo)


@app.command()
def speed(
    out: Path = typer.Option(
        RESULTS / "speed.jsonl", help="File of the results, taken up again; status 1 where a cell failed or is wrong."
    ),
    config: list[str] = typer.Option(["qwen3-0.6b-layer"], help="Sizes of the model, by name; the last one counts."),
    layers: list[int] | None = typer.Option(
        None, min=1, help="Decoder layers; the configuration's own number by default."
    ),
    dtype: list[str] = typer.Option(["float32"], help="Of weights and inputs: float64, float32, bfloat16 or float16."),
    device: str = typer.Option("cpu", help='"cpu", "cuda", ...'),
    r: int = typer.Option(256, min=1, help="Rank of every adapter."),
    tokens: int = typer.Option(512, min=2, help="Tokens of prefill and of a training step."),
    runtimes: list[str] | None = typer.Option(
        None, help="With commas; eager,compile,aoti,onnx by default, max-autotune on request."
    ),
    contenders: list[str] | None = typer.Option(None, help="With commas; all by default."),
    shapes: list[str] | None = typer.Option(None, help="With commas: prefill,decode 1,training,decode 8,decode 32."),
    backend: list[str] = typer.Option(["inductor"], help="Of torch.compile: inductor, aot_eager or eager."),
    repeats: int = typer.Option(15, help="Pairs of samples of a cell, at most; at least 3."),
    cell_seconds: list[float] = typer.Option([8.0], help="Time for the samples of one cell; at least 5 pairs."),
    minutes: float | None = typer.Option(None, help="Stop before a cell that may not be finished by then."),
    seed: int = typer.Option(0, help="Seed of everything."),
    again: bool = typer.Option(
        False,
        "--again",
        help="Measure everything anew; without it, a cell that is there is kept if package versions, --cell-seconds "
        "and --backend were the same (the commit may be another).",
    ),
) -> None:
    """Measure contenders × runtimes × shapes, each checked before it is timed.

    Of an option that is given twice, as gpu.sh does, all values are checked, and the last one counts.
    """
    from bench.common.load_model import device_of
    from bench.models.decoder import CONFIGS
    from bench.models.decoder import shapes as known_shapes
    from bench.speed import matrix
    from bench.speed.contenders import CONTENDERS
    from bench.speed.runtimes import RUNTIMES

    if repeats < 3:
        raise InputError(f"--repeats must be at least 3, found {repeats}")
    if not cell_seconds[-1] >= 0:
        raise InputError(f"--cell-seconds must be at least 0, found {cell_seconds[-1]}")
    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes must be more than 0, found {minutes}; leave it out to have no limit")
    one = {
        "config": _last("config", config, tuple(CONFIGS), whole=True),
        "dtype": _last("dtype", dtype, DTYPES, whole=True),
        "backend": _last("backend", backend, BACKENDS, whole=True),
    }
    several = {
        "runtimes": _last("runtimes", runtimes, tuple(RUNTIMES)),
        "contenders": _last("contenders", contenders, CONTENDERS),
        "shapes": _last("shapes", shapes, tuple(known_shapes(1))),
    }
    settings = matrix.SpeedSettings(
        out=out, layers=layers[-1] if layers else None, device=str(device_of(device)), r=r, tokens=tokens,
        repeats=repeats, cell_seconds=cell_seconds[-1], minutes=minutes, seed=seed, again=again,
        **{name: found[0] for name, found in one.items()}, **{name: found for name, found in several.items() if found},
    )  # fmt: skip
    if not matrix.run(settings):
        raise typer.Exit(1)


@app.command()
def report(
    root: Path = typer.Option(Path(), help="Root of the repository."),
    check: bool = typer.Option(False, "--check", help="Write nothing; status 1 where a table is out of step."),
) -> None:
    """Make tables and figures from the recorded data, and the pages that show them."""
    from bench.pages import report as pages

    if missing := [name for name in pages.PAGES if not (root / name).is_file()]:
        raise InputError(
            f"{str(root.resolve())!r} is not the project's root, it has no {', '.join(missing)}; "
            "run it there, or name the root: --root DIRECTORY"
        )
    if not check:
        for path in pages.write(root):
            print(f"wrote {path}")
    elif stale := pages.check(root):
        for what in stale:
            print(f"out of step: {what}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def compare(
    before: Path,
    after: Path,
    by: str = typer.Option("milliseconds", help="milliseconds, or ratio: to the base."),
    fail: bool = typer.Option(False, "--fail", help="Status 1 if a cell is slower or no longer valid."),
) -> None:
    """Put two files of the speed matrix side by side."""
    from bench.speed.compare import compare, told

    found = compare(before, after, _known("by", (by,), ("milliseconds", "ratio"))[0])
    print(told(found, by))
    if fail and found.regressed:
        raise typer.Exit(1)


@app.command()
def quality(
    out: Path = OUT,
    cache: Path | None = typer.Option(None, help="Folder of trained base models."),
    workers: int = typer.Option(2, min=1, help="Processes, each with one thread."),
    methods: str | None = typer.Option(None, help="With semicolons: only these, as the table names them."),
    only_report: bool = typer.Option(False, "--report", help="Run nothing."),
    r: int = typer.Option(64, help="Rank of the variants, and of PEFT's methods beside its default."),
    steps: int = typer.Option(60, help="Training steps."),
    batch: int = typer.Option(12, help="Windows of a batch."),
    length: int = typer.Option(128, help="Bytes of a window."),
    seeds: int = typer.Option(3, help="Number of seeds, from 0 on; seed 0 is the one of the sweep."),
    base_steps: int | None = typer.Option(None, help="Training steps of the base model."),
    calibration: int = typer.Option(8, help="Batches, for the variants that need them."),
    evaluated: int = typer.Option(32768, help="Most bytes of the held-out part, and of the validation part."),
) -> None:
    """Ask whether it learns: every variant and PEFT's methods, on the demo's model and text."""
    from bench.quality import run
    from bench.quality.training import DEFAULT_STEPS, QualitySettings

    if not only_report:
        settings = QualitySettings(
            r=r, steps=steps, batch=batch, length=length, seeds=seeds, calibration=calibration, evaluated=evaluated,
            base_steps=DEFAULT_STEPS if base_steps is None else base_steps,
        )  # fmt: skip
        run.measure(settings, _names(methods, ";"), out, cache=cache, workers=workers)
    print(run.report(out))


@app.command()
def scaling(
    out: Path = OUT,
    axes: str | None = typer.Option(None, help="With commas; all by default."),
    repeats: int = typer.Option(15, min=3, help="Pairs with the base, at most; others take a third."),
    most: int | None = typer.Option(None, help="Leave out sizes above this."),
) -> None:
    """Measure how costs grow with rank, sites, tokens and width."""
    from bench.scaling import run
    from bench.scaling.report import write

    known = tuple(run.CURVES)
    run.run(out / "scaling.jsonl", _known("axes", tuple(_names(axes) or known), known), repeats, most=most)
    print(write(out))


@app.command()
def passes(out: Path = OUT, repeats: int = typer.Option(5, min=1, help="Runs of each pass.")) -> None:
    """Time the passes by the size of the graph."""
    from bench.scaling import passes

    print(passes.record(out, repeats=repeats))


@app.command()
def lowerings(
    out: Path = OUT,
    repeats: int = typer.Option(
        15, min=1, help="Pairs of training steps at 512 tokens; forwards have 3x as many, or 15x."
    ),
    modes: str = typer.Option("eager,compiled", help="With commas."),
    training_tokens: str = typer.Option("512,4096", help="With commas; may be empty."),
    ranks: str = typer.Option("64,256", help="Of the forwards, with commas; may be empty."),
) -> None:
    """Time every lowering of a live core on one decoder layer, against the plain base."""
    from bench.micro.lowerings import measure

    chosen = _known("modes", tuple(_names(modes)), ("eager", "compiled"))
    sizes = {"training_tokens": _numbers("training-tokens", training_tokens), "ranks": _numbers("ranks", ranks)}
    print(measure(out, repeats=repeats, modes=chosen, **sizes))


@app.command()
def fuse(
    out: Path = OUT,
    model: str = typer.Option(
        "bench.models.decoder_layer:layer", help="A hub id, a folder, or package.module:callable."
    ),
    repeats: int = typer.Option(15, min=2, help="Pairs of samples."),
    modes: str = typer.Option("eager,compiled", help="With commas."),
    ranks: str = typer.Option("64,256", help="With commas."),
    tokens: str = typer.Option("1,512", help="Tokens of the one row, with commas: 1 is decoding."),
) -> None:
    """Time a folded graph with and without one down-projection for the sites of one input, beside the plain base."""
    from bench.micro.fused import measure

    chosen = _known("modes", tuple(_names(modes)), ("eager", "compiled"))
    sizes = {"ranks": _numbers("ranks", ranks), "tokens": _numbers("tokens", tokens)}
    print(measure(out, model, repeats=repeats, modes=chosen, **sizes))


@app.command()
def factors(out: Path = OUT, repeats: int = typer.Option(7, min=1, help="Runs of each.")) -> None:
    """Time initialisation, and the cores alone."""
    from bench.micro.factors import measure

    print(measure(out, repeats=repeats))


def _names(text: str | None, separator: str = ",") -> list[str]:
    return [name.strip() for name in text.split(separator) if name.strip()] if text else []


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise InputError(f"--{option}: expected whole numbers with commas, found {text!r}") from None


def _last(option: str, given: list[str] | None, known: Sequence[str], *, whole: bool = False) -> tuple[str, ...]:
    """The names that an option gives, with commas unless whole; all are checked, the last time it is given counts."""
    split = [(text.strip(),) if whole else tuple(name.strip() for name in text.split(",")) for text in given or ()]
    return [_known(option, names, known) for names in split][-1] if split else ()


def _known(option: str, found: tuple[str, ...], known: Sequence[str]) -> tuple[str, ...]:
    if unknown := sorted(set(found) - set(known)):
        raise InputError(f"--{option}: there is no {', '.join(map(repr, unknown))} (known: {', '.join(known)})")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run a command; an expected error is one line on the standard error stream and status 2."""
    try:
        app(arguments, prog_name="python -m bench")
    except SurgeryError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # typer's own end, of every command
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
