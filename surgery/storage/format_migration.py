"""Bring the configurations of adapters that older versions of this package wrote to the present format.

======= ==========================================================================================================
1       every adapter stores its factors
2       ``factors`` may be "recompute"; each site has the ``seed`` of its factors, and ``casts``, the fingerprints of
        its base weight in dtypes that hold less
3       the configuration is in the header of the tensor file; ``sha256``, the digest of that file, takes the place of
        ``tensors_sha256``; ``base_model_name_or_path`` names the base model, or is null
======= ==========================================================================================================

A migrated adapter is written in the present format when it is saved.
"""

from __future__ import annotations

from collections.abc import Callable

from surgery.errors import AdapterError
from surgery.support.untrusted_files import JsonObject

VERSION = 3
SEPARATE = (1, 2)  # versions whose configuration is a file beside the tensors


def migrate(where: str, config: JsonObject) -> JsonObject:
    """A configuration in the present format.

    Raises:
        AdapterError: its version is newer than this package, or no version at all.
    """
    version = config.get("format_version")
    while type(version) is int and version in STEPS:
        config = {**STEPS[version](config), "format_version": version + 1}
        version += 1
    if version != VERSION or isinstance(version, bool):
        hint = "upgrade this package" if isinstance(version, int) and version > VERSION else "save the adapter again"
        raise AdapterError(f"{where} has format version {version!r:.40}, expected 1 to {VERSION}: {hint}")
    return config


def _from_1(config: JsonObject) -> JsonObject:
    if config.get("factors") != "exact" or not isinstance(config.get("sites"), dict):
        return config  # the reader refuses it
    added = {"seed": 0, "casts": {}}
    entries = config["sites"].items()
    return {**config, "sites": {k: {**added, **entry} if isinstance(entry, dict) else entry for k, entry in entries}}


def _from_2(config: JsonObject) -> JsonObject:
    return {**config, "sha256": config.get("tensors_sha256"), "base_model_name_or_path": None}


STEPS: dict[int, Callable[[JsonObject], JsonObject]] = {1: _from_1, 2: _from_2}
