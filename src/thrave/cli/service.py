"""What the commands beside the service share: its settings, and the ground that it stands on.

They work where the data directory is, and on the database that the settings name, whether the service runs or not.
None of them begins a data directory but `thrave account create`.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thrave.components import Components
    from thrave.config import Settings

_Rest = ParamSpec("_Rest")


class DataFolder(click.Path):
    """The path of a data directory; an empty one would be the working directory."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Give the path. Fails the command line if it is empty or a file."""
        if value == "":
            self.fail("must not be empty", param, ctx)
        return super().convert(value, param, ctx)


_DATA_DIR = click.option(
    "-d",
    "--data-dir",
    type=DataFolder(),
    metavar="DIR",
    help="Database, keys, instances and buckets.  [env var: THRAVE_DATA_DIR; default: thrave-data]",
)
_CONFIG = click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The service's settings, as TOML."
)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import large modules in a block of this: a seventh of the time is saved by what they need not do.

    Modules are no garbage, so nobody looks for any meanwhile. And structlog does without rich, which it would import
    for tracebacks in colour; those of the service are plain.
    """
    gc.disable()
    if "rich" not in sys.modules:
        sys.modules["rich"] = None  # type: ignore[assignment]  # what Python takes for a module that is not installed
        try:
            import structlog  # noqa: F401 (see above)
        finally:
            del sys.modules["rich"]
    try:
        yield
    finally:
        gc.enable()


def make_files_private() -> None:
    """Have every file that this command makes be its user's alone; undone when the command has ended."""
    before = os.umask(0o077)
    if context := click.get_current_context(silent=True):
        context.call_on_close(functools.partial(os.umask, before))


def read_settings(config: Path | None, **given: object) -> Settings:
    """The settings; `given` is what the command line says. Raises click's UsageError if one of them is wrong."""
    from thrave.config import SettingsError, load_settings

    try:
        return load_settings(config, **given)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None


def settings_option(command: Callable[Concatenate[Settings, _Rest], None]) -> Callable[..., None]:
    """Give a command `--data-dir DIR` and `--config FILE`; its function receives the settings as its first argument."""

    @_DATA_DIR
    @_CONFIG
    @functools.wraps(command)
    def with_settings(data_dir: Path | None, config: Path | None, *rest: _Rest.args, **named: _Rest.kwargs) -> None:
        make_files_private()
        command(read_settings(config, data_dir=data_dir), *rest, **named)

    return with_settings


def require_data_directory(settings: Settings) -> None:
    """Raise click's BadParameter if nobody has begun the data directory that the settings name."""
    directory = settings.directory
    if not (directory.vault_key.exists() or directory.database_file.exists()):
        raise click.BadParameter(
            f"No data directory at {settings.data_dir} (no vault.key there). Create it with `thrave account create`, "
            "or pass another --data-dir.",
            param_hint="--data-dir",
        )


@contextmanager
def open_service(settings: Settings, *, make: bool = False) -> Iterator[Components]:
    """The service in a data directory, which is made only if the command may begin one.

    Raises:
        DatabaseUnusableError: The database cannot be used, now or while the command works with it.
        Others: as `Components.open`.
    """
    if not make:
        require_data_directory(settings)
    with quick_imports():
        from thrave.components import explained, open_components

    ground = open_components(settings)
    try:
        with explained(settings):
            yield ground
    finally:
        ground.database.dispose()
