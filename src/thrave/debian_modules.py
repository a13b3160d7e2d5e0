"""Imports Python modules of Debian packages, also in a virtual environment.

The bindings of libvirt and libnbd must match the installed libraries, so no package index has them in binary form.
Debian installs them in a folder that contains many other packages. Therefore the folder is not added to ``sys.path``:
the modules are loaded from there by their full path.
"""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType

from thrave.concurrency import new_lock

FOLDER = "/usr/lib/python3/dist-packages"
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"

_loading = new_lock()


class DebianModuleNotFoundError(Exception):
    """A module is not installed, or was built for another version of Python."""


def import_debian_module(name: str, extension: str) -> ModuleType:
    """Import a module from ``sys.path``, or else from Debian's folder.

    Args:
        name: The module.
        extension: The extension module that it imports.

    Raises:
        DebianModuleNotFoundError: One of the two is missing.
    """
    with _loading:  # otherwise another thread could import a module that has not been executed yet
        try:
            return import_module(name)
        except ImportError:
            _load(extension)
            return _load(name)


def _load(name: str) -> ModuleType:
    spec = PathFinder.find_spec(name, [FOLDER])
    if spec is None or spec.loader is None:
        raise DebianModuleNotFoundError(name)
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
