"""A saved adapter to damage."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from surgery import save_adapter
from tests.support.adapter_files import bare_tensors, configuration
from tests.support.operated_models import operated
from tests.support.swappable_models import with_variant


@functools.cache
def saved(name: str, variant: str | None = None) -> tuple[dict[str, Any], bytes]:
    """The configuration and the tensors of a good adapter."""
    found = operated(name) if variant is None else with_variant(variant, name)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(found.model, folder)
        return configuration(Path(folder)), bare_tensors(Path(folder))
