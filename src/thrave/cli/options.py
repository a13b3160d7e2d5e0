"""Certificates and keys as options of a command: PEM files, read and checked while the command line is.

A file that holds something else is a wrong command line (exit code 2), a missing one exit code 3; both are reported
before anything is begun. No key is ever shown.

What the command lines of the bundle commands share: files that must exist, and whose signature is trusted.

What the commands beside the service share: its settings, and the ground that it stands on.

They work where the data directory is, and on the database that the settings name, whether the service runs or not.
None of them begins a data directory but `thrave account create`.

`--tag KEY=VALUE`: what an operator puts on an instance. EC2's limits are checked before anything is done.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import click

from thrave.cli.folders import FileMissingError
from thrave.cli.output import SIZE_UNITS, TIME_UNITS

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


_LARGEST = 64 * 1024


_NO_ED25519 = "not an Ed25519 key in PEM form, or one that is encrypted"


class PemFile(click.ParamType["_Key"]):
    """A PEM file.

    Args:
        read: makes of its bytes what the command wants; raises ValueError, or an error of ours, with a reason.
        is_certificate: Whether that is a certificate; otherwise it is a key.
    """

    name = "file"

    def __init__(self, read: Callable[[bytes], _Key], *, is_certificate: bool = False) -> None:
        self._read = read
        self._is_certificate = is_certificate

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> _Key:
        """Give what the file holds. Fails the command line if it holds something else."""
        from thrave.identity.errors import IdentityError

        try:
            with Path(str(value)).open("rb") as file:
                pem = file.read(_LARGEST)
        except FileNotFoundError:
            raise FileMissingError(f"{value} does not exist") from None
        except OSError as error:
            self.fail(f"cannot read {value}: {error.strerror}", param, ctx)
        try:
            return self._read(pem)
        except (ValueError, IdentityError) as error:
            self.fail(f"{value}: {self._mistaken(pem) or error}", param, ctx)

    def _mistaken(self, pem: bytes) -> str | None:
        """What the file holds instead, if that is the other half of a pair."""
        if self._is_certificate and b"PRIVATE KEY-----" in pem:
            return "this is a private key; give its certificate"
        if not self._is_certificate and b"-----BEGIN CERTIFICATE-----" in pem:
            return "this is a certificate; give its key"
        return None


def _certificate(pem: bytes) -> Certificate:
    from thrave.identity.certificates import load_certificate

    return load_certificate(pem)


def _private_key(pem: bytes) -> RSAPrivateKey:
    from thrave.identity.certificates import load_private_key

    return load_private_key(pem)


@contextmanager
def _words_of_ours(text: str) -> Iterator[None]:
    """Say the text in place of what the library says of PEM that it cannot read."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        yield
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: the key is encrypted
        raise ValueError(text) from None


def _ed25519_private_key(pem: bytes) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    with _words_of_ours(_NO_ED25519):
        key = load_pem_private_key(pem, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(_NO_ED25519)  # noqa: TRY004 (the file's content is wrong)
    return key


def _ed25519_public_key(pem: bytes) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    with _words_of_ours(_NO_ED25519):
        key = load_pem_public_key(pem)
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(_NO_ED25519)  # noqa: TRY004 (as above)
    return key


CERTIFICATE = PemFile(_certificate, is_certificate=True)


PRIVATE_KEY = PemFile(_private_key)


ED25519_PRIVATE_KEY = PemFile(_ed25519_private_key)


ED25519_PUBLIC_KEY = PemFile(_ed25519_public_key)


class ExistingPath(click.Path):
    """A path of the disk that must exist; exit code 3 if it does not."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Return the path."""
        if not os.path.lexists(value):
            raise FileMissingError(f"{os.fspath(value)} does not exist")
        return super().convert(value, param, ctx)


certificate_option = click.option(
    "--certificate",
    type=CERTIFICATE,
    metavar="SIGNER",
    help="Signer's certificate (PEM); the signature must hold for it.",
)


side_key_option = click.option(
    "--side-key", type=ED25519_PUBLIC_KEY, help="Ed25519 public key (PEM) that must have signed the side file."
)


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


@contextmanager
def open_accounts(settings: Settings, *, make: bool = False) -> Iterator[Accounts]:
    """The accounts of a data directory, which is made only if the command may begin one."""
    with open_identity(settings, make=make) as (accounts, _):
        yield accounts


@contextmanager
def open_identity(settings: Settings, *, make: bool = False) -> Iterator[tuple[Accounts, Users]]:
    """The accounts and users of a data directory, which is made only if the command may begin one."""
    from thrave.identity.users import Users

    with open_service(settings, make=make) as ground:
        yield ground.accounts, Users(ground.database)


class Size(click.ParamType[int]):
    """A number of bytes with an optional unit; K, M, G, T and KiB… are powers of 1024, KB… of 1000."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Give the bytes. Fails the command line if it is not a size."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?(?:i?B)?)", str(value))
        if match is None or match[2] not in SIZE_UNITS:
            self.fail(f"{value!r} is not a size; write 256MiB, 10GB or a number of bytes", param, ctx)
        return int(float(match[1]) * SIZE_UNITS[match[2]])


_Command = TypeVar("_Command", bound=Callable[..., object])


def tags_option(command: _Command) -> _Command:
    """Give a command `--tag`; its function receives `tags`, a dict."""
    return click.option(
        "--tag", "tags", multiple=True, metavar="KEY=VALUE", callback=_read,
        help="A tag, as DescribeInstances shows it and filters by it; may be given again for another key.",
    )(command)  # fmt: skip


def _read(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
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
    """A point in time: an ISO 8601 date or time (UTC, unless it says otherwise), or how long ago it was."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Give the time, aware. Fails the command line if it is none."""
        text = str(value)
        try:
            return _ago(text) or _aware(datetime.fromisoformat(text))
        except (ValueError, OverflowError):
            self.fail(f"{text!r} is no time; write 2h, 3d or 2026-11-23T19:00Z", param, ctx)


def _ago(text: str) -> datetime | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text, re.ASCII)
    return match and datetime.now(UTC) - timedelta(**{TIME_UNITS[match[2]]: float(match[1])})


def _aware(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)
