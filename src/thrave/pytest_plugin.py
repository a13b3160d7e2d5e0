"""Fixtures for pytest, which loads this module if Thrave is installed. Imports nothing until a test uses a fixture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from thrave.testing import ThraveServer


@pytest.fixture
def thrave_server(tmp_path: Path) -> Iterator[ThraveServer]:
    """A real Thrave service on a free port with its own data directory; stopped after the test."""
    from thrave.testing import ThraveServer  # noqa: PLC0415 (every pytest run on this machine loads this module)

    with ThraveServer.running(tmp_path / "thrave") as server:
        yield server
