"""``python -m bench``: measure the speed matrix, make tables and figures of what is recorded, compare two runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from passes.errors import InputError, SurgeryError

RESULTS = Path("bench/results")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; an expected error is one line on the standard error stream and status 2."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _speed_options(commands.add_parser("speed", help="contenders × runtimes × shapes, each checked before it is timed"))
    report = commands.add_parser(
        "report", help="tables and figures from the recorded data, and the pages that show them"
    )
    report.add_argument("--root", type=Path, default=Path(), help="root of the repository")
    report.add_argument("--check", action="store_true", help="write nothing; status 1 where a table is out of step")
    compare = commands.add_parser("compare", help="two files of the speed matrix side by side")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument("--by", choices=("milliseconds", "ratio"), default="milliseconds", help="ratio: to the base")
    compare.add_argument("--fail", action="store_true", help="status 1 if a cell is slower or no longer valid")
    try:
        options = parser.parse_args(arguments)
        return {"speed": _speed, "report": _report, "compare": _compare}[options.command](options)
    except SurgeryError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _speed_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "speed.jsonl",
        help="file of the results, taken up again; status 1 where a cell failed or is wrong",
    )
    parser.add_argument("--config", type=_config, default="qwen3-0.6b-layer", help="sizes of the model, by name")
    parser.add_argument("--layers", type=int, help="decoder layers; the configuration's own number by default")
    parser.add_argument("--dtype", default="float32", choices=("float64", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda", ...')
    parser.add_argument("--r", type=int, default=256, help="rank of every adapter")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of prefill and of a training step")
    several = "with commas; eager,compile,aoti,onnx by default, max-autotune on request"
    parser.add_argument("--runtimes", type=_several("runtimes"), help=several)
    parser.add_argument("--contenders", type=_several("contenders"), help="with commas; all by default")
    several = "with commas: prefill,decode 1,training,decode 8,decode 32"
    parser.add_argument("--shapes", type=_several("shapes"), help=several)
    parser.add_argument(
        "--backend", default="inductor", choices=("inductor", "aot_eager", "eager"), help="of torch.compile"
    )
    parser.add_argument("--repeats", type=int, default=15, help="pairs of samples of a cell, at most; at least 3")
    parser.add_argument(
        "--cell-seconds", type=float, default=8.0, help="time for the samples of one cell; at least 5 pairs"
    )
    parser.add_argument("--minutes", type=float, help="stop before a cell that may not be finished by then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--again",
        action="store_true",
        help="measure everything anew; without it, a cell that is there is kept if package versions, --cell-seconds "
        "and --backend were the same (the commit may be another)",
    )


def _config(name: str) -> str:
    from bench.speed_model import CONFIGS

    return _known("config", (name.strip(),), tuple(CONFIGS))[0]


def _several(option: str) -> Callable[[str], tuple[str, ...]]:
    """Reads names with commas; every time an option is given, also where a later one takes its place."""

    def read(text: str) -> tuple[str, ...]:
        from bench.speed_contenders import CONTENDERS
        from bench.speed_model import shapes
        from bench.speed_runtimes import RUNTIMES

        known = {"runtimes": RUNTIMES, "contenders": CONTENDERS, "shapes": tuple(shapes(1))}[option]
        return _known(option, tuple(name.strip() for name in text.split(",")), known)

    return read


def _known(option: str, found: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := sorted(set(found) - set(known)):
        raise InputError(f"--{option}: there is no {', '.join(map(repr, unknown))} (known: {', '.join(known)})")
    return found


def _speed(options: argparse.Namespace) -> int:
    from bench.loading import device_of
    from bench.speed import Settings, run

    given = {name: value for name, value in vars(options).items() if name != "command" and value is not None}
    for name, least in (("repeats", 3), ("tokens", 2), ("r", 1), ("layers", 1), ("cell_seconds", 0)):
        if not given.get(name, least) >= least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, found {given[name]}")
    if options.minutes is not None and not options.minutes > 0:
        raise InputError(f"--minutes must be more than 0, found {options.minutes}; leave it out to have no limit")
    given["device"] = str(device_of(options.device))
    return 0 if run(Settings(**given)) else 1


def _report(options: argparse.Namespace) -> int:
    from bench.report import PAGES, check, write

    if missing := [name for name in PAGES if not (options.root / name).is_file()]:
        raise InputError(
            f"{str(options.root.resolve())!r} is not the project's root, it has no {', '.join(missing)}; "
            "run it there, or name the root: --root DIRECTORY"
        )
    if not options.check:
        for path in write(options.root):
            print(f"wrote {path}")
        return 0
    stale = check(options.root)
    for what in stale:
        print(f"out of step: {what}", file=sys.stderr)
    return 1 if stale else 0


def _compare(options: argparse.Namespace) -> int:
    from bench.compare import compare, told

    found = compare(options.before, options.after, options.by)
    print(told(found, options.by))
    return 1 if options.fail and found.regressed else 0


if __name__ == "__main__":
    sys.exit(main())
