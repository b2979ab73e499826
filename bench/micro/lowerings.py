"""What a live core costs on one decoder layer, against the plain base: ``python -m bench lowerings``.

One layer of the sizes of Qwen3-0.6B (hidden 1024, MLP 3072, 16 and 8 heads of 128), all seven projections adapted, the
core away from its start. Outputs are checked before anything is timed; contenders take turns in one process, and
ratios are of pairs of neighbours.

The limits, in FLOPs of a site (the layer has attention besides): inference under ``lowrank`` costs
``1 + r (d_in + d_out) / (d_in d_out)`` of the base's, under ``dense`` 1. A training step costs a LoRA
6 N r (d_in + d_out) more than the frozen base, ``lowrank`` 4 and ``dense`` 2, plus 2 d_in d_out r for the weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.result_provenance import environment
from bench.common.results_store import Store, lines
from bench.common.timing import Run, paired, quartiles
from bench.models.decoder_layer import HEAD, HEADS, HIDDEN, KV_HEADS, MLP, SEED, Layer, lora, naive, operated
from surgery import merge, set_coeff, sites
from surgery.lowerings._cost_model import schedule_of

KEY = ("kind", "mode", "r", "tokens")
NEAR = ("base again", "merged", "dense", "auto")  # to the base: it takes more pairs to tell them from it


def forward(model: nn.Module, x: Tensor) -> Run:
    """One forward without gradients."""

    def run() -> Tensor:
        with torch.no_grad():
            return model(x)  # type: ignore[no-any-return]

    return run


def step(model: nn.Module, x: Tensor) -> Run:
    """Forward and backward, to the trainable parameters and to the input, as in the middle of a model.

    Afterwards the parameters change, as an optimiser would change them: no weight serves two steps.
    """
    x = x.clone().requires_grad_()

    def update() -> None:
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.mul_(1 + 1e-4)

    def run() -> Callable[[], None]:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).sum().backward()
        return update

    return run


def check(base: nn.Module, models: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Largest difference of the models' outputs over their effect; refuses to time what is not the same function."""
    with torch.no_grad():
        plain, outputs = base(x), {name: model(x) for name, model in models.items()}
    reference = next(iter(outputs.values()))
    effect = float((reference - plain).abs().max())
    errors = {name: float((y - reference).abs().max()) / effect for name, y in outputs.items()}
    if effect == 0 or max(errors.values()) > 1e-3:
        raise SystemExit(f"the contenders do not compute the same: {errors}, effect {effect}")
    return errors


