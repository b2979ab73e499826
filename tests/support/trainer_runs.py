"""A small causal language model that a Trainer trains: its cores, its head and its last norm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from surgery import apply_surgery

VOCABULARY, LENGTH = 64, 8
BESIDE = ["lm_head.weight", "model.norm.weight"]


def base(*, tie: bool = False) -> Any:
    """The base model; always the same."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, tie_word_embeddings=tie, attention_dropout=0.1,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).eval()


def operated(*, tie: bool = False) -> Any:
    """The model with an adapter, of which also the head and the last norm are to be trained."""
    model = apply_surgery(base(tie=tie), "antipasto", r=8, progress=False)
    model.lm_head.requires_grad_(True)
    model.model.norm.requires_grad_(True)
    return model


def batch() -> dict[str, torch.Tensor]:
    """What outputs are compared on."""
    return {"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(5))}


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(**batch()).logits
    return found


def trainer(model: nn.Module, folder: Path, **options: Any) -> transformers.Trainer:
    """A Trainer of eight steps, which saves after each other step."""
    generator = torch.Generator().manual_seed(1)
    data = [{"input_ids": t, "labels": t} for t in torch.randint(3, VOCABULARY, (16, LENGTH), generator=generator)]
    settings = {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 0.05,
        "save_strategy": "steps", "save_steps": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "logging_steps": 2, "seed": 3,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**settings | options)
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])


@contextlib.contextmanager
def warnings_of_transformers() -> Iterator[list[str]]:
    """What transformers logs as warnings in a block."""
    import logging

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
