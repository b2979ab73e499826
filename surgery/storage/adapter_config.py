"""The configuration of an adapter: what is checked in it without a model, and its mirror for people and for PEFT."""

from __future__ import annotations

import json

from passes.errors import SurgeryError
from surgery.errors import AdapterError
from surgery.storage.format_migration import migrate
from surgery.support.untrusted_files import JsonObject
from surgery.variants import resolve_variant

FORMAT = "sspace-adapter"
LIBRARY = "sspace-surgery"
STORED = ("exact", "recompute")
PEFT_TYPE = "S-space adapter: load it with load_adapter(model, folder) of the package sspace-surgery, not with PEFT"
"""PEFT looks this up among its own types; its error quotes the text, and transformers passes the error on."""


def checked(where: str, content: object) -> JsonObject:
    """Check the content of a configuration, and bring it to the present format.

    Args:
        where: what to call the file in errors.

    Raises:
        AdapterError: it is damaged, or of another format.
    """
    if isinstance(content, dict) and "peft_type" in content and content.get("format") != FORMAT:
        raise AdapterError(f"{where} is a PEFT adapter; load it with peft. load_adapter reads its own format only")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise AdapterError(f"{where} is no {FORMAT} configuration")
    config = migrate(where, content)
    kinds = {"variant": str, "hyperparameters": dict, "sites": dict, "sha256": str}
    for name, kind in kinds.items():
        if not isinstance(config.get(name), kind):
            raise AdapterError(f"{where}: {name!r} must be a {kind.__name__}, found {config.get(name)!r:.80}")
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise AdapterError(f"{where}: 'base_model_name_or_path' must be a str or null")
    if not config["sites"]:
        raise AdapterError(f"{where} names no site")
    if config.get("factors") not in STORED:
        raise AdapterError(f"{where}: factors must be 'exact' or 'recompute', found {config.get('factors')!r:.80}")
    try:
        resolve_variant(config["variant"])
    except SurgeryError as error:
        raise AdapterError(f"cannot load the adapter: {error}") from error
    for key, entry in config["sites"].items():
        _check_key(f"{where}: site {key!r}", key, entry)
    return config


def _check_key(where: str, key: str, entry: JsonObject) -> None:
    """Check that a site is named after its weight, as every site is."""
    weight = entry.get("weight") if isinstance(entry, dict) else None
    if isinstance(weight, str):
        owner = weight.removesuffix(".weight")
        named = (f"{owner}.{part}" for part in "qkv") if entry.get("rows") is not None else (owner,)
        if key not in named:
            raise AdapterError(f"{where} has the weight {weight!r}, which is of site {owner!r}")


def mirror(config: JsonObject) -> bytes:
    """The content of ``adapter_config.json``: the configuration, with the fields that PEFT and the Hub look for."""
    fields = {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": config["base_model_name_or_path"] or PEFT_TYPE,  # transformers quotes this one
        "library_name": LIBRARY,
    }
    return json.dumps({**fields, **config, **fields}, indent=1).encode() + b"\n"
