"""Debian's libnbd binding, found also from a virtual environment, with types for the little that is used of it.

libnbd is on no Python package index; Debian's python3-libnbd puts it where only the system's Python looks. It is loaded
from there by its full path: that folder holds much else and is never put on ``sys.path``.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Protocol, cast

from thrave.volumes.errors import ComponentMissingError

_DEBIAN_MODULES = "/usr/lib/python3/dist-packages"
_PACKAGE = "python3-libnbd"

ExtentCallback = Callable[[str, int, list[int], object], object]
"""Called with context, offset in bytes, [length, flags, length, flags, …], error."""


class Handle(Protocol):
    """What is used of ``nbd.NBD``, libnbd(3). One handle may be used from several threads; it works one at a time."""

    def add_meta_context(self, name: str) -> None:
        """Ask for a metadata context, before connecting."""

    def aio_connect_socket(self, sock: int) -> None:
        """Begin the handshake on a connected socket; the descriptor is closed with this handle."""

    def aio_is_ready(self) -> bool:
        """Whether the handshake is done."""

    def poll(self, timeout: int) -> int:
        """Move the handshake on; 0 if nothing happened for `timeout` milliseconds."""

    def get_size(self) -> int:
        """Size of the export, in bytes."""

    def block_status(self, count: int, offset: int, extent: ExtentCallback) -> None:
        """Report runs from `offset` on, of about `count` bytes, possibly less."""

    def pread(self, count: int, offset: int) -> bytearray:
        """Read all or nothing."""

    def pwrite(self, buf: memoryview, offset: int) -> None:
        """Write all or nothing."""

    def flush(self) -> None:
        """Have the server put what was written on the disk."""

    def shutdown(self) -> None:
        """Say good-bye to the server."""


class Binding(Protocol):
    """The module ``nbd``."""

    @property
    def NBD(self) -> Callable[[], Handle]:  # noqa: N802 (libnbd's name)
        """Makes a handle."""

    @property
    def Error(self) -> type[Exception]:  # noqa: N802 (libnbd's name)
        """What every call raises."""


def load() -> Binding:
    """The binding, wherever it is installed.

    Raises:
        ComponentMissingError: It is not, or it was built for another Python.
    """
    try:
        return cast("Binding", import_module("nbd"))
    except ImportError:
        _load_from_debian("libnbdmod")
        return cast("Binding", _load_from_debian("nbd"))


def _load_from_debian(name: str) -> ModuleType:
    spec = PathFinder.find_spec(name, [_DEBIAN_MODULES])
    if spec is None or spec.loader is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ComponentMissingError(f"libnbd for Python {version}", _PACKAGE)
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
