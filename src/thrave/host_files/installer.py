"""Installs the files of this package on a host, and removes them. Never changes or deletes a file that was edited.

`RECORD` has the SHA-256 of each file as this module wrote it. A file with another digest was edited, or is not ours.
As dpkg does, a newer version of an edited file is written next to it, with the suffix `.new`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from thrave import files

if TYPE_CHECKING:
    from collections.abc import Iterable

_SOURCE = Path(__file__).parent
_UNITS = "etc/systemd/system"
RECORD = "etc/thrave/.host-files.json"
PROGRAM = "/opt/thrave/bin/thrave"
"""The program's path in the units of this package; the installed units have the path of this installation."""
HIDDEN_FROM_UNITS = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 (compared with, not written to)
"""Directories that `ProtectHome` and `PrivateTmp` hide from the services."""

FILES = {
    f"{_UNITS}/thrave.service": "systemd/thrave.service",
    f"{_UNITS}/thrave-agent.service": "systemd/thrave-agent.service",
    f"{_UNITS}/thrave-api.service": "systemd/thrave-api.service",
    "etc/sysusers.d/thrave.conf": "sysusers.d/thrave.conf",
    "etc/tmpfiles.d/thrave.conf": "tmpfiles.d/thrave.conf",
    "etc/thrave/thrave.toml": "thrave.toml",
}
"""Paths on the host, with the files of this package."""

DROP_INS = {
    name: tuple(f"{_UNITS}/{unit}.service.d/{name}.conf" for unit in ("thrave", "thrave-agent"))
    for name in ("overlays", "block-devices")
}
"""Optional files: more permissions for the two units that read disks."""

_SOURCES = FILES | {target: f"systemd/{name}.conf" for name, targets in DROP_INS.items() for target in targets}


class Action(StrEnum):
    """What was done, or with a dry run would be done, with a file."""

    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"
    KEPT = "kept"
    REMOVED = "removed"


@dataclass(frozen=True)
class Change:
    """One file and what was done with it."""

    path: Path
    action: Action


class HostFilesError(Exception):
    """The files cannot be installed; the message says why and what to do."""


def install(
    root: Path, *, program: Path | None = None, drop_ins: Iterable[str] = (), dry_run: bool = False
) -> list[Change]:
    """Install the files below `root`; repeat this after an upgrade of Thrave.

    Args:
        root: `/`, or the root directory of an image that is being built.
        program: The `thrave` that the units start; that of this installation if None.
        drop_ins: Keys of `DROP_INS`. Installed drop-ins are updated even if they are not named.
        dry_run: Write nothing.

    Raises:
        HostFilesError: The program is in a directory that the services cannot see, or a link leads out of `root`.
        OSError: A file cannot be written.
    """
    # Not resolved: the python of a virtual environment is a link out of it.
    found_program = program or Path(sys.executable).absolute().with_name("thrave")
    path_in_units = _check_program(found_program, root)
    record = _read_record(root)
    targets = [
        *FILES,
        *(target for name, many in DROP_INS.items() for target in many if name in {*drop_ins} or target in record),
    ]
    changes = []
    for target in targets:
        content = (_SOURCE / _SOURCES[target]).read_bytes().replace(PROGRAM.encode(), path_in_units.encode())
        changes += (plan := _plan(_below(root, target), content, record.get(target)))
        record[target] = _digest(content)
        if not dry_run and plan[-1].action in {Action.CREATED, Action.UPDATED}:
            _write(plan[-1].path, content)
    if not dry_run:
        _write(_below(root, RECORD), json.dumps(record, indent=2, sort_keys=True).encode())
    return changes


def _plan(path: Path, content: bytes, recorded: str | None) -> list[Change]:
    found, digest = _digest_of(path), _digest(content)
    if found == digest:
        return [Change(path, Action.UNCHANGED)]
    if found is None:
        return [Change(path, Action.CREATED)]
    if found == recorded:
        return [Change(path, Action.UPDATED)]
    kept = Change(path, Action.KEPT)
    if recorded == digest:  # this version was offered before
        return [kept]
    return [kept, Change(path.with_name(f"{path.name}.new"), Action.CREATED)]


def remove(root: Path, *, dry_run: bool = False) -> list[Change]:
    """Remove what `install` has written below `root`, except edited files.

    The data directories, with the database and the keys, and the users are not removed.

    Raises:
        HostFilesError: A link leads out of `root`.
        OSError: A file cannot be removed.
    """
    record = _read_record(root)
    changes = []
    for target, digest in record.items():
        for path in (_below(root, target), _below(root, f"{target}.new")):
            found = _digest_of(path)
            if found is not None:
                changes.append(Change(path, Action.REMOVED if found == digest else Action.KEPT))
    if dry_run:
        return changes
    for change in changes:
        if change.action is Action.REMOVED:
            change.path.unlink()
    _below(root, RECORD).unlink(missing_ok=True)
    folders = {_below(root, target).parent for target in (*(t for many in DROP_INS.values() for t in many), RECORD)}
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return changes


def _check_program(program: Path, root: Path) -> str:
    """Return the path of the program as the units will see it. Raises HostFilesError."""
    if program.is_relative_to(root):
        program = Path("/") / program.relative_to(root)
    hidden = next((folder for folder in HIDDEN_FROM_UNITS if program.is_relative_to(folder)), None)
    if hidden:
        raise HostFilesError(
            f"The units cannot start {program}: their sandbox hides {hidden}. Install Thrave in "
            f"{PurePosixPath(PROGRAM).parent.parent} and run the command there, or pass --program."
        )
    return str(program)


def _below(root: Path, target: str) -> Path:
    """Return the path of a file below `root`; a link in an image must not lead to the files of this host."""
    path = root / target
    if not path.parent.resolve().is_relative_to(root.resolve()):
        raise HostFilesError(f"{path.parent} leads out of {root}. Remove the link.")
    return path


def _read_record(root: Path) -> dict[str, str]:
    path = _below(root, RECORD)
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        record = None
    if not isinstance(record, dict) or not all(isinstance(digest, str) for digest in record.values()):
        raise HostFilesError(f"{path} is damaged. Remove it: files with other contents are then kept as edited ones.")
    # Only known files: `remove` deletes what the record names.
    return {target: digest for target, digest in record.items() if target in _SOURCES}


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def _digest_of(path: Path) -> str | None:
    try:
        return _digest(path.read_bytes())
    except FileNotFoundError:
        return None


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    files.replace(path, content, spool=path.parent, mode=0o644)
