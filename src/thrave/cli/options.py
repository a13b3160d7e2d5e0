"""Options and argument types that several commands share; opening the service's data directory for a command.

PEM files are read and checked with the command line: a wrong file is exit code 2, a missing file exit code 3. Commands
with `settings_option` work with the data directory and the database of the settings, whether the service runs or not.
Only `thrave account create` creates a data directory.
"""

from __future__ import annotations

import errno
import functools
import gc
import importlib
import os
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import click

from thrave.cli.exit_codes import Exit
from thrave.cli.folders import FileMissingError, FolderRefusedError
from thrave.cli.output import SIZE_UNITS, TIME_UNITS, print_result, printable_lines
from thrave.concurrency import utc_now

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.x509 import Certificate

    from thrave.components import Components
    from thrave.config import Settings
    from thrave.identity.accounts import Accounts
    from thrave.identity.users import Users


_Key = TypeVar("_Key")
_Parameters = ParamSpec("_Parameters")
_Command = TypeVar("_Command", bound=Callable[..., object])

_MAX_PEM_SIZE = 64 * 1024
_NO_ED25519 = "not an Ed25519 key in PEM form, or one that is encrypted"


class PemFile(click.ParamType["_Key"]):
    """A PEM file.

    Args:
        read: Parses the bytes; raises ValueError or IdentityError with a reason.
        is_certificate: Whether the file holds a certificate; otherwise it holds a key.
    """

    name = "file"

    def __init__(self, read: Callable[[bytes], _Key], *, is_certificate: bool = False) -> None:
        self._read = read
        self._is_certificate = is_certificate

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> _Key:
        """Return what the file contains. Fails if it contains something else."""
        from thrave.identity.errors import IdentityError

        try:
            with Path(str(value)).open("rb") as file:
                pem = file.read(_MAX_PEM_SIZE)
        except FileNotFoundError:
            raise FileMissingError(f"{value} does not exist") from None
        except PermissionError as error:
            raise FolderRefusedError(f"cannot read {value}: {error.strerror}") from error
        except OSError as error:
            self.fail(f"cannot read {value}: {error.strerror}", param, ctx)
        try:
            return self._read(pem)
        except (ValueError, IdentityError) as error:
            self.fail(f"{value}: {self._find_mistake(pem) or error}", param, ctx)

    def _find_mistake(self, pem: bytes) -> str | None:
        """Describe the mistake if the file holds the other half of a key pair."""
        if self._is_certificate and b"PRIVATE KEY-----" in pem:
            return "this is a private key. Pass its certificate."
        if not self._is_certificate and b"-----BEGIN CERTIFICATE-----" in pem:
            return "this is a certificate. Pass its key."
        return None


def _load_certificate(pem: bytes) -> Certificate:
    from thrave.identity.certificates import load_certificate

    return load_certificate(pem)


def _load_private_key(pem: bytes) -> RSAPrivateKey:
    from thrave.identity.certificates import load_private_key

    return load_private_key(pem)


@contextmanager
def _replace_pem_error(text: str) -> Iterator[None]:
    """Replace the errors of the library, and a TypeError of the block, by a ValueError with this text."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        yield
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: the key is encrypted
        raise ValueError(text) from None


def _load_ed25519_private_key(pem: bytes) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    with _replace_pem_error(_NO_ED25519):
        key = load_pem_private_key(pem, password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise TypeError
    return key


def _load_ed25519_public_key(pem: bytes) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    with _replace_pem_error(_NO_ED25519):
        key = load_pem_public_key(pem)
        if not isinstance(key, Ed25519PublicKey):
            raise TypeError
    return key


CERTIFICATE = PemFile(_load_certificate, is_certificate=True)
PRIVATE_KEY = PemFile(_load_private_key)
ED25519_PRIVATE_KEY = PemFile(_load_ed25519_private_key)
ED25519_PUBLIC_KEY = PemFile(_load_ed25519_public_key)


class ExistingPath(click.Path):
    """A local path that must exist: exit code 3 if it does not, 4 if it must be readable and is not."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Return the path."""
        if not os.path.lexists(value):
            raise FileMissingError(f"{os.fspath(value)} does not exist")
        if self.readable and not os.access(value, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(value))
        return super().convert(value, param, ctx)


certificate_option = click.option(
    "--certificate",
    type=CERTIFICATE,
    metavar="SIGNER",
    help="Certificate of the signer (PEM). The signature must match it.",
)
side_key_option = click.option(
    "--side-key", type=ED25519_PUBLIC_KEY, help="Ed25519 public key (PEM) that must have signed the side file."
)


