"""``save_pretrained`` of an operated ``transformers`` model: what is saved loads as what was in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import nn

from passes.capture.capture import is_pretrained
from surgery.errors import AdapterError
from surgery.hosting.beside_cores import base_parameters
from surgery.hosting.root_mixins import RootMixin, root_mixin
from surgery.hosting.state import adapters_of, record_of, state_of
from surgery.storage.adapter_writer import adapter_content
from surgery.storage.hub import push_adapter
from surgery.storage.saved_values import SavedValues
from surgery.storage.trainer_files import (
    CHECKPOINT,
    HUB_CONFIG,
    base_configuration,
    checkpoint_file,
    refusing_config,
    trained_names,
)
from surgery.support.distributed import by_first_process, is_sharded
from surgery.support.untrusted_files import JsonObject, path_of
from surgery.verbs.save_load import coefficient_entry, say_coefficient, write_adapter

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
ACCEPTED: dict[str, tuple[object, ...]] = {  # arguments of transformers that change nothing here, and with which values
    "variant": (None,),
    "save_peft_format": (True,),
    "save_original_format": (True, False),  # files have the names of the model in memory
    "distributed_checkpoint": (False,),
    "safe_serialization": (True,),
}
OF_PUSH = {"repo_id": "repo_id", "commit_message": "message", "private": "private", "revision": "revision"}


@root_mixin
class SavesAdapter(RootMixin):
    """Mixin of a root that is a ``transformers`` model."""

    @staticmethod
    def suits(model: nn.Module) -> bool:
        """A ``PreTrainedModel``."""
        return is_pretrained(model)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: JsonObject | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        **kwargs: object,
    ) -> object:
        """Write the adapter to a folder, and beside it what a Trainer needs to resume from it.

        ``load_adapter`` puts the folder on the base model; ``from_pretrained`` refuses it. Without an adapter on the
        model this is the method of ``transformers``.

        Args:
            save_directory: a new folder, or one whose adapter is replaced.
            is_main_process: whether this process writes; of a model in shards, the first one does.
            state_dict: of the operated model, to take the values of cores and trained parameters from.
            push_to_hub: send the adapter to the Hub after that: ``repo_id``, ``commit_message``, ``private``,
                ``revision`` and ``token`` say how.
            max_shard_size: a larger file is refused, since an adapter is one file.
            kwargs: other arguments of ``transformers``, which have to be at their defaults.

        Raises:
            AdapterError: an argument has no meaning for an adapter; the folder is that of the base model, or cannot be
                written; the state dict lacks a tensor.
        """
        model = self
        assert isinstance(model, nn.Module)
        if state_of(model) is None or not adapters_of(model):
            kwargs |= {"state_dict": state_dict, "push_to_hub": push_to_hub, "max_shard_size": max_shard_size}
            return super().save_pretrained(save_directory, is_main_process, **kwargs)  # type: ignore[misc]
        path, push = path_of(save_directory, AdapterError), _check_arguments(kwargs, push_to_hub=push_to_hub)
        sharded = state_dict is None and any(map(is_sharded, model.parameters()))
        if is_main_process or sharded:
            _save(model, path, state_dict, _bytes_of(max_shard_size))
            if push_to_hub and is_main_process:
                push_adapter(path, push.pop("repo_id", path.name), **push)
        return None

    def load_state_dict(self, state_dict: Mapping[str, object], *args: object, **kwargs: object) -> object:
        """The model's own ``load_state_dict``; of a checkpoint of what was trained, the base is not missing."""
        model = self
        assert isinstance(model, nn.Module)
        result = super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        if state_of(model) is not None:
            _note_checkpoint(model, state_dict, result)
        return result


class LoadResult(Protocol):
    """What ``load_state_dict`` gives."""

    missing_keys: list[str]


def _save(model: nn.Module, path: Path, state_dict: JsonObject | None, limit: float) -> None:
    if _is_base_folder(model, path):
        raise AdapterError(
            f"{str(path)!r} is the folder of the base model, which the adapter needs: save to another one, or merge "
            "first and then save the whole model"
        )
    values = SavedValues(model, state_dict)
    optional = {**coefficient_entry(model), "base_config": base_configuration(model)}
    content = adapter_content(model, values, optional)
    more = {CHECKPOINT: checkpoint_file(model, values), HUB_CONFIG: refusing_config()}
    for name, parts in (content.files | more).items():
        if (size := sum(len(part) for part in parts)) > limit:
            raise AdapterError(
                f"{name} would have {size:,} bytes, and max_shard_size allows {limit:,.0f}: it is one file"
            )
    whose = model.parameters() if state_dict is None else ()
    by_first_process(whose, lambda: write_adapter(path, content, more))
    say_coefficient(optional, f"saved to {str(path)!r}")


def _check_arguments(kwargs: JsonObject, *, push_to_hub: bool) -> JsonObject:
    """Refuse arguments that mean nothing for an adapter; gives those of a push."""
    push = {name: kwargs.pop(given) for given, name in OF_PUSH.items() if given in kwargs}
    push |= {"token": token} if (token := kwargs.pop("token", None)) is not None else {}
    push = {name: value for name, value in push.items() if value is not None}
    if push and not push_to_hub and set(push) != {"token"}:
        raise AdapterError(f"{next(iter(push))!r} says how to push: it needs push_to_hub=True")
    for name, value in kwargs.items():
        if name not in ACCEPTED:
            raise AdapterError(f"save_pretrained of an operated model knows no argument {name!r}")
        if value not in ACCEPTED[name]:
            raise AdapterError(
                f"{name}={value!r:.80} has no meaning for an adapter, which is one safetensors file: leave it out, or "
                "merge the model first"
            )
    return push


def _bytes_of(size: int | str) -> float:
    """A size as ``transformers`` writes it, "5GB", in bytes."""
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]?I?)B?", str(size).strip().upper())
    if isinstance(size, bool) or found is None or found[2] not in UNITS:
        raise AdapterError(f"max_shard_size must be a number of bytes, or a text such as '5GB', found {size!r:.80}")
    return float(found[1]) * UNITS[found[2]]


def _is_base_folder(model: nn.Module, path: Path) -> bool:
    assert is_pretrained(model)
    source = model.config.name_or_path
    return bool(source) and Path(source).is_dir() and Path(source).resolve() == path.resolve()


def _note_checkpoint(model: nn.Module, given: Mapping[str, object], result: LoadResult) -> None:
    """Of a checkpoint that ``save_pretrained`` wrote, take the frozen base off the missing keys.

    What it has of parameters that are frozen here was trained nevertheless, and is saved again.
    """
    adapters = adapters_of(model)
    names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    cores = {names[id(p)] for site in adapters.values() for p in site.core.parameters()}
    factors = {names[id(b)] for site in adapters.values() for b in site.factors.buffers()}
    if not cores or not cores <= given.keys() or factors & given.keys():
        return  # a whole state dict, or one of something else
    trained = set(trained_names(model))
    result.missing_keys[:] = [name for name in result.missing_keys if name in trained]
    in_file = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in given}
    frozen = {n for n, p in base_parameters(model).items() if id(p) in in_file and not p.requires_grad}
    record_of(model).brought_in_place |= frozen
