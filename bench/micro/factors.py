"""How long initialisation takes, and what the cores cost: ``python -m bench factors``.

* Factorisation of a weight against ``torch.linalg.svd`` of the whole of it, in float32: the exact route, and the
  randomised one with its excess residual, ``|W - W_r| / |W - best W_r| - 1``.
* CorDA's initialisation against the original's route, ``eigh(C)`` and ``SVD(W C^{1/2})`` in float32; with and without
  the accumulation of the moment. Both are compared with the original's route in float64.
* Peak memory of a calibration for 10,000 and 100,000 tokens, each in a process of its own.
* Forward and backward of one site by variant.

All run in one thread: surgery factorises sites side by side, each in a thread, so that bits do not depend on how many
there are; the original's loop over sites could do so too.

The limits: a full SVD takes about 20 d^3 FLOPs, the eigenvectors of a Gram matrix 9 d^3 at twice the width, a
randomised one 2 d^2 (d/2 + 4 r), and a core costs little where it needs less than the 2 d r of the low-rank products.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.memory import Meter
from bench.common.result_provenance import environment
from bench.common.runs import step
from bench.common.timing import alternate
from bench.models.random_weights import TwoLinears, weight_of
from surgery import apply_surgery, calibrate, sites
from surgery.factors.oriented_svd import oriented
from surgery.factors.statistic import Statistic
from surgery.factors.statistics_file import Statistics
from surgery.factors.svd import factorise
from surgery.support.fingerprint import fingerprint
from surgery.variants import REGISTRY

SHAPES = ((1024, 1024), (3072, 1024), (1024, 3072))
RANKS = (64, 256)
TOKENS = (10_000, 100_000)
EPS = 1e-3


def factorisation(repeats: int) -> list[dict[str, Any]]:
    """Exact and randomised top-r against the full SVD in float32."""
    rows = []
    for d_out, d_in in SHAPES:
        for decay in (0.0, 0.5):
            W = weight_of(d_out, d_in, decay)
            S = torch.linalg.svdvals(W.double())
            for r in RANKS:
                run = {
                    "svd": lambda W=W: torch.linalg.svd(W, full_matrices=False),
                    "exact": lambda W=W, r=r: factorise(W, r, "exact"),
                    "randomised": lambda W=W, r=r: factorise(W, r, "randomised"),
                }
                row: dict[str, Any] = {"shape": [d_out, d_in], "decay": decay, "r": r}
                row["milliseconds"] = alternate(run, repeats)
                for name in ("exact", "randomised"):
                    found = run[name]()
                    excess = (
                        torch.linalg.norm(W.double() - found.U.double() * found.S @ found.Vh.double()) / S[r:].norm()
                        - 1
                    )
                    worst = ((found.S - S[:r]).abs() / S[:r]).max()
                    row[name] = {"method": found.method, "excess_residual": float(excess), "worst_S": float(worst)}
                    row[name] |= {"residual": found.residual, "orthonormality": found.error}
                rows.append(row)
    return rows


def original_route(W: Tensor, C: Tensor, r: int) -> Tensor:
    """``U diag(S) P`` by ``C^{1/2}`` and ``C^{-1/2}``, as the original computes it."""
    values, vectors = torch.linalg.eigh(C + EPS * torch.eye(len(C), dtype=C.dtype))
    root = values.clamp(min=1e-12).sqrt()
    U, S, Vh = torch.linalg.svd(W @ (vectors * root) @ vectors.T, full_matrices=False)
    P = Vh[:r] @ (vectors / root) @ vectors.T
    return U[:, :r] * S[:r] @ P


def corda(repeats: int, r: int = 256, tokens: int = 8192) -> list[dict[str, Any]]:
    """CorDA's factors from a second moment, and from the inputs themselves."""
    rows = []
    for d_out, d_in in SHAPES:
        generator = torch.Generator().manual_seed(0)
        W = weight_of(d_out, d_in, 0.5)
        mixing = torch.randn(d_in, d_in, generator=generator) * torch.arange(1, d_in + 1) ** -0.5 / d_in**0.5
        x = torch.randn(tokens, d_in, generator=generator) @ mixing.T
        side = "output" if d_out < d_in else "input"

        def collect(x: Tensor = x, W: Tensor = W, side: str = side, d_in: int = d_in) -> Statistic:
            statistic = Statistic("moment", side, d_in, W if side == "output" else None)
            for batch in x.split(1024):
                statistic.add(batch)
            return statistic

        def covariance(x: Tensor = x) -> Tensor:
            C = torch.zeros(x.shape[1], x.shape[1])
            for batch in x.split(1024):
                C += batch.T @ batch
            return C / len(x)

        kept, C = collect(), covariance()
        run = {
            "original, from C": lambda W=W, C=C: original_route(W, C, r),
            "ours, from the moment": lambda W=W, kept=kept: oriented(W, r, kept, EPS),
            "original, from inputs": lambda W=W, f=covariance: original_route(W, f(), r),
            "ours, from inputs": lambda W=W, f=collect: oriented(W, r, f(), EPS),
        }
        reference = original_route(W.double(), x.double().T @ x.double() / tokens, r)
        found = oriented(W, r, kept, EPS)
        scale = reference.abs().max()
        errors = {
            "ours": float(((found.U * found.S) @ found.Vh - reference).abs().max() / scale),
            "original, float32": float((original_route(W, C, r) - reference).abs().max() / scale),
        }
        row = {"shape": [d_out, d_in], "r": r, "tokens": tokens, "milliseconds": alternate(run, repeats)}
        rows.append(row | {"error": errors})
    return rows


