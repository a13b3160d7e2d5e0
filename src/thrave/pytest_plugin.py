"""pytest's fixtures; found by pytest itself where Thrave is installed. It imports nothing until a test asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from thrave.testing import ThraveServer


@pytest.fixture
def thrave_server(tmp_path: Path) -> Iterator[ThraveServer]:
    """A real Thrave on a free port, with a data directory of its own; stopped after the test."""
    from thrave.testing import ThraveServer  # noqa: PLC0415 (every pytest run on this machine loads this module)

    with ThraveServer.running(tmp_path / "thrave") as server:
        yield server
