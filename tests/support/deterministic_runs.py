"""Everything that must give the same bytes in every process, as digests."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from surgery import Contrast, apply_surgery, load_adapter, merge, save_adapter, undo_surgery
from surgery.variants import Variant
from tests.support.variant_cases import VARIANTS

RANK, D_IN = 9, 29


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Widths at which products, eigenvectors and QRs do depend on the number of threads."""
    model = nn.Sequential(nn.Linear(D_IN, 136), nn.Tanh(), nn.Linear(136, 137), nn.Tanh(), nn.Linear(137, 13))
    for i, parameter in enumerate(model.parameters()):
        parameter.data = some(*parameter.shape, seed=i).div(parameter.shape[-1] ** 0.5)
    return model.to(dtype)


def data_of(variant: Variant) -> Any:
    data = [some(7, D_IN, seed=1), some(39, D_IN, seed=2)]
    if variant.statistic == "contrast":
        return Contrast(data, [batch + 0.3 for batch in data], pool="all")
    return data


def cases() -> Iterator[tuple[str, Variant, Any]]:
    """Every variant, with and without data, by every method of factorisation."""
    for i, variant in enumerate(VARIANTS):
        for method in ("exact", "randomised"):
            config = dataclasses.replace(variant, svd_method=method)
            if not variant.needs_calibration:
                yield f"{i} {variant.name} {method}", config, None
            elif method == "randomised":
                continue
            yield f"{i} {variant.name} {method} data", config, data_of(variant)
    for pool in surgery.factors.statistic.POOLS:
        yield f"pool {pool}", surgery.AntiPaSTO(pool=pool), data_of(surgery.AntiPaSTO())


def saved(folder: Path, variant: Variant, data: Any, dtype: torch.dtype = torch.float32, **options: Any) -> str:
    """Digest of the two files of an adapter."""
    example = some(2, D_IN).to(dtype)
    options = {"r": RANK, "target_modules": "all-linear", "seed": 3, "progress": False} | options
    model = apply_surgery(fresh_model(dtype), variant, example_inputs=example, calibration=data, **options)
    save_adapter(model, folder)
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    found = {name: saved(folder / str(i), *case) for i, (name, *case) in enumerate(cases())}
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        found[str(dtype)] = saved(folder / str(dtype), surgery.AntiPaSTOAblate(k=3), None, dtype)
    return found


def run_everything(folder: Path) -> None:
    """Every lowering, training, merging, a file and undoing, of every variant: nothing lacks a deterministic way."""
    assert torch.are_deterministic_algorithms_enabled()
    x = some(6, D_IN)
    for i, variant in enumerate(VARIANTS):
        for lowering in ("lowrank", "dense", "output", "residual"):
            if (lowering == "dense" and not variant.linear) or (
                lowering == "output" and not variant.depends_only_on_Sh
            ):
                continue
            model, base = fresh_model(), fresh_model()(x)
            options: Any = {"r": 8, "target_modules": "all-linear", "lowering": lowering, "progress": False}
            apply_surgery(model, variant, example_inputs=x, calibration=data_of(variant), **options)
            trained = [p for p in model.parameters() if p.requires_grad]
            if trained:
                optimiser = torch.optim.Adam(trained, lr=1e-2)
                for _ in range(2):
                    optimiser.zero_grad()
                    model(x).square().sum().backward()
                    optimiser.step()
            with torch.no_grad():
                live = model(x)
            save_adapter(model, folder / f"{i}{lowering}")
            loaded = load_adapter(fresh_model(), folder / f"{i}{lowering}")
            with torch.no_grad():
                torch.testing.assert_close(loaded(x), live, rtol=1e-4, atol=1e-4)
            assert torch.equal(undo_surgery(model)(x), base)
            if variant.linear:
                torch.testing.assert_close(merge(loaded)(x), live, rtol=1e-4, atol=1e-4)