def inference(base: nn.Module, r: int, tokens: int, repeats: int, prepare: Callable[[nn.Module], Any]) -> Any:
    """Forwards of the base, merged, under ``dense``, and low-rank with a scalar and with a per-row coeff."""
    x = torch.randn(2, tokens // 2, HIDDEN, generator=torch.Generator().manual_seed(SEED))
    models = {
        "dense": operated(base, r, "dense"), "low-rank": operated(base, r, "dense"),
        "lowrank": operated(base, r, "lowrank"), "lowrank, coeff by row": operated(base, r, "lowrank"),
        "pair": operated(base, r, "pair"),
        "merged": merge(operated(base, r, "lowrank")), "auto": operated(base, r, "auto"),
    }  # fmt: skip
    for site in sites(models["low-rank"]).values():  # what auto takes where no weight can be made
        auto = schedule_of(site, "auto")
        site.schedule = auto._replace(inference=auto.rows_inference)
    set_coeff(models["lowrank, coeff by row"], torch.ones(2))
    errors = check(base, models, x)
    ready = {name: prepare(model) for name, model in {"base": base, "base again": base, **models}.items()}
    runs = {name: forward(model, x) for name, model in ready.items()}
    live, values = models["dense"], iter(range(10**9))

    def steer() -> None:
        set_coeff(live, 1 + 1e-3 * next(values))
        runs["dense"]()

    near = {name: run for name, run in runs.items() if name in ("base", *NEAR)}
    far = {name: run for name, run in runs.items() if name not in NEAR} | {"dense, coeff changed": steer}
    return {"errors": errors, "milliseconds": paired(near, 5 * repeats) | paired(far, repeats)}


def training(base: nn.Module, r: int, tokens: int, repeats: int, prepare: Callable[[nn.Module], Any]) -> Any:
    """Forward and backward of the frozen base, ours, PEFT's LoRA, and the naive residual form."""
    x = torch.randn(2, tokens // 2, HIDDEN, generator=torch.Generator().manual_seed(SEED))
    ours = {name: operated(base, r, name) for name in ("auto", "lowrank", "output", "dense")}
    ours["naive residual"] = naive(base, r)
    errors = check(base, ours, x)
    frozen = copy.deepcopy(base).requires_grad_(False)
    models = {"base": frozen, **ours, "LoRA": lora(base, r)}
    with torch.no_grad():  # which starts as the base
        torch.testing.assert_close(models["LoRA"](x), base(x), rtol=1e-4, atol=1e-4)
    runs = {name: step(prepare(model), x) for name, model in models.items()}
    return {"errors": errors, "milliseconds": paired(runs, repeats)}


def over(row: dict[str, Any], name: str) -> str:
    """Median of a contender's paired ratios to the base, with the quartiles; an older row may be without it."""
    if name not in row["milliseconds"]:
        return "n/a"
    low, middle, high = quartiles(row["milliseconds"][name])
    return f"{middle:.3f} ({low:.2f} to {high:.2f})"


def ratio(row: dict[str, Any], name: str) -> float:
    """Median of a contender's paired ratios to the base."""
    return quartiles(row["milliseconds"][name])[1]


def bound(r: int, tokens: int) -> float:
    """FLOPs of the layer with low-rank products, over its own: of the seven projections and of attention."""
    q, kv = HEADS * HEAD, KV_HEADS * HEAD
    shapes = [(HIDDEN, q), (HIDDEN, kv), (HIDDEN, kv), (q, HIDDEN), (HIDDEN, MLP), (HIDDEN, MLP), (MLP, HIDDEN)]
    base = sum(a * b for a, b in shapes) + 2 * q * tokens // 2  # per token; two rows attend to themselves
    return 1 + sum(r * (a + b) for a, b in shapes) / base


FORWARDS = {
    "the base against itself": "base again",
    "merged": "merged",
    "`dense`": "dense",
    "`dense`, right after coeff changed": "dense, coeff changed",
    "`auto`": "auto",
    "`auto` with a coeff per row: the chosen low-rank lowering": "low-rank",
    "`pair`": "pair",
    "`lowrank`": "lowrank",
    "`lowrank`, a coeff per row": "lowrank, coeff by row",
}
STEPS = {
    "`auto`": "auto",
    "`lowrank`": "lowrank",
    "`output`": "output",
    "`dense`": "dense",
    "naive residual form": "naive residual",
    "PEFT's LoRA": "LoRA",
}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The figures as tables."""
    found = {kind: [row for row in rows if row["kind"] == kind] for kind in ("inference", "training")}
    at = [f"{row['mode']}, r = {row['r']}" for row in found["inference"]]
    lines = [
        "| forward of 512 tokens, over the plain base | " + " | ".join(at) + " |",
        "|---" + "|---:" * len(at) + "|",
    ]
    for name, contender in FORWARDS.items():
        lines.append(f"| {name} | " + " | ".join(over(row, contender) for row in found["inference"]) + " |")
    lines.append(
        "| FLOPs of a low-rank form | "
        + " | ".join(f"{bound(row['r'], row['tokens']):.3f}" for row in found["inference"])
        + " |"
    )
    at = [f"{row['mode']}, {row['tokens']:,} tokens" for row in found["training"]]
    lines += ["", "| training step, r = 256, over the frozen base's | " + " | ".join(at) + " |"]
    lines.append("|---" + "|---:" * len(at) + "|")
    for name, contender in STEPS.items():
        lines.append(f"| {name} | " + " | ".join(over(row, contender) for row in found["training"]) + " |")
    for other in ("LoRA", "naive residual"):
        shares = [(ratio(row, "auto") - 1) / (ratio(row, other) - 1) for row in found["training"]]
        lines.append(
            f"| overhead of `auto`, {other}'s being 1 | " + " | ".join(f"{share:.2f}" for share in shares) + " |"
        )
    return "\n".join(lines) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The recorded rows, in the order of the tables."""
    rows = lines(path, (*KEY, "milliseconds"), "python -m bench lowerings")
    return sorted(rows, key=lambda row: (row["kind"], row["mode"] != "eager", row["r"], row["tokens"]))


def measure(
    out: Path, *, repeats: int, modes: Sequence[str], training_tokens: Sequence[int], ranks: Sequence[int]
) -> str:
    """Measure, write each row as it is there, and return the tables of all."""
    torch.manual_seed(SEED)
    base, path = Layer().eval(), out / "lowerings.jsonl"
    store = Store(path, read(path), KEY)
    source = {**environment(), "seed": SEED}  # before a row is written, which changes the checkout
    for mode in modes:
        prepare: Callable[[nn.Module], Any] = torch.compile if mode == "compiled" else lambda model: model
        for r in ranks:
            torch.compiler.reset()
            found = inference(base, r, 512, 3 * repeats, prepare)
            store.put({"kind": "inference", "mode": mode, "r": r, "tokens": 512, **found, **source})
        for tokens in training_tokens:
            torch.compiler.reset()
            found = training(base, 256, tokens, max(7, repeats * 512 // tokens), prepare)
            store.put({"kind": "training", "mode": mode, "r": 256, "tokens": tokens, **found, **source})
    text = markdown(read(path))
    (out / "lowerings.md").write_text(text)
    return text