class DataFolder(click.Path):
    """The path of a data directory. An empty path is refused: it would be the working directory."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Return the path. Fails if it is empty or a file."""
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
    "--config",
    type=ExistingPath(dir_okay=False, path_type=Path),
    help="Settings file of the service (TOML).",
)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import large modules in this block; it saves a seventh of the time.

    Garbage collection is off, since modules are not garbage. structlog does not import rich, which it uses for coloured
    tracebacks; the tracebacks of the service are plain.
    """
    gc.disable()
    if "rich" not in sys.modules:
        sys.modules["rich"] = None  # type: ignore[assignment]  # Python then treats the module as not installed
        try:
            importlib.import_module("structlog")
        finally:
            del sys.modules["rich"]
    try:
        yield
    finally:
        gc.enable()


def make_files_private() -> None:
    """Make every new file readable by this user only, until the command has ended."""
    before = os.umask(0o077)
    if context := click.get_current_context(silent=True):
        context.call_on_close(functools.partial(os.umask, before))


def read_settings(config: Path | None, **given: object) -> Settings:
    """Load the settings; `given` comes from the command line. Raises SettingsError if a setting is wrong."""
    from thrave.config import load_settings

    return load_settings(config, **given)


def settings_option(command: Callable[Concatenate[Settings, _Parameters], None]) -> Callable[..., None]:
    """Add `--data-dir` and `--config` to a command; its function receives the settings as first argument."""

    @_DATA_DIR
    @_CONFIG
    @functools.wraps(command)
    def with_settings(
        data_dir: Path | None, config: Path | None, *arguments: _Parameters.args, **options: _Parameters.kwargs
    ) -> None:
        make_files_private()
        command(read_settings(config, data_dir=data_dir), *arguments, **options)

    return with_settings


def require_data_directory(settings: Settings) -> None:
    """Raise click's BadParameter if the data directory of the settings does not exist."""
    directory = settings.directory
    if not (directory.vault_key.exists() or directory.database_file.exists()):
        raise click.BadParameter(
            f"No data directory at {settings.data_dir} (no vault.key there). Create it with `thrave account create`, "
            "or pass another --data-dir.",
            param_hint="--data-dir",
        )


@contextmanager
def open_service(settings: Settings, *, create: bool = False) -> Iterator[Components]:
    """Open the components of a data directory; `create` allows a new one.

    Raises:
        DatabaseUnusableError: The database cannot be used, now or later in the block.
        Others: as `Components.open`.
    """
    if not create:
        require_data_directory(settings)
    with quick_imports():
        from thrave.components import explain_database_errors, open_components

    components = open_components(settings)
    try:
        with explain_database_errors(settings):
            yield components
    finally:
        components.database.dispose()


@contextmanager
def open_accounts(settings: Settings, *, create: bool = False) -> Iterator[Accounts]:
    """Open the accounts of a data directory; `create` allows a new one."""
    with open_identity(settings, create=create) as (accounts, _):
        yield accounts


@contextmanager
def open_identity(settings: Settings, *, create: bool = False) -> Iterator[tuple[Accounts, Users]]:
    """Open the accounts and users of a data directory; `create` allows a new one."""
    from thrave.identity.users import Users

    with open_service(settings, create=create) as components:
        yield components.accounts, Users(components.database)


class NotConfirmedError(click.ClickException):
    """The user has answered a question with no."""

    exit_code = Exit.REFUSED


def yes_option(command: _Command) -> _Command:
    """Add `--yes` to a command that deletes something; its function receives `yes` for `confirm_deletion`."""
    return click.option("--yes", is_flag=True, help="Delete without a question. Needed without a terminal.")(command)


def confirm_deletion(what: str, *, yes: bool) -> None:
    """Ask before something is deleted for good, unless `--yes` was given.

    Raises:
        click.UsageError: The question cannot be asked: stdin is not a terminal.
        NotConfirmedError: The answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"This deletes {what}. Pass --yes to confirm.")
    if not click.confirm(f"Delete {printable_lines(what)}?", err=True):
        raise NotConfirmedError("Nothing was deleted.")


def delete_access_key(settings: Settings, word: str, output: str, *, yes: bool) -> None:
    """Delete an access key of an account or a user, and print its id."""
    from thrave.cli.identifiers import find_key_id

    with open_accounts(settings) as accounts:
        access_key_id = find_key_id(accounts, word)
        if (key := accounts.find_key(access_key_id)) is not None:
            owner = f"user {key.user.user_name} of account" if key.user else "account"
            confirm_deletion(f"the access key {access_key_id} of {owner} {key.account_id}", yes=yes)
        accounts.delete_key(access_key_id)
    print_result(output, {"accessKeyId": access_key_id}, f"deleted {access_key_id}")


class Size(click.ParamType[int]):
    """A number of bytes with an optional unit. K, M, G, T and KiB… are powers of 1024; KB… are powers of 1000."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes. Fails if the value is not a size."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?(?:i?B)?)", str(value))
        if match is None or match[2] not in SIZE_UNITS:
            self.fail(f"{value!r} is not a size. Examples: 256MiB, 10GB, 1048576.", param, ctx)
        return int(float(match[1]) * SIZE_UNITS[match[2]])


def tags_option(command: _Command) -> _Command:
    """Add `--tag` to a command; its function receives `tags`, a dict."""
    return click.option(
        "--tag", "tags", multiple=True, metavar="KEY=VALUE", callback=_read_tags,
        help="Tag, which DescribeInstances shows and filters by. Repeat the option for another key.",
    )(command)  # fmt: skip


def _read_tags(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    from thrave.compute.instance import validate_tags

    tags: dict[str, str] = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals:
            raise click.BadParameter(f"{one!r} is not KEY=VALUE")
        if key in tags:
            raise click.BadParameter(f"the tag {key!r} is given twice")
        tags[key] = value
    try:
        return validate_tags(tags)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


class Since(click.ParamType[datetime]):
    """A point in time: an ISO 8601 date or time (UTC without an offset), or an age such as 2h."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Return the time, timezone-aware. Fails if the value is not a time."""
        text = str(value)
        try:
            return _parse_age(text) or _with_timezone(datetime.fromisoformat(text))
        except (ValueError, OverflowError):
            self.fail(f"Invalid time {text!r}. Examples: 2h, 3d, 2026-11-23T19:00Z.", param, ctx)


def _parse_age(text: str) -> datetime | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text, re.ASCII)
    return match and utc_now() - timedelta(**{TIME_UNITS[match[2]]: float(match[1])})


def _with_timezone(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)