def memory_of(tokens: int) -> dict[str, Any]:
    """Peak memory of a calibration on so many tokens, in bytes above what this process held before it."""
    torch.manual_seed(0)
    model = TwoLinears(512)

    def batches(count: int) -> Iterator[Tensor]:
        for _ in range(count):
            yield torch.randn(1000, 512)

    calibrate(model, "antipasto_corda", batches(2), r=64, progress=False)  # what is set up once
    meter = Meter(torch.device("cpu"))
    with meter.peak("calibration"):
        found = calibrate(model, "antipasto_corda", batches(tokens // 1000), r=64, progress=False)
    return {"tokens": tokens, "peak_bytes": meter.peaks["calibration"], "how": meter.how, "sums": found.bytes}


def memory() -> list[dict[str, Any]]:
    """Peak memory by number of tokens.

    The C library gives every tensor back at once (it would keep a varying part of its heap), so that a peak is of what
    is held.
    """
    found, env = [], {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    for tokens in TOKENS:
        run = subprocess.run(
            [sys.executable, "-m", "bench.micro.factors", str(tokens)],
            capture_output=True,
            text=True,
            check=True,
            env=env,
        )
        found.append(json.loads(run.stdout))
    return found


def cores(repeats: int, d: int = 1024, r: int = 256, tokens: int = 4096) -> list[dict[str, Any]]:
    """Forward, and forward with backward, of one site by variant, beside those of the plain linear module."""
    torch.manual_seed(0)
    base = nn.Linear(d, d)
    x = torch.randn(tokens, d)
    rows, models = [], {"base": base.requires_grad_(False)}
    for name, cls in sorted(REGISTRY.items()):
        model = nn.Sequential(nn.Linear(d, d))
        model.load_state_dict({f"0.{k}": v for k, v in base.state_dict().items()})
        config = cls(r=r)
        apply_surgery(
            model, config, target_modules=["0"], progress=False,
            calibration=_statistics(model, config.statistic, x) if config.needs_calibration else None,
        )  # fmt: skip
        with torch.no_grad():
            for p in sites(model)["0"].core.parameters():
                p += 0.1 * torch.rand(p.shape)
        models[name] = model

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(x)

    only = alternate({name: lambda m=m: forward(m) for name, m in models.items()}, repeats)
    whole = alternate({name: step(m, ((x,), {})) for name, m in models.items()}, repeats)
    for name, model in models.items():
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows.append({"variant": name, "trainable": trainable, "forward": only[name], "forward_backward": whole[name]})
    return rows


def _statistics(model: nn.Module, kind: str, x: Tensor) -> Statistics:
    statistic = Statistic(kind, "input", x.shape[1])
    for name in ("positive", "negative") if kind == "contrast" else ("all",):
        statistic.add(x + (name == "positive"), name)
    return Statistics({"0": statistic}, {"0": fingerprint(model.get_parameter("0.weight"))})


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> str:
    """Median of the paired ratios of two contenders, with their range."""
    pairs = sorted(a / b for a, b in zip(times[slow], times[fast], strict=True))
    return f"{statistics.median(pairs):.2f}× ({pairs[0]:.2f} to {pairs[-1]:.2f})"


def markdown(data: dict[str, Any]) -> str:
    """The figures as tables."""
    lines = [
        "| weight | spectrum | r | exact, faster than the full SVD | randomised, faster by | its excess residual |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in data["factorisation"]:
        times, shape = row["milliseconds"], " × ".join(map(str, row["shape"]))
        spectrum = "random" if not row["decay"] else "random · i^-1/2"
        excess = row["randomised"]["excess_residual"]
        lines.append(
            f"| {shape} | {spectrum} | {row['r']} | {ratio(times, 'svd', 'exact')} "
            f"| {ratio(times, 'svd', 'randomised')} | {excess:.1e} |"
        )
    lines += [
        "",
        "| CorDA, r = 256 | from the moment | from 8,192 tokens | error | the original's, in float32 |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in data["corda"]:
        times, errors = row["milliseconds"], row["error"]
        lines.append(
            f"| {' × '.join(map(str, row['shape']))} "
            f"| {ratio(times, 'original, from C', 'ours, from the moment')} faster "
            f"| {ratio(times, 'original, from inputs', 'ours, from inputs')} faster "
            f"| {errors['ours']:.0e} | {errors['original, float32']:.0e} |"
        )
    first, last = data["memory"]
    lines += ["", "| one site, 1024 × 1024, 4,096 tokens, r = 256 | trainable | forward | forward and backward |"]
    lines += ["|---|---:|---:|---:|"]
    reference = next(row for row in data["cores"] if row["variant"] == "base")
    for row in data["cores"]:
        forward = {"a": row["forward"], "b": reference["forward"]}
        both = {"a": row["forward_backward"], "b": reference["forward_backward"]}
        cells = f"{ratio(forward, 'a', 'b')} | {ratio(both, 'a', 'b')}"
        name = "the plain linear module" if row is reference else row["variant"]
        lines.append(f"| {name} | {row['trainable']:,} | {'1' if row is reference else cells.split(' | ')[0]} "
                     f"| {'1' if row is reference else cells.split(' | ')[1]} |")  # fmt: skip
    lines += [
        "",
        f"Calibration: peak memory {first['peak_bytes'] / 2**20:.1f} MiB at {first['tokens']:,} tokens, "
        f"{last['peak_bytes'] / 2**20:.1f} MiB at {last['tokens']:,}, above what the process held before.",
    ]
    return "\n".join(lines) + "\n"


def measure(out: Path, *, repeats: int) -> str:
    """Measure, write the tables with their data, and return them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = {
        "factorisation": factorisation(repeats),
        "corda": corda(max(3, repeats // 2)),
        "memory": memory(),
        "cores": cores(repeats),
    }
    out.mkdir(parents=True, exist_ok=True)
    record = {**environment(), "seed": 0, "repeats": repeats, **data}
    (out / "factors.json").write_text(json.dumps(record, indent=1) + "\n")
    text = markdown(data)
    (out / "factors.md").write_text(text)
    return text


if __name__ == "__main__":  # a process for one measurement of memory
    torch.set_num_threads(1)
    print(json.dumps(memory_of(int(sys.argv[1]))))
