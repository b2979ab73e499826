"""Fixtures of the exporters' tests."""

from __future__ import annotations

import os

import pytest

from tests.support.shared_exports import SharedExports


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SharedExports:
    """Exports that all processes of this run share."""
    folder = tmp_path_factory.getbasetemp()
    return SharedExports((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "exports")
