"""How long the passes take, by the size of the graph: ``python -m bench passes``.

The limit is linear: a pass looks at each node a bounded number of times. Reported are milliseconds per 1,000 nodes of
the base graph, the exponent of a power law through the sizes, and apart from them what is paid once per kind of adapter
(tracing its forward) and once per pipeline (generating the module's code, which is PyTorch's own).
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.common.result_provenance import environment
from bench.common.timing import power
from passes.ir import adapter_trace as trace
from surgery import apply_surgery, pipeline

LAYERS = (2, 4, 8, 16, 28)


def model_of(layers: int) -> Any:
    """A Qwen3 with small matrices, since the passes see nodes and not sizes."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).eval()


def measure(repeats: int = 5, layers: tuple[int, ...] = LAYERS) -> dict[str, Any]:
    """Run the pipeline on every size in turn, ``repeats`` times over, and keep each pass's milliseconds."""
    inputs = {"input_ids": torch.randint(0, 256, (2, 8))}
    models = {n: apply_surgery(model_of(n), "antipasto", r=8, example_inputs=inputs, progress=False) for n in layers}
    pipeline(models[layers[0]], inputs, form="residual")  # once, to have everything imported
    once = []
    for _ in range(repeats):
        trace._TRACES.clear()
        with_trace = pipeline(models[layers[0]], inputs, form="residual", stop_after="insert").stages[0].seconds
        once.append(
            1000
            * (with_trace - pipeline(models[layers[0]], inputs, form="residual", stop_after="insert").stages[0].seconds)
        )
    times: dict[int, dict[str, list[float]]] = {n: {} for n in layers}
    sizes: dict[int, dict[str, int]] = {}
    pipeline(models[layers[0]], inputs, form="residual")
    for _ in range(repeats):
        for n, model in models.items():
            inserted = pipeline(model, inputs, form="residual", stop_after="insert").stages[-1]
            times[n].setdefault(inserted.name, []).append(1000 * inserted.seconds)
            compiled = pipeline(model, inputs, form="residual")
            sizes[n] = {stage.name: stage.nodes for stage in compiled.stages}
            for stage in compiled.stages[:-1]:
                times[n].setdefault(stage.name, []).append(1000 * stage.seconds)
            started = time.perf_counter()
            compiled.graph.recompile()
            times[n].setdefault("recompile", []).append(1000 * (time.perf_counter() - started))
    return {"nodes": sizes, "milliseconds": times, "trace_milliseconds": once}


def summary(data: dict[str, Any]) -> list[dict[str, Any]]:
    """By pass: milliseconds per 1,000 nodes of the base at each size, and the exponent of their growth."""
    found = []
    for name in ("insert", "annotate", "fold", "merge", "recompile"):
        points = [(data["nodes"][n]["merge"], statistics.median(t[name])) for n, t in data["milliseconds"].items()]
        slope, _ = power(*zip(*points, strict=True))
        spread = max((max(t[name]) - min(t[name])) / statistics.median(t[name]) for t in data["milliseconds"].values())
        per = {nodes: 1000 * ms / nodes for nodes, ms in points}
        found.append({"pass": name, "per_1000_nodes_ms": per, "exponent": slope, "largest_relative_range": spread})
    return found


def markdown(found: list[dict[str, Any]], once: list[float]) -> str:
    """The summary as Markdown."""
    sizes = list(found[0]["per_1000_nodes_ms"])
    lines = [
        "| ms per 1,000 nodes of the base | " + " | ".join(f"{n:,} nodes" for n in sizes) + " | exponent |",
        "|---|" + "---:|" * (len(sizes) + 1),
    ]
    for row in found:
        cells = " | ".join(f"{ms:.0f}" for ms in row["per_1000_nodes_ms"].values())
        lines.append(f"| {row['pass']} | {cells} | {row['exponent']:.2f} |")
    return "\n".join(lines) + f"\n\nTracing a new kind of adapter, once: {statistics.median(once):.0f} ms.\n"


def record(out: Path, *, repeats: int) -> str:
    """Measure, write the table with its data, and return it."""
    torch.manual_seed(0)
    data = measure(repeats)
    found = summary(data)
    out.mkdir(parents=True, exist_ok=True)
    row = {**environment(), "seed": 0, "repeats": repeats, **data, "summary": found}
    (out / "passes.json").write_text(json.dumps(row, indent=1) + "\n")
    text = markdown(found, data["trace_milliseconds"])
    (out / "passes.md").write_text(text)
    return text
