"""A small language model over bytes, trained once on text that every machine has and then kept in a cache."""

import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import corpus

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

DEFAULT_STEPS = 1250
MODEL = {
    "vocab_size": 256,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "float32",
}
TRAINING = {"batch": 8, "length": 128, "learning_rate": 3e-3, "weight_decay": 0.01, "clip": 1.0}
_RECORD = "training.json"
_CURVE_EVERY = 10


def default_cache_dir() -> Path:
    """Return where trained models are kept: ``sspace-surgery`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sspace-surgery"


def base_model(
    cache_dir: str | Path, *, seed: int = 0, steps: int = DEFAULT_STEPS, progress: bool = True
) -> tuple["Qwen3ForCausalLM", dict[str, Any]]:
    """Return the trained model, in eval mode, and the record of its training.

    The first call trains for about two minutes on two cores; later ones load the result. The folder's name holds
    a key of everything that determines the result, and the record a digest of every file, so a changed setting
    trains anew and a damaged folder is discarded with a warning.

    Args:
        cache_dir: folder that keeps trained models, made if absent; see ``default_cache_dir``.
        seed: seed of the initial weights and of the order of the text.
        steps: number of training steps.
        progress: whether to show a progress bar on stderr while training.

    Returns:
        The model, and its record: ``key``, ``settings``, ``loss_curve`` as (step, loss) pairs, ``seconds``,
        ``python``, ``torch`` and ``files``, with ``cached`` and ``path`` added.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    source = corpus.python_source()
    settings = {"model": MODEL, "training": TRAINING, "seed": seed, "steps": steps, "corpus": _digest(source)}
    key = _digest(json.dumps(settings, sort_keys=True).encode())[:16]
    folder = Path(cache_dir) / f"qwen3-bytes-{key}"
    if cached := folder.exists():
        try:
            return _load(folder, key, cached)
        except (OSError, ValueError) as error:
            warnings.warn(f"discarding the damaged model in {folder} and training anew: {error}", stacklevel=2)
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
