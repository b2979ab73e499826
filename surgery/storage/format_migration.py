"""Configurations of adapters that older versions of this package wrote, brought to the present format.

======= ==========================================================================================================
1       every adapter stores its factors
2       ``factors`` may be "recompute"; of every site the ``seed`` of its factors, and ``casts``, the fingerprints of
        its base weight in dtypes that hold less
======= ==========================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery.errors import AdapterError

VERSION = 2
Config = dict[str, Any]


def migrate(where: str, config: Config) -> Config:
    """A configuration in the present format.

    Raises:
        AdapterError: it is of a version that is newer, or of none.
    """
    version = config.get("format_version")
    while type(version) is int and version in STEPS:
        config = {**STEPS[version](config), "format_version": version + 1}
        version += 1
    if version != VERSION or isinstance(version, bool):
        hint = "upgrade this package" if isinstance(version, int) and version > VERSION else "save the adapter again"
        raise AdapterError(f"{where} has format version {version!r:.40}, expected 1 to {VERSION}: {hint}")
    return config


def _from_1(config: Config) -> Config:
    if config.get("factors") != "exact" or not isinstance(config.get("sites"), dict):
        return config  # which is refused
    added = {"seed": 0, "casts": {}}
    entries = config["sites"].items()
    return {**config, "sites": {k: {**added, **entry} if isinstance(entry, dict) else entry for k, entry in entries}}


STEPS: dict[int, Callable[[Config], Config]] = {1: _from_1}
