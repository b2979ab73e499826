"""A small language model over bytes, trained once on text that every machine has and then kept in a cache."""

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.common import corpus

DEFAULT_STEPS = 850
_SIZES = {"vocab_size": 256, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
_REST = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "dtype": "float32"}
MODEL = {**_SIZES, **_HEADS, **_REST}
BATCH = {"batch": 12, "length": 128}
OPTIMIZER = {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}
CLIP = 1.0
_RECORD = "training.json"


def default_cache_dir() -> Path:
    """Return where trained models are kept: ``sspace-surgery`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sspace-surgery"


def base_model(
    cache_dir: str | Path, *, seed: int = 0, steps: int = DEFAULT_STEPS, progress: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the trained model, in eval mode, and the record of its training.

    The first call trains for about two minutes on two cores; later ones load the result. The folder's name holds a
    key of all that determines the result, and its record a digest of every file; damage is discarded with a warning.

    Returns:
        The model (``Qwen3ForCausalLM``), and a dict of ``loss_curve`` as (step, loss) pairs, ``settings``, ``key``,
        ``seconds``, ``python``, ``torch``, ``files``, ``cached`` (whether it was trained before) and ``path``.
    """
    source = corpus.python_source()
    settings = {"model": MODEL, "batch": BATCH, "optimizer": OPTIMIZER, "clip": CLIP}
    settings |= {"seed": seed, "steps": steps, "corpus": _digest(source)}
    key = _digest(json.dumps(settings, sort_keys=True).encode())[:16]
    folder = Path(cache_dir) / f"qwen3-bytes-{key}"
    if folder.exists():
        try:
            return _load(folder, key, cached=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"discarding the damaged model in {folder} and training anew: {error}", stacklevel=2)
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the rename is atomic; made first, so that an unwritable folder fails before the training.
    with tempfile.TemporaryDirectory(prefix=".training-", dir=folder.parent) as scratch:
        _train(Path(scratch) / folder.name, source, key, settings, progress)
        # Another process may have finished the same training first; its result is as good as this one.
        if not folder.exists():
            os.rename(Path(scratch) / folder.name, folder)
    return _load(folder, key, cached=False)


@torch.no_grad()
def held_out_loss(
    model: nn.Module, data: Tensor, *, length: int = 128, batch: int = 32, max_bytes: int = 65536
) -> float:
    """Return the mean nats per byte over evenly spaced windows, the same windows at every call.

    The first byte of a window is given, not predicted. The model is left in the mode, train or eval, it came in.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, a given byte and a predicted one; got {length}")
    count = max(1, min(len(data), max_bytes) // length)
    windows = corpus.windows(data, batch=batch, length=length, count=count)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        total = sum(language_model_loss(model, window.to(device), reduction="sum").item() for window in windows)
    finally:
        model.train(was_training)
    return total / (count * (length - 1))


def language_model_loss(model: nn.Module, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token cross-entropy of tokens (batch, length), in nats."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction)


def _train(folder: Path, source: bytes, key: str, settings: dict[str, Any], progress: bool) -> None:
    """Train a model and write it, with its record, to ``folder``."""
    from rich.console import Console
    from rich.progress import Progress
    from transformers import Qwen3Config, Qwen3ForCausalLM

    started, curve, steps, seed = time.perf_counter(), [], settings["steps"], settings["seed"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**MODEL)).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **OPTIMIZER)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, OPTIMIZER["lr"], total_steps=steps, cycle_momentum=False)
    batches = corpus.batches(corpus.split(source)[0], steps=steps, seed=seed, **BATCH)
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("", total=steps)
        for step, tokens in enumerate(batches, start=1):
            loss = language_model_loss(model, tokens)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            curve.append((step, round(loss.item(), 4)))
            bar.update(task, advance=1, description=f"training the base model, loss {loss.item():.3f}")
    model.save_pretrained(folder)
    record = {"key": key, "settings": settings, "loss_curve": curve, "seconds": round(time.perf_counter() - started, 1)}
    record |= {"python": platform.python_version(), "torch": torch.__version__, "files": _file_digests(folder)}
    (folder / _RECORD).write_text(json.dumps(record))


def _load(folder: Path, key: str, *, cached: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model and its record, or raise an error if anything in the folder is not as it was written."""
    record = json.loads((folder / _RECORD).read_text())
    if not isinstance(record, dict) or record.get("key") != key:
        raise ValueError(f"{_RECORD} does not hold the key {key}")
    # Checked before loading: a file cut short can raise anything, and absent weights are merely drawn at random.
    if record.get("files") != _file_digests(folder):
        raise ValueError("the files are not those that were written")
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    # Loaded weights are a view of the file; copied, so that nothing done to the file later can reach the model.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    record["loss_curve"] = [tuple(point) for point in record["loss_curve"]]
    return model.eval(), {**record, "cached": cached, "path": str(folder)}


def _file_digests(folder: Path) -> dict[str, str]:
    return {path.name: _digest(path.read_bytes()) for path in sorted(folder.iterdir()) if path.name != _RECORD}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
