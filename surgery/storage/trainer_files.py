"""What stands beside an adapter for ``transformers``: a checkpoint for its Trainer, and a configuration that refuses.

``model.safetensors`` has every tensor that was trained, under its name in the operated model, as a Trainer opens it by
that name to resume. ``config.json`` is there because without one, or with the base's own, ``from_pretrained`` would
build a random model around these few tensors. Its values are refused by every class; a Trainer reads the version alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from passes.capture.capture import is_pretrained
from surgery.hosting.beside_cores import beside_cores
from surgery.hosting.state import adapters_of
from surgery.storage.adapter_config import PEFT_TYPE
from surgery.storage.saved_values import SavedValues
from surgery.support.atomic_directory import Content
from surgery.support.untrusted_files import JsonObject, parse_json, read_json

CHECKPOINT, HUB_CONFIG = "model.safetensors", "config.json"
MODEL_TYPE = "sspace_adapter"
REFUSING = ("attn_implementation", "experts_implementation", "num_hidden_layers")
"""Each is checked by ``transformers`` before a model is built; its error quotes the value."""


def trained_names(model: nn.Module) -> list[str]:
    """Names in the operated model of all that was trained: the cores, and what stands beside them; a tied one once."""
    cores = {id(p) for site in adapters_of(model).values() for p in site.core.parameters()}
    trained = cores | {id(tensor) for tensor in beside_cores(model).values()}
    return [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if id(tensor) in trained]


def checkpoint_file(model: nn.Module, values: SavedValues) -> Content:
    """The content of ``model.safetensors``."""
    own = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    tensors = {name: values.of(own[name]).detach().cpu().contiguous() for name in trained_names(model)}
    return [to_safetensors({name: _owned(tensor) for name, tensor in tensors.items()}, {"format": "pt"})]


def refusing_config() -> Content:
    """The content of ``config.json``."""
    return [json.dumps({"model_type": MODEL_TYPE, **dict.fromkeys(REFUSING, PEFT_TYPE)}, indent=1).encode() + b"\n"]


def is_refusing(folder: Path) -> bool:
    """Whether the configuration in a folder is one that :func:`refusing_config` gave."""
    try:
        config = read_json(folder / HUB_CONFIG, finite=False)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def base_configuration(model: nn.Module) -> JsonObject:
    """The configuration of a ``transformers`` model as its own ``config.json`` would have it, without paths."""
    assert is_pretrained(model)
    config = _without_paths(parse_json(model.config.to_json_string()))
    name = type(model).__name__.removeprefix("FSDP")
    return {**config, "architectures": [name], "dtype": str(model.dtype).removeprefix("torch.")}


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items() if not key.endswith("name_or_path")}
    return [_without_paths(inner) for inner in value] if isinstance(value, list) else value
