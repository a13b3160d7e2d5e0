"""`thrave host-files`: installs and removes the files that a Debian host needs to run the service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from thrave.cli.options import ExistingPath
from thrave.cli.output import output_option, print_result, table

if TYPE_CHECKING:
    from thrave.host_files.installer import Change

_ACTIVATE = "systemd-sysusers thrave.conf && systemd-tmpfiles --create thrave.conf && systemctl daemon-reload"
_DROP_INS = ("overlays", "block-devices")

_root = click.option(
    "--root", type=ExistingPath(file_okay=False, path_type=Path), default="/", show_default=True,
    metavar="DIR", help="Root directory of the host, or of an image that is being built.",
)  # fmt: skip
_dry_run = click.option("--dry-run", is_flag=True, help="Show what would be done, and change nothing.")


@click.group("host-files", short_help="Install systemd units and first settings on a host.")
def host_files() -> None:
    """Install systemd units, users, directories and first settings on a host, or remove them.

    \b
    Example:
      thrave host-files install --dry-run
    """


@host_files.command()
@_root
@click.option(
    "--program", type=click.Path(path_type=Path), metavar="PATH",
    help="The `thrave` that the units start.  [default: this installation's]",
)  # fmt: skip
@click.option(
    "--drop-in", "drop_ins", multiple=True, type=click.Choice(_DROP_INS),
    help="More permissions for the units: `overlays` for capture_mode = overlay, `block-devices` for guests on LVM or "
    "whole disks. Can be repeated.",
)  # fmt: skip
@_dry_run
@output_option
def install(root: Path, program: Path | None, drop_ins: tuple[str, ...], output: str, *, dry_run: bool) -> None:
    """Install the files, or update them after an upgrade of Thrave.

    Writes below /etc/systemd/system, /etc/sysusers.d, /etc/tmpfiles.d and /etc/thrave, as root. A file that was edited
    is not changed; a newer version of it is written next to it, as FILE.new. No program is started: the last line has
    the command that creates the users and directories and loads the units.

    \b
    Example:
      thrave host-files install --drop-in overlays

    Exit codes: 0 installed, 1 a file cannot be written, 4 the units cannot start this program.
    """
    from thrave.host_files import installer

    changes = installer.install(root.absolute(), program=program, drop_ins=drop_ins, dry_run=dry_run)
    text = f"{_table(changes)}\n\nNext: {_ACTIVATE}"
    print_result(output, {**_document(changes), "next": _ACTIVATE}, text)


@host_files.command()
@_root
@_dry_run
@output_option
def remove(root: Path, output: str, *, dry_run: bool) -> None:
    """Remove the installed files, except those that were edited.

    Stop the service first: `systemctl disable --now thrave`. The data directories, with the database and the keys, and
    the users are not removed.

    \b
    Example:
      thrave host-files remove --dry-run

    Exit codes: 0 removed, 1 a file cannot be removed.
    """
    from thrave.host_files import installer

    changes = installer.remove(root.absolute(), dry_run=dry_run)
    print_result(output, _document(changes), _table(changes))


def _document(changes: list[Change]) -> dict[str, object]:
    return {"files": [{"path": str(change.path), "action": change.action} for change in changes]}


def _table(changes: list[Change]) -> str:
    return table(("ACTION", "FILE"), [(change.action.value, str(change.path)) for change in changes])
