"""One training run of the quality comparison, and many of them in a pool of processes."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import corpus
from bench.models.byte_lm import DEFAULT_STEPS, held_out_loss, language_model_loss
from bench.models.demo_model import small_demo_model
from bench.models.logits import frozen_logits, logits
from bench.quality.methods import Method, build

OPTIMIZER = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
CLIP = 1.0
WARM_UP = 0.1


@dataclass(frozen=True)
class QualitySettings:
    """What all runs share.

    Attributes:
        r: rank of the variants, and of PEFT's methods beside its default.
        steps, batch, length: of the training; a batch is ``batch`` windows of ``length`` bytes.
        seeds: number of seeds, from 0 on; seed 0 is the one of the sweep.
        base_steps: of the base model's own training.
        calibration: number of batches, for the variants that need them.
        evaluated: most bytes of the held-out part, and of the validation part.
    """

    r: int = 64
    steps: int = 60
    batch: int = 12
    length: int = 128
    seeds: int = 3
    base_steps: int = DEFAULT_STEPS
    calibration: int = 8
    evaluated: int = 32768


@dataclass(frozen=True)
class Task:
    """A run: a method at a learning rate, with a seed that gives the batches and the initial values."""

    method: Method
    seed: int
    rate: float | None


@dataclass(frozen=True)
class Prepared:
    """The base model, the three parts of the text, two windows to compare models on, and the base's logits there."""

    base: nn.Module
    train: Tensor
    validation: Tensor
    held_out: Tensor
    probe: Tensor
    logits: Tensor


def prepare(settings: QualitySettings, cache: Path | None) -> Prepared:
    """The demo's base model and its English text, whose held-out part is split once more, for the choice of rates."""
    demo = small_demo_model(cache, settings.base_steps, None, 0)
    held_out, validation = corpus.split(bytes(demo.held_out["English"].tolist()), held_out=0.5)
    base, probe = demo.load(), next(iter(corpus.windows(held_out, batch=2, length=settings.length, count=2)))
    return Prepared(base, demo.train, validation, held_out, probe, frozen_logits(base, probe))


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at a step from 0 on: linear warm-up, then a cosine to zero, as a product."""
    return min(1.0, (step + 1) / max(1, round(WARM_UP * steps))) * (1 + math.cos(math.pi * step / steps)) / 2


class Trainer:
    """A model in training, with the optimiser and the schedule that all methods share."""

    def __init__(self, model: nn.Module, rate: float, steps: int) -> None:
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, **OPTIMIZER)
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: schedule(step, steps))

    def step(self, tokens: Tensor) -> None:
        """Forward, backward and update."""
        language_model_loss(self.model, tokens).backward()
        nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad(set_to_none=True)


def run(task: Task, settings: QualitySettings, setting: Prepared) -> dict[str, Any]:
    """Train and evaluate once; a loss that is not finite is None."""

    def loss_on(data: Tensor, most: int) -> float | None:
        found = held_out_loss(model, data, length=settings.length, max_bytes=most)
        return found if math.isfinite(found) else None

    batches = {"batch": settings.batch, "length": settings.length, "seed": task.seed}
    started = time.perf_counter()
    calibration = list(corpus.batches(setting.train, steps=settings.calibration, **batches))
    model = build(task.method, setting.base, task.seed, calibration)
    ready = time.perf_counter() - started
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row = {**asdict(task.method), "seed": task.seed, "rate": task.rate, "trainable": trainable}
    row["initial_difference"] = float((logits(model, setting.probe) - setting.logits).abs().max())
    row["initial_loss"] = loss_on(setting.held_out, settings.evaluated // 4)
    if task.rate is not None:
        trainer = Trainer(model, task.rate, settings.steps)
        for tokens in corpus.batches(setting.train, steps=settings.steps, **batches):
            trainer.step(tokens)
        model.eval()
    row["validation_loss"] = loss_on(setting.validation, settings.evaluated)
    row["held_out_loss"] = loss_on(setting.held_out, settings.evaluated)
    return {**row, "setup_seconds": round(ready, 3)}


_work: tuple[QualitySettings, Prepared] | None = None


def _enter(settings: QualitySettings, cache: Path | None) -> None:
    """Make a process of the pool ready."""
    global _work
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    _work = settings, prepare(settings, cache)


def _run(task: Task) -> dict[str, Any]:
    assert _work is not None
    return run(task, *_work)


@contextlib.contextmanager
def runner(
    settings: QualitySettings, cache: Path | None, workers: int
) -> Iterator[Callable[[Iterable[Task]], Iterable[dict[str, Any]]]]:
    """A function that runs tasks and yields their rows in the order of the tasks, one thread to each process.

    One worker runs in this process. Results do not depend on the number of workers: a run draws all that is random
    from its own seed, and starts from a copy of the base.
    """
    threads = torch.get_num_threads()
    try:
        setting = prepare(settings, cache)  # trains the base where it is not cached, with all threads
        torch.set_num_threads(1)
        if workers == 1:
            yield lambda tasks: (run(task, settings, setting) for task in tasks)
            return
        with multiprocessing.get_context("spawn").Pool(workers, _enter, (settings, cache)) as pool:
            yield lambda tasks: pool.imap(_run, tasks)
    finally:
        torch.set_num_threads(threads)
