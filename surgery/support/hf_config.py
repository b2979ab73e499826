"""Read the configurations of untrusted ``transformers`` models without running code that comes with them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, TypeVar

from passes.errors import InputError
from passes.ir.forward_context import quiet
from surgery.support.untrusted_files import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")

COUNTS = re.compile(r"(layers?|depths?|blocks|stages|experts)$|^(n|num)_layer")  # each is a module, or a list of them
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
CACHED = re.compile(r"(?:^|[/\\])models--([\w.-]+)[/\\]snapshots[/\\]")
MOST, MOST_LABELS = 2**12, 2**20


def hub_config(source: str) -> PretrainedConfig:
    """The configuration in a folder or of a hub id, of an architecture that ``transformers`` itself has.

    Raises:
        InputError: there is none, it is damaged, needs code of its own, or would build more modules than any model has.
    """
    import transformers

    check_source(source)
    try:
        file = Path(source) / "config.json"
        content = read_json(file, finite=False) if file.is_file() else None
        if content is None:
            with quiet("huggingface_hub"):  # it tells of each attempt
                content, _ = transformers.PretrainedConfig.get_config_dict(source)
        for name, value in _numbers(content):
            if value > (MOST_LABELS if name == "num_labels" else MOST if COUNTS.search(name) else 2**63):
                raise ValueError(f"{name} is {value:,}")
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers validates in many ways
        known = "its config.json gives none" if os.path.isdir(source) else "there is no such folder, and on the Hub"
        raise InputError(f"cannot find a model named {source!r}: {known}: {first_line(error)}") from error


def check_source(source: str) -> None:
    """Refuse what names neither a folder with a model nor a model on the Hub, before anything is looked up.

    Raises:
        InputError: says which of the two it is not.
    """
    why, there, is_folder = "", os.path.exists(source), os.path.isdir(source)
    if is_folder and not os.path.exists(os.path.join(source, "config.json")):
        what = "an adapter, and no model" if os.path.exists(os.path.join(source, "adapter_config.json")) else "no model"
        why = f"the folder holds {what}; expected one with a config.json"
    elif there and not is_folder:
        why = "it is a file; expected a folder with a config.json, or a hub id"
    elif not there and not HUB_ID.fullmatch(source):
        why = "there is no such folder, and no model on the Hub can have that name"
    if why:
        raise InputError(f"cannot find a model named {source!r}: {why}")


def on_hub(path: Path) -> bool:
    """Whether a path that is not there reads as owner/name."""
    return "/" in str(path) and HUB_ID.fullmatch(str(path)) is not None


def model_class(config: PretrainedConfig, default: T) -> type[PreTrainedModel] | T:
    """The class that a configuration names, if it is a model's, or the default."""
    import transformers

    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    named = getattr(transformers, name, None)
    return named if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel) else default


def base_model_name(model: object) -> str | None:
    """What a base model is called in files: its hub id, or the last name of the folder it came from, never a path.

    None for a model that does not say where it came from.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not name.strip():
        return None
    if cached := CACHED.search(name):  # a snapshot in the Hub's cache
        return cached[1].replace("--", "/", 1)
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        return name
    last = PureWindowsPath(name).name  # which knows both kinds of separators
    return (last if last.strip(".") else Path(name).resolve().name) or None


def first_line(error: BaseException) -> str:
    """What an error of another library says, in short."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, int]]:
    """All integers of a JSON value, each with the last key above it."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield name, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else ((name, v) for v in value):
            yield from _numbers(inner, str(key))
