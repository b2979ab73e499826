"""Save a whole model and load it again: a ``transformers`` folder, or the state dict of any module."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file
from torch import nn

from exporters.checkpoint.folder import SINGLE, other_files
from passes.ir.forward_context import quiet, set_mode
from surgery.errors import ExportError
from surgery.support.untrusted_files import read_json

if TYPE_CHECKING:
    import transformers


@runtime_checkable
class Saves(Protocol):
    """A tokenizer or a processor of ``transformers``."""

    def save_pretrained(self, folder: Path, /) -> object:
        """Write its files to a folder."""
        ...


def save_pretrained(
    model: transformers.PreTrainedModel,
    path: Path,
    *,
    max_shard_size: int | str | None,
    tokenizer: Saves | None,
    untie: bool,
) -> None:
    """Save a ``transformers`` model, with the other files of the folder that it was loaded from."""
    given: dict[str, object] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    if untie:  # the configuration then ties nothing: what else shares a tensor must be saved under each name
        given["state_dict"] = unshared(model.state_dict())
    with _no_bars(), quiet("transformers"):
        model.save_pretrained(path, **given)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
    source = Path(model.name_or_path) if model.name_or_path else None
    if tokenizer is None and source is not None and source.is_dir():
        for file in other_files(source):
            if not (path / file.name).exists():
                shutil.copyfile(file, path / file.name)


def load_pretrained(model: transformers.PreTrainedModel, path: Path) -> nn.Module:
    """The model that ``transformers`` makes of the folder, by the class that the configuration names."""
    import transformers

    (name,) = read_json(path / "config.json", finite=False)["architectures"]
    options = {"attn_implementation": model.config._attn_implementation, "local_files_only": True}
    with _no_bars(), quiet("transformers"):
        loaded = getattr(transformers, name, type(model)).from_pretrained(path, use_safetensors=True, **options)
    tied = [getattr(one.config, "tie_word_embeddings", False) for one in (model, loaded)]
    if tied == [False, True]:
        raise ExportError(f"{name} does not take tie_word_embeddings=false, so it cannot be untied")
    return loaded.to(model.device).eval()  # type: ignore[no-any-return]


def unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by name, each with memory of its own, so that whoever loads them finds every name."""
    seen: set[int] = set()
    own = {}
    for name, value in state.items():
        pointer = value.untyped_storage().data_ptr()
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes and pointer not in seen
        own[name] = value.detach() if whole else value.detach().clone(memory_format=torch.contiguous_format)
        seen.add(pointer)
    return own


def load_state(model: nn.Module, path: Path) -> nn.Module:
    """A copy of the module with no value of its own, and the file's values."""
    loaded = copy.deepcopy(model)
    with torch.no_grad():
        for value in loaded.state_dict().values():
            value.zero_()
    loaded.load_state_dict(load_file(path / SINGLE))
    set_mode(loaded, training=False)
    return loaded


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
