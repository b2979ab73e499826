"""The demo's model and its two domains: a small byte-level model trained here, or a causal LM of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import corpus
from bench.models.byte_lm import DEFAULT_STEPS, base_model, default_cache_dir
from passes.errors import InputError


@dataclass(frozen=True)
class DemoModel:
    """What the demo works on.

    Attributes:
        name: of the model.
        load: gives a fresh copy of the base model.
        train: tokens of the new domain to train on.
        held_out: held-out tokens by domain, the new one first.
        unit: what a token is.
        notes: what the results file records of the model.
    """

    name: str
    load: Callable[[], nn.Module]
    train: Tensor
    held_out: dict[str, Tensor]
    unit: str
    notes: dict[str, Any]


def _split(text: Path | None) -> tuple[Tensor, Tensor]:
    """Training and held-out part of the new domain's text.

    Raises:
        InputError: the text is too short to hold a part of it out.
    """
    try:
        return corpus.split(corpus.from_file(text) if text else corpus.english())
    except ValueError as error:
        raise InputError(f"{str(text)!r}: {error}") from error


def small_demo_model(cache: Path | None, base_steps: int | None, text: Path | None, seed: int) -> DemoModel:
    """The byte-level model, trained on Python source unless it is cached; the new domain is English prose."""
    folder = cache or default_cache_dir()
    steps = base_steps or DEFAULT_STEPS
    new, new_held_out = _split(text)
    _, source_held_out = corpus.split(corpus.python_source())
    _, info = base_model(folder, seed=seed, steps=steps)
    return DemoModel(
        "Qwen3, byte-level",
        lambda: base_model(folder, seed=seed, steps=steps, progress=False)[0],
        new,
        {text.name if text else "English": new_held_out, "Python source": source_held_out},
        "byte",
        {"base_seconds": info["seconds"], "base_steps": steps, "cached": info["cached"]},
    )


def hub_demo_model(model: str, text: Path | None) -> DemoModel:
    """A causal LM of the user's own, from a path or the hub, and the user's text (or the English prose).

    Raises:
        InputError: the model or its tokenizer cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(model).eval()

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        load()
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot load {model!r} as a causal LM with its tokenizer: {error}") from error

    def tokens(data: Tensor) -> Tensor:
        return torch.tensor(tokenizer(bytes(data.tolist()).decode(errors="ignore"))["input_ids"])

    new, new_held_out = _split(text)
    _, source_held_out = corpus.split(corpus.python_source()[:400_000])
    held_out = {text.name if text else "English": tokens(new_held_out), "Python source": tokens(source_held_out)}
    return DemoModel(model, load, tokens(new), held_out, "token", {})
