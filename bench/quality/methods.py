"""The methods that are compared for quality: every variant with something to train, PEFT's, and full fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery import apply_surgery
from surgery.variants import REGISTRY, Variant

DEFAULT_RANK = 8
"""PEFT's own."""
PEFT: dict[str, dict[str, Any]] = {"LoRA": {}, "PiSSA": {"init_lora_weights": "pissa"}, "DoRA": {"use_dora": True}}
TARGETS = "all-linear"
GRID = {"surgery": (-5, -4, -3, -2), "peft": (-6, -5, -4, -3), "full": (-7, -6, -5, -4)}
"""Learning rates of the sweep by family, in half decades."""
EXTENSION = 2
"""By how many half decades the grid is extended, once, where its best rate lies at an edge."""


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: as it is shown.
        family: "base", "surgery", "peft" or "full".
        kind: the variant's registered name, or PEFT's method.
        rank: at every site; None where there is none.
    """

    name: str
    family: str
    kind: str = ""
    rank: int | None = None


BASE, FULL = Method("base", "base"), Method("full fine-tuning", "full")


def trains(cls: type[Variant]) -> bool:
    """Whether a variant has a core tensor that is trained."""
    variant = cls()
    return bool(set(variant.init_core(variant.rank(8), torch.Generator())) - set(variant.frozen))


def methods(r: int) -> list[Method]:
    """All that are compared at rank r; PEFT's at its default rank as well."""
    found = [Method(name, "surgery", name, r) for name in sorted(REGISTRY) if trains(REGISTRY[name])]
    for rank in sorted({r, DEFAULT_RANK}, reverse=True):
        found += [Method(f"{kind}, r = {rank}", "peft", kind, rank) for kind in PEFT]
    return [*found, FULL]


def untrainable() -> list[str]:
    """Registered variants that are left out, since they have nothing to train."""
    return sorted(name for name, cls in REGISTRY.items() if not trains(cls))


def rate(half_decades: int) -> float:
    """The learning rate ``10 ** (n / 2)``, in two digits."""
    return float(f"{10 ** (half_decades / 2):.2g}")


def build(method: Method, base: nn.Module, seed: int, calibration: Sequence[Tensor]) -> nn.Module:
    """A copy of the base, made ready for training.

    Args:
        seed: of what is drawn at random.
        calibration: batches of training text, for the variants that cannot do without.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if method.family == "surgery":
        needed = REGISTRY[method.kind]().needs_calibration
        data = [{"input_ids": tokens} for tokens in calibration] if needed else None
        return apply_surgery(
            model, method.kind, r=method.rank, target_modules=TARGETS, calibration=data, seed=seed, progress=False
        )
    if method.family == "peft":
        from peft import LoraConfig, get_peft_model

        # alpha = r: every scaling is 1, as PEFT's default rank and alpha have it
        config = LoraConfig(r=method.rank, lora_alpha=method.rank, target_modules=TARGETS, **PEFT[method.kind])
        return get_peft_model(model, config)  # type: ignore[no-any-return,arg-type]
    return model.requires_grad_(method.family == "full")
